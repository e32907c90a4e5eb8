"""The base class of the attention processors of this package, each of which wraps the previous processor."""

from __future__ import annotations

from torch import nn


class WrappingProcessor(nn.Module):
    """An attention processor that wraps another and passes on the attributes that diffusers sets on processors.

    `model.set_attention_backend` and `model.enable_parallelism` use `hasattr` to find the processors that take a
    setting.

    Args:
        inner: the previous processor of the attention.
    """

    def __init__(self, inner: object):
        super().__init__()
        self.inner = inner

    @property
    def _attention_backend(self) -> object:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: object) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> object:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: object) -> None:
        self.inner._parallel_config = config
