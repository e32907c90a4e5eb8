"""Reasons for refusing a call that kernels of several families share."""

from __future__ import annotations

import torch

from . import _extension


def refuse_float64(x: torch.Tensor) -> str | None:
    """For kernels that sum in another order than the reference, because float64 results are used to check the
    others."""
    return "float64 is only run by the reference, for checks" if x.dtype == torch.float64 else None


def refuse_products(x: torch.Tensor, *rest: object) -> str | None:
    """For C++ kernels that multiply matrices in tiles, on a call whose first tensor is `x`."""
    if _extension.module.cpu_capability() == "baseline" and x.dtype != torch.float64:
        # Gradients were over the error that is allowed: a plain cross-attention's by 5 %, linear attention's 3 times.
        return "needs AVX2 with FMA; without it the result exceeds the error budget"
    return refuse_float64(x)
