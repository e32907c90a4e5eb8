"""What the attention processors of this package share: each stands around the one that the attention had."""

from __future__ import annotations

from torch import nn


class WrappingProcessor(nn.Module):
    """An attention processor around another, to which what diffusers sets on processors is passed on.

    `model.set_attention_backend` and `model.enable_parallelism` look by `hasattr` which processors take their setting.

    Args:
        inner: the processor of the attention until now.
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
