"""Attention by the FlashAttention packages: FA3 (`flash_attn_interface`, `fa3_fwd_interface`), FA4 and `flash-attn`.

FA4 is `flash_attn.cute`. All of them accept our (B, L, H, D) layout with any strides.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor

from .._checks import names
from .._determinism import must_be_deterministic, warn_if_asked
from . import library_bias as bias
from .library_sdpa import HALF, Gradients, capability


@cache
def _installed(module: str) -> bool:
    """Whether a module exists, without importing it or its package."""
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or module == package:
        return spec is not None
    return PathFinder.find_spec(module, spec.submodule_search_locations) is not None


@cache
def _load(module: str, function: str, parameter: str) -> tuple[Callable[..., Any] | None, str | None]:
    """(function, None), or (None, reason): a package that does not load must not break the other libraries."""
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        return None, f"{module} does not load: {str(error).split(chr(10))[0]}"
    if parameter not in inspect.signature(found).parameters:
        return None, f"{module} is too old: {function} has no {parameter}"
    return found, None


@dataclass(frozen=True)
class Package:
    """A package whose `module` has flash_attn_func.

    Attributes:
        module: module to import.
        lse_option: argument that requests lse.
        dtypes: dtypes that it supports.
        capabilities: compute capabilities that it supports; () for all from 8.0.
        bias_sizes: head sizes for which a key bias is added as channels; () for none.
    """

    module: str
    lse_option: str = "return_attn_probs"
    dtypes: tuple[torch.dtype, ...] = HALF
    capabilities: tuple[tuple[int, int], ...] = ()
    bias_sizes: tuple[int, ...] = ()

    def refuse(self, q, k, v, key_bias, *options) -> str | None:
        """Why it cannot run a call, or None."""
        return (
            self.refuse_tensors(q, key_bias, options[-1]) or _load(self.module, "flash_attn_func", self.lse_option)[1]
        )

    def refuse_tensors(self, q: Tensor, key_bias: Tensor | None, scale: float) -> str | None:
        """Why it cannot run a call, or None, without importing it."""
        if not _installed(self.module):
            return f"{self.module} is not installed"
        if q.dtype not in self.dtypes:
            return f"needs {names(self.dtypes)}, got {names([q.dtype])}"
        if self.capabilities and capability(q.device) not in self.capabilities:
            return f"needs compute capability {' or '.join(f'{a}.{b}' for a, b in self.capabilities)}"
        if key_bias is None:
            return None
        return bias.refuse(q, scale, self.bias_sizes) if self.bias_sizes else "does not support key_bias"

    def avoid(self, q, k, v, key_bias, *options) -> str | None:
        """Why other backends are faster, or None."""
        return None if key_bias is None else bias.avoid(q, k)

    def forward(self, q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
        """(out, lse)."""
        function = _load(self.module, "flash_attn_func", self.lse_option)[0]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = function(q, k, v, softmax_scale=scale, **{self.lse_option: True})[:2]
            return out.contiguous(), lse.contiguous()

        if key_bias is None:
            return attend(q, k, v)
        return bias.forward(attend, q, k, v, key_bias, scale, self.bias_width(q))

    def bias_width(self, q: Tensor) -> int:
        """Channels of q and k with a key bias: FA3's kernel for 192 and 128 channels was the fastest."""
        return 192


class _FA4(Package):
    def refuse_tensors(self, q: Tensor, key_bias: Tensor | None, scale: float) -> str | None:
        size = q.shape[3]
        if why := super().refuse_tensors(q, key_bias, scale):
            return why
        if capability(q.device) >= (10, 0) and 128 < size < 256:
            return f"needs D of at most 128 or 256, got {size}"
        return None

    def bias_width(self, q: Tensor) -> int:
        width = bias.width(q.shape[3])
        # Above 128 channels, the kernels for Blackwell support 192 only with 128 value channels.
        return 192 if width > 128 and capability(q.device) >= (10, 0) else width


FA3 = Package("flash_attn_interface", capabilities=((9, 0),), bias_sizes=(128,))
FA3_FWD = Package("fa3_fwd_interface", dtypes=(torch.bfloat16,), capabilities=((9, 0),), bias_sizes=(128,))
FA4 = _FA4(
    "flash_attn.cute",
    lse_option="return_lse",
    capabilities=((9, 0), (10, 0), (10, 3)),
    bias_sizes=(64, 80, 96, 112, 128),
)
FLASH_ATTN = Package("flash_attn.flash_attn_interface")

_FA4_BACKWARD = ("flash_attn.cute.interface", "_flash_attn_bwd", "dlse")
_FA3_BACKWARD = ("flash_attn_interface", "_flash_attn_backward", "deterministic")


def refuse_fa4_backward(grad_out, grad_lse, q, k, v, key_bias, out, lse, *options) -> str | None:
    """Why FA4 cannot compute these gradients, or None."""
    why = FA4.refuse_tensors(q, key_bias, options[-1])
    if why is None and key_bias is not None:
        why = bias.refuse_gradient(q, key_bias)
    return why or _load(*_FA4_BACKWARD)[1]


def avoid_fa4_backward(grad_out, grad_lse, q, k, v, key_bias, *rest) -> str | None:
    """Why other backends are faster than FA4, or None."""
    return FA4.avoid(q, k, v, key_bias)


def fa4_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> Gradients:
    """Gradients by FA4, including that of lse, in one pass."""
    function = _load(*_FA4_BACKWARD)[0]
    warn_if_asked("FA4's gradient")
    grad_out = grad_out.contiguous()  # the gradient of .sum() has stride 0

    def gradients(q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return function(
            q=q, k=k, v=v, out=out, dout=grad_out, lse=lse, softmax_scale=scale,
            deterministic=must_be_deterministic(), dlse=grad_lse,
        )  # fmt: skip

    if key_bias is not None:
        return bias.backward(gradients, q, k, v, key_bias, lse, scale, FA4.bias_width(q))
    return *(g.contiguous() for g in gradients(q, k, v, lse)), lse.new_empty(0)


def refuse_fa3_backward(grad_out, grad_lse, q, k, v, key_bias, out, lse, *options) -> str | None:
    """Why FA3 cannot compute these gradients, or None."""
    if grad_lse is not None:
        return "does not support a gradient of lse"
    if key_bias is not None:
        return "does not support key_bias"
    return FA3.refuse_tensors(q, None, options[-1]) or _load(*_FA3_BACKWARD)[1]


def fa3_backward(grad_out, grad_lse, q, k, v, key_bias, out, lse, *options) -> Gradients:
    """Gradients by FA3."""
    warn_if_asked("FA3's gradient")
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    _load(*_FA3_BACKWARD)[0](
        dout=grad_out.contiguous(), q=q, k=k, v=v, out=out, softmax_lse=lse, dq=grads[0], dk=grads[1], dv=grads[2],
        softmax_scale=options[-1], deterministic=must_be_deterministic(),
    )  # fmt: skip
    return *grads, lse.new_empty(0)
