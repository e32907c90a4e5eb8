"""Public functions of sparse gathering: contracts and checks of meaning."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    QUANTIZED_DTYPES,
    check_int,
    check_same,
    check_tensor,
    names,
)
from .._dispatch import requested


def gather_tokens(
    bank: Tensor,
    index: Tensor,
    *,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reads rows of a token memory, dequantising them in the same pass.

    Args:
        bank: (B, M, C), or (1, M, C) shared by the whole batch; float32, bfloat16, float16, float64, int8 or
            float8_e4m3fn. For a CUDA `index` it may lie in pinned host memory and is then read in place.
        index: (B, K) int32 or int64 rows of the bank; -1 gives a row of zeros.
        scale: (B|1, M) float32, the factor of each row; required for int8 and float8 banks, and only for those.
        out_dtype: float dtype of the result; default the bank's, or float32 for int8 and float8 banks.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, K, C) contiguous, on the device of `index`. Differentiable in a float `bank` (deterministic
        scatter-add) and in `scale`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        IndexError: an index outside [-1, M - 1]. On a GPU, where checking would cost a synchronisation, such a
            row is NaN instead; nothing outside the bank is read.

    Equivalent PyTorch:
        rows = bank[arange(B)[:, None], index.clamp(min=0)].float() * scale[arange(B)[:, None], index, None]
        rows.masked_fill(index[..., None] < 0, 0).to(out_dtype)
    """
    op = "gather_tokens"
    check_tensor(op, "bank", bank, "B, M, C", FLOAT_DTYPES + QUANTIZED_DTYPES)
    check_tensor(op, "index", index, "B, K", INDEX_DTYPES)
    if bank.shape[0] != 1 and bank.shape[0] != index.shape[0]:
        raise ValueError(
            f"{op}: bank must have batch 1 or that of index, {index.shape[0]}, got {bank.shape[0]}"
        )
    if bank.device != index.device and bank.device.type != "cpu":
        raise ValueError(
            f"{op}: bank must be on the device of index, {index.device}, or on the host, got {bank.device}"
        )
    if (scale is not None) != (bank.dtype in QUANTIZED_DTYPES):
        raise TypeError(
            f"{op}: scale must be given exactly for {names(QUANTIZED_DTYPES)} banks, got a "
            f"{names([bank.dtype])} bank and {'a' if scale is not None else 'no'} scale"
        )
    if scale is not None:
        check_tensor(op, "scale", scale, "B, M", (torch.float32,))
        check_same(op, "scale must have the bank's first two sizes", scale.shape, bank.shape[:2])
        check_same(op, "scale must be on the bank's device", scale.device, bank.device)
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be {names(FLOAT_DTYPES)}, got {out_dtype}")
    return torch.ops.vidmem.gather_tokens(bank, index, scale, out_dtype, requested(backend))


def scatter_add_tokens(
    src: Tensor, index: Tensor, num_rows: int, *, backend: str | None = None
) -> Tensor:
    """Adds rows into a new memory of zeros: the transpose of `gather_tokens`.

    Args:
        src: (B, K, C) float rows.
        index: (B, K) int32 or int64, the output row of each source row; -1 drops it.
        num_rows: M, rows of the result.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, M, C) of the dtype of `src`; rows of equal index are summed in float32, in order of K, so that the
        result is deterministic whatever the duplicates. Differentiable in `src`, any number of times.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        IndexError: an index outside [-1, M - 1]; on a GPU such a row is dropped instead.

    Equivalent PyTorch:
        src.new_zeros(B, M, C).scatter_add_(1, index[..., None].expand_as(src), src)
    """
    op = "scatter_add_tokens"
    check_tensor(op, "src", src, "B, K, C")
    check_tensor(op, "index", index, "B, K", INDEX_DTYPES)
    check_same(op, "index must have the first two sizes of src", index.shape, src.shape[:2])
    check_same(op, "index must be on the device of src", index.device, src.device)
    check_int(op, "num_rows", num_rows, 0)
    return torch.ops.vidmem.scatter_add_tokens(src, index, num_rows, requested(backend))
