"""What the Triton kernels of linear attention share: pieces of a sequence, features, products.

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


def tokens_to_walk(q: Tensor, v: Tensor) -> int:
    """Tokens of which anything is read or written: of none an expanded tensor may have any number."""
    return q.shape[1] if q.shape[0] * q.shape[2] * (q.shape[3] + v.shape[3]) else 0


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
def exp_negative(x):
    """exp(x) of x <= 0 or NaN, to about a rounding. tl.exp is ex2.approx of a rounded product: what that product's
    rounding and the approximation leave is several times the error of float32 references."""
    x = tl.where(x < -104.0, -104.0, x)  # rounds to 0
    shifted = x * 1.44269502162933349609375 + 12582912.0  # rounds to an integer, which the low bits then hold
    n = shifted - 12582912.0
    r = x - n * 0.693145751953125 - n * 1.428606765330187045037746429443359375e-06  # ln 2, whose high part is short
    total = r * (1.0 / 5040) + 1.0 / 720
    total = total * r + 1.0 / 120
    total = total * r + 1.0 / 24
    total = total * r + 1.0 / 6
    total = total * r + 0.5
    total = total * r + 1.0
    total = total * r + 1.0
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    first = power >> 1  # 2**power may be too small for one float
    low = ((first + 127) << 23).to(tl.float32, bitcast=True)
    high = ((power - first + 127) << 23).to(tl.float32, bitcast=True)
    return total * low * high


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
        return tl.where(mask, tl.where(wide > 0, wide + 1, exp_negative(tl.where(wide > 0, 0.0, wide))), 0.0)


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
def _leading(x, DTYPE: tl.constexpr):
    """x to as many bits as a tensor core takes of a factor beside one of DTYPE: bfloat16, or float32 cut to TF32."""
    if DTYPE != tl.bfloat16:  # noqa: SIM300
        cut = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, cut, x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _dot(a, b, acc):
    """acc + a b of factors that a tensor core takes unrounded."""
    if _INTERPRETED or a.dtype != b.dtype:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def _apart(a, b):
    """a b of such factors, which stays apart from what it is added to."""
    if _INTERPRETED or a.dtype != b.dtype:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, max_num_imprecise_acc=1)


@triton.jit
def product(a, b, acc, EXACT: tl.constexpr):
    """acc + a b; EXACT where float32 results come of it, else where they are rounded to a shorter dtype.

    A tensor core multiplies exactly, but cuts off, rather than rounds, each sum of some 16 products and the
    accumulator: over 1,024 tokens of one sign up to float32's last six bits. So with EXACT a tile's products are summed
    by themselves and added in registers, as in DeepSeek-V3's float8 products. Triton makes of `acc + tl.dot(a, b)` a
    sum in the tensor core again, unless the dot has an accumulator of its own that is not 0, or max_num_imprecise_acc
    is set (which otherwise matters to float8 alone).

    float32 tokens are multiplied without tensor cores: three products of TF32 parts err more than float32 may. Of a
    float32 factor beside one of the tokens' dtype three parts are taken with EXACT, all its bits, else two.
    """
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        if EXACT:
            acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
        else:
            acc = tl.dot(a, b, acc, input_precision="tf32x3")
    elif a.dtype == b.dtype:
        if EXACT:
            acc += _apart(a, b)
        else:
            acc = _dot(a, b, acc)
    elif a.dtype == tl.float32:
        high = _leading(a, b.dtype)
        rest = _rest(a, high)
        low = _leading(rest, b.dtype)
        if EXACT:
            acc += _apart(high, b)
            acc += _dot(_leading(_rest(rest, low), b.dtype), b, _apart(low, b))
        else:
            acc = _dot(low, b, _dot(high, b, acc))
    else:
        high = _leading(b, a.dtype)
        rest = _rest(b, high)
        low = _leading(rest, a.dtype)
        if EXACT:
            acc += _apart(a, high)
            acc += _dot(a, _leading(_rest(rest, low), a.dtype), _apart(a, low))
        else:
            acc = _dot(a, low, _dot(a, high, acc))
    return acc


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """x / y; rounded correctly where no rounding to a shorter dtype follows."""
    if x.dtype == tl.float64:
        return x / y
    elif EXACT:
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
