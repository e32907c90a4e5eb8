"""What the Triton kernels of linear attention share: pieces of a sequence, features, products. Not yet run on a GPU.

A few sequences (heads) must fill a GPU, so each is cut into pieces of a length that only shapes decide. Sums of all
pieces come first (triton_states), then the state that every piece begins with, then what its tokens find there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _env

PIECE = 1024  # tokens that share one float32 state in memory, 64 KiB at D = Dv = 128, beside 1 MiB of bfloat16 tokens
CHUNK = 32  # tokens of a masked tile of scores beside a state, see `chunk_of`
EPS = tl.constexpr(1e-10)
_TF32X3 = tl.constexpr("tf32x3")
# The interpreter multiplies the bits of bfloat16.
_INTERPRETED = tl.constexpr(_env.triton_interpret())


class Plan(NamedTuple):
    """Pieces of a sequence, see `make_plan`."""

    pieces: int
    span: int  # tokens whose queries see the same, or those of a piece
    per_span: int  # pieces of a span
    piece: int
    group: int  # tokens that a scan goes on by
    is_scan: bool  # a piece holds several blocks
    is_masked: bool  # a group holds several blocks
    chunk: int  # tokens of a masked tile


def chunk_of(size: int, wide: bool) -> int:
    """Tokens of a masked tile: those for which registers are left beside the running state."""
    return CHUNK // 2 if wide or size > 128 else CHUNK


def make_plan(length: int, causal: bool, block: int, chunk: int) -> Plan:
    """Pieces of whole small blocks, which are walked along; or of part of a large one, whose state all of it sees."""
    if causal and block <= PIECE // 2:
        masked = block <= chunk
        group = chunk // block * block if masked else block
        piece = PIECE // group * group
        return Plan(triton.cdiv(length, piece), piece, 1, piece, group, True, masked, chunk)
    span = min(block, length) if causal else length
    if span == 0:
        return Plan(0, 1, 1, 1, 1, False, False, chunk)
    even = triton.cdiv(span, triton.cdiv(span, PIECE))
    piece = triton.cdiv(even, 64) * 64
    per_span = triton.cdiv(span, piece)
    return Plan(triton.cdiv(length, span) * per_span, span, per_span, piece, piece, False, False, chunk)


def padded(channels: int) -> int:
    """Sides of tiles are powers of two and, for products, at least 16."""
    return max(16, triton.next_power_of_2(channels))


def state_count(size: int, value_size: int) -> int:
    """Floats of a state in memory: S, z, and what keeps the next one aligned."""
    return triton.cdiv(size * value_size + size, 4) * 4


def empty_states(q: Tensor, v: Tensor, plan: Plan) -> Tensor:
    count = state_count(q.shape[3], v.shape[3])
    return torch.empty(q.shape[0] * q.shape[2], plan.pieces, count, dtype=torch.float32, device=q.device)


@triton.jit
def program_of(PIECES, H, SPLITS):
    """Batch, head, piece and split of a program; splits and heads share tokens' cache lines, so they are neighbours."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    head = pid // SPLITS % H
    piece = pid // SPLITS // H % PIECES
    batch = pid // SPLITS // H // PIECES
    return batch.to(tl.int64), head.to(tl.int64), piece, split


@triton.jit
def bounds_of(piece, L, SPAN, PER_SPAN, PIECE):
    """First token of a piece and the one after its last; int32, also beside strides that need more."""
    first = piece // PER_SPAN * SPAN
    begin = first + piece % PER_SPAN * PIECE
    return begin.to(tl.int32), tl.minimum(tl.minimum(begin + PIECE, first + SPAN), L).to(tl.int32)


@triton.jit
def load_rows(base, n, c, end, C, stride_l, stride_c):
    """(tokens, channels)"""
    mask = (n < end)[:, None] & (c < C)[None, :]
    return tl.load(base + n.to(tl.int64)[:, None] * stride_l + c.to(tl.int64)[None, :] * stride_c, mask, other=0.0)


@triton.jit
def load_columns(base, n, c, end, C, stride_l, stride_c):
    """(channels, tokens)"""
    mask = (c < C)[:, None] & (n < end)[None, :]
    return tl.load(base + c.to(tl.int64)[:, None] * stride_c + n.to(tl.int64)[None, :] * stride_l, mask, other=0.0)


@triton.jit
def features(x, mask, MAP: tl.constexpr):
    """Exact, so in the dtype of the tokens; elu1's in float32. 0 where `mask` is not set, NaN of NaN."""
    if MAP == "identity":
        return x
    elif MAP == "relu":
        wide = x.to(tl.float32)
        return tl.where(wide <= 0, 0.0, wide).to(x.dtype)
    else:
        wide = x.to(tl.float32)
        return tl.where(mask, tl.where(wide > 0, wide + 1, tl.exp(tl.where(wide > 0, 0.0, wide))), 0.0)


@triton.jit
def feature_rows(x, n, c, end, C, MAP: tl.constexpr):
    return features(x, (n < end)[:, None] & (c < C)[None, :], MAP)


@triton.jit
def feature_columns(x, n, c, end, C, MAP: tl.constexpr):
    return features(x, (c < C)[:, None] & (n < end)[None, :], MAP)


@triton.jit
def _rest(x, part):
    """What rounding left; of infinity nothing."""
    rest = x - part.to(tl.float32)
    return tl.where(rest == rest, rest, 0.0)


@triton.jit
def _dot(a, b, acc):
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def product(a, b, acc, EXACT: tl.constexpr, SINGLE: tl.constexpr = _TF32X3):
    """acc + a b. A float32 factor of bfloat16 tokens is taken in two parts, 16 bits, which is plenty where the result
    is rounded to the tokens' dtype; with EXACT in three. float16 has not the range for parts of a sum. SINGLE is the
    precision of two float32 factors."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = _dot(a, b, acc)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = _rest(a, high)
        low = rest.to(tl.bfloat16)
        acc = _dot(high, b, acc)
        acc = _dot(low, b, acc)
        if EXACT:
            acc = _dot(_rest(rest, low).to(tl.bfloat16), b, acc)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high = b.to(tl.bfloat16)
        rest = _rest(b, high)
        low = rest.to(tl.bfloat16)
        acc = _dot(a, high, acc)
        acc = _dot(a, low, acc)
        if EXACT:
            acc = _dot(a, _rest(rest, low).to(tl.bfloat16), acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=SINGLE)
    return acc


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """x / y; rounded correctly where no rounding to a shorter dtype follows."""
    if EXACT:
        x, y = tl.broadcast(x, y)
        return tl.div_rn(x, y)
    else:
        return x * (1.0 / y)


@triton.jit
def sees(CHUNK: tl.constexpr, BLOCK, REVERSE: tl.constexpr):
    """(others, tokens): whether a token of a group finds another one, of its own block or of those already walked."""
    block = (tl.arange(0, CHUNK) // BLOCK).to(tl.int32)
    if REVERSE:
        return block[:, None] >= block[None, :]
    else:
        return block[:, None] <= block[None, :]
