"""The loop of cross_attention's forward kernel with warps dedicated to loads, for sm_90 and sm_100.

Triton specialises the warps of one loop without branches whose loads all use descriptors; on sm_90 it needs num_warps=4
and makes 12 of them. It silently leaves any other loop unchanged. So the only mask here is that of the last keys; calls
with windows or sinks, and with blocks that tiles do not divide, use pointers. Compiled, but never run on a GPU, so it
is not a default.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._env import triton_interpret
from .._tuned import Tile, arch_of
from .triton_attention_parts import as_operand, softmax_step
from .triton_plan import Call
from .triton_tiles import SPECIALISED

_log = logging.getLogger(__name__)
_ALIGNED = 16  # bytes, alignment of a descriptor
unspecialised: set[str] = set()  # keys of tiles that Triton did not specialise


@triton.jit
def attend_specialised(
    q, k, v, bias, entries, begin, end, start, LQ, LK, D, DV, SCALE, q_stride_l, k_stride_l, v_stride_l,
    PRECISION: tl.constexpr, POSITIVE: tl.constexpr, INTERPRET: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums, maxima and totals of a tile of queries over the tiles of keys of entries[begin:end], or of all keys.

    Rows and columns outside a descriptor are read as 0. TAIL: the last tile of keys has fewer rows.
    """
    dtype: tl.constexpr = v.dtype.element_ty
    of_q = tl.make_tensor_descriptor(q, [LQ, D], [tl.cast(q_stride_l, tl.int64), 1], [BLOCK_M, BLOCK_D])
    of_k = tl.make_tensor_descriptor(k, [LK, D], [tl.cast(k_stride_l, tl.int64), 1], [BLOCK_N, BLOCK_D])
    of_v = tl.make_tensor_descriptor(v, [LK, DV], [tl.cast(v_stride_l, tl.int64), 1], [BLOCK_N, BLOCK_V])
    if bias is not None:
        of_bias = tl.make_tensor_descriptor(bias, [LK], [1], [BLOCK_N])
    held = as_operand(of_q.load([start, 0]), dtype, INTERPRET)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for i in tl.range(0, tl.cast(end - begin, tl.int32), num_stages=STAGES, warp_specialize=True):
        first = (tl.load(entries + begin + i) >> 1) * BLOCK_N if entries is not None else i * BLOCK_N
        keys = as_operand(of_k.load([first, 0]), dtype, INTERPRET)
        score = tl.dot(held, keys.T)
        key_bias = None
        if bias is not None:
            key_bias = of_bias.load([first])[None, :]
        seen = None
        if TAIL:
            seen = (first + n < LK)[None, :]
        weight, decay, row_max = softmax_step(score, key_bias, seen, row_max, SCALE, PRECISION, POSITIVE, INTERPRET)
        row_sum = row_sum * decay + tl.sum(weight, axis=1)
        values = as_operand(of_v.load([first, 0]), dtype, INTERPRET)
        acc = tl.dot(as_operand(weight, dtype, INTERPRET), values, acc * decay[:, None])
    return acc, row_max, row_sum


def why_not(call: Call, tile: Tile, key: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a call cannot use specialised warps with a tile, or None."""
    if key in unspecialised:
        return "Triton specialises no warps of this tile"
    if arch_of(q.device) not in SPECIALISED and not triton_interpret():
        return "specialised warps need sm_90 or sm_100"
    seen = call.visibility
    if seen is not None:
        if seen.times is not None or seen.sinks > 0:
            return "specialised warps have no masks for a window or sinks"
        if seen.size_q % tile["BLOCK_M"] or seen.size_k % tile["BLOCK_N"]:
            return f"blocks of {seen.size_q} x {seen.size_k} are not made of tiles"
    for x in (q, k, v):
        strides = [s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
        if x.data_ptr() % _ALIGNED or any(s % _ALIGNED for s in strides) or (x.shape[3] > 1 and x.stride(3) != 1):
            return "descriptors need rows at multiples of 16 bytes"
    if call.key_bias is not None:
        bias = call.key_bias
        strides = [s * bias.element_size() for s, n in zip(bias.stride()[:2], bias.shape[:2], strict=True) if n > 1]
        if bias.data_ptr() % _ALIGNED or any(s % _ALIGNED for s in strides) or bias.stride(2) != 1:
            return "descriptors need a bias at multiples of 16 bytes"
    return None


def launch(kernel: Callable[[], Any], tile: Tile, key: str, device: torch.device) -> None:
    """Launches a kernel that makes descriptors, and checks that Triton specialised it.

    Triton keeps the allocator of descriptors in a context variable, which the thread of a backward pass does not
    inherit; it is set for this launch only. The memory belongs to the current stream: torch allocates multiples of 512
    bytes, also during graph capture. `key` names what has this tile.
    """

    def run():
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        return kernel()

    compiled = contextvars.copy_context().run(run)
    if compiled is not None and compiled.metadata.num_warps <= tile["num_warps"]:  # None: nothing was compiled
        unspecialised.add(key)
        _log.warning(
            "cross_attention: Triton specialised no warps of %s[%s]; its default tile is taken from now", tile, key
        )
