"""Parts shared by the Triton kernels of linear attention: pieces of a sequence, features, products.

A few sequences (heads) must fill a GPU, so each sequence is cut into pieces whose length depends only on shapes. The
sums of all pieces are computed first (triton_states), then the state at the start of each piece, then the outputs of
its tokens.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _env
from .._tuned import dtype_name

PIECE = 256  # minimum tokens of a piece: 256 KiB of bfloat16 at D = Dv = 128, compared with 64 KiB of float32 state
SCANNED = 512  # largest block size for which a piece holds several blocks
EPS = tl.constexpr(1e-10)
ONES = tl.constexpr(16)  # equal columns of sums of features: the minimum for a product
FIELDS = ("dtype", "size", "value_size", "features", "walk", "direction")  # what the tiles of all kernels depend on
TENSOR_MEMORY = (100, 103)  # GPUs that hold the sums of products in tensor memory, not in registers
# The interpreter multiplies the bits of bfloat16, and truncates rather than rounds to it.
_INTERPRETED = tl.constexpr(_env.triton_interpret())


class Plan(NamedTuple):
    """Pieces of a sequence, see `make_plan`."""

    pieces: int
    span: int  # tokens whose queries see the same state, or the tokens of a piece
    per_span: int  # pieces of a span
    piece: int
    is_scan: bool  # a piece holds several blocks


def slots_of(device: torch.device, per_multiprocessor: int) -> int:
    """The number of programs that a GPU runs at a time; in the interpreter, that of a small GPU."""
    if device.type != "cuda":
        return 16 * per_multiprocessor
    return torch.cuda.get_device_properties(device).multi_processor_count * per_multiprocessor


@functools.lru_cache(1024)
def _count(length: int, lanes: int, slots: int, least: int) -> int:
    """The number of pieces per sequence, for `lanes` sequences, with which `slots` concurrent programs finish first."""
    most = max(1, min(triton.cdiv(length, least), 2 * triton.cdiv(slots, max(1, lanes))))
    # Writing, summing and reading a state takes the time of about 128 tokens.
    return min(
        range(1, most + 1), key=lambda count: triton.cdiv(lanes * count, slots) * (triton.cdiv(length, count) + 128)
    )


def make_plan(length: int, causal: bool, block: int, lanes: int, device: torch.device) -> Plan:
    """Cuts a sequence into pieces: of whole small blocks, or of part of a large block, whose tokens all see one state.

    There are as many pieces as keep a GPU busy: one program per multiprocessor if programs scan blocks with the state
    in registers, else two.
    """
    if causal and block <= SCANNED:
        unit = max(1, 64 // block) * block
        count = _count(length, lanes, slots_of(device, 1), PIECE)
        piece = max(1, triton.cdiv(triton.cdiv(length, count), unit)) * unit
        return Plan(triton.cdiv(length, piece), piece, 1, piece, True)
    span = min(block, length) if causal else length
    if span == 0:
        return Plan(0, 1, 1, 1, False)
    spans = triton.cdiv(length, span)
    count = _count(span, lanes * spans, slots_of(device, 2), PIECE)
    piece = triton.cdiv(triton.cdiv(span, count), 64) * 64
    per_span = triton.cdiv(span, piece)
    return Plan(spans * per_span, span, per_span, piece, False)


def steps_of(plan: Plan, block: int, chunk: int) -> tuple[int, int, bool]:
    """Tokens of a group and of a block, for a step of `chunk` tokens, and whether a group holds several blocks.

    A scan proceeds by groups: whole small blocks, whose scores are a masked tile, or one larger block.
    """
    if plan.is_scan and block <= chunk:
        return chunk // block * block, block, True
    return (block if plan.is_scan else plan.piece), chunk, False


def fields_of(q: Tensor, v: Tensor, feature_map: str, plan: Plan, reverse: bool = False) -> dict[str, Any]:
    """The fields that a launch's tile depends on; in reverse, features have weights, and states come from later
    tokens."""
    return {
        "dtype": dtype_name(q.dtype),
        "size": padded(q.shape[3]),
        "value_size": padded(v.shape[3]),
        "features": "elu1" if feature_map == "elu1" else "",  # the others are exact
        "walk": "scan" if plan.is_scan else "",
        "direction": "reverse" if reverse else "",
    }


def is_wide(dtype: str, features: str, direction: str) -> bool:
    """Whether features are factors of four bytes: see `factor`."""
    return dtype == "fp32" or (dtype == "fp16" and (features == "elu1" or direction == "reverse"))


def tokens_to_walk(q: Tensor, v: Tensor) -> int:
    """The tokens that are read or written; 0 if there is no channel, as an expanded tensor may then have any length."""
    return q.shape[1] if q.shape[0] * q.shape[2] * (q.shape[3] + v.shape[3]) else 0


def padded(channels: int) -> int:
    """The side of a tile: a power of two and, for products, at least 16."""
    return max(16, triton.next_power_of_2(channels))


def state_count(size: int, value_size: int) -> int:
    """Floats of a state in memory: S, z, and padding that keeps the next state aligned."""
    return triton.cdiv(size * value_size + size, 4) * 4


def empty_states(q: Tensor, v: Tensor, plan: Plan) -> Tensor:
    count = state_count(q.shape[3], v.shape[3])
    return torch.empty(q.shape[0] * q.shape[2], plan.pieces, count, dtype=torch.float32, device=q.device)


@triton.jit
def program_of(PIECES, H, SPLITS):
    """Batch, head, piece and split of a program; splits and heads, which share cache lines, are neighbours."""
    pid = tl.program_id(0)
    split = pid % SPLITS
    head = pid // SPLITS % H
    piece = pid // SPLITS // H % PIECES
    batch = pid // SPLITS // H // PIECES
    return batch.to(tl.int64), head.to(tl.int64), piece, split


@triton.jit
def bounds_of(piece, L, SPAN, PER_SPAN, PIECE):
    """First token of a piece and the one after its last; int32, even if strides need int64."""
    first = piece // PER_SPAN * SPAN
    begin = first + piece % PER_SPAN * PIECE
    return begin.to(tl.int32), tl.minimum(tl.minimum(begin + PIECE, first + SPAN), L).to(tl.int32)


@triton.jit
def load_rows(base, n, c, end, C, stride_l, stride_c):
    """Loads (tokens, channels)."""
    mask = (n < end)[:, None] & (c < C)[None, :]
    return tl.load(base + n.to(tl.int64)[:, None] * stride_l + c.to(tl.int64)[None, :] * stride_c, mask, other=0.0)


@triton.jit
def load_columns(base, n, c, end, C, stride_l, stride_c):
    """Loads (channels, tokens)."""
    mask = (c < C)[:, None] & (n < end)[None, :]
    return tl.load(base + c.to(tl.int64)[:, None] * stride_c + n.to(tl.int64)[None, :] * stride_l, mask, other=0.0)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0 or NaN, accurate to about one rounding.

    tl.exp is ex2.approx of a rounded product; the rounding and the approximation together have several times the error
    of float32 references.
    """
    x = tl.where(x < -104.0, -104.0, x)  # rounds to 0
    shifted = x * 1.44269502162933349609375 + 12582912.0  # rounds to an integer, held in the low bits
    n = shifted - 12582912.0
    # ln 2 in two parts, the first with few bits.
    r = x - n * 0.693145751953125 - n * 1.428606765330187045037746429443359375e-06
    total = r * (1.0 / 5040) + 1.0 / 720
    total = total * r + 1.0 / 120
    total = total * r + 1.0 / 24
    total = total * r + 1.0 / 6
    total = total * r + 0.5
    total = total * r + 1.0
    total = total * r + 1.0
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    first = power >> 1  # 2**power may underflow, so it is applied in two factors
    low = ((first + 127) << 23).to(tl.float32, bitcast=True)
    high = ((power - first + 127) << 23).to(tl.float32, bitcast=True)
    return total * low * high


@triton.jit
def _rounded(x, BITS: tl.constexpr):
    """float32 rounded to nearest even, so that its last BITS bits are 0."""
    raised = x.to(tl.int32, bitcast=True)
    raised += ((raised >> BITS) & 1) + ((1 << (BITS - 1)) - 1)
    return tl.where(x == x, (raised & (-1 << BITS)).to(tl.float32, bitcast=True), x)


@triton.jit
def factor(x, DTYPE: tl.constexpr):
    """x as a factor of a product for tokens of DTYPE: rounded once to that dtype.

    Sums and features exceed the range of float16, so for float16 tokens they are float32 with as many bits, which is
    TF32.
    """
    if x.dtype != tl.float32 or DTYPE == tl.float32:  # noqa: SIM300
        return x
    elif DTYPE == tl.float16:  # noqa: SIM300
        return _rounded(x, 13)
    elif _INTERPRETED:
        return _rounded(x, 16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def features(x, mask, MAP: tl.constexpr):
    """The feature map of x, 0 if `mask` is not set, NaN for NaN; exact in the dtype of the tokens, float32 for elu1."""
    if MAP == "identity":
        return x
    elif MAP == "relu":
        if _INTERPRETED:
            wide = x.to(tl.float32)
            return tl.where(wide <= 0, 0.0, wide).to(x.dtype)
        else:
            return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
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
def times_derivative(t, phi, MAP: tl.constexpr):
    """t times the derivative of the feature map where phi is its value, in float32."""
    if MAP == "relu":
        return t * (phi > 0).to(tl.float32)
    elif MAP == "elu1":
        return t * tl.where(phi > 1, 1.0, phi)  # exp(x) up to 0, then 1
    else:
        return t


@triton.jit
def product(a, b, acc, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """acc + a b for tokens of DTYPE; EXACT if the results are float32.

    A tensor core multiplies exactly, but truncates rather than rounds each sum of some 16 products and the accumulator:
    over 1,024 tokens of one sign this affects up to the last six bits of float32. With EXACT, the products of a tile
    are therefore summed separately and added in registers, as in DeepSeek-V3's float8 products. Triton turns `acc +
    tl.dot(a, b)` back into a sum in the tensor core unless max_num_imprecise_acc is set (which otherwise affects only
    float8).

    float32 tokens are multiplied without tensor cores: three products of TF32 parts exceed the error budget of float32.

    No factor is the transpose of a product: Triton 3.4 to 3.7.0 miscompile `dot(trans(dot(...)), x)` for Hopper at
    tiles of 64. Transposed factors are computed transposed, or loaded transposed.
    """
    if DTYPE == tl.float32:  # noqa: SIM300
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    left, right = factor(a, DTYPE), factor(b, DTYPE)
    if _INTERPRETED or left.dtype != right.dtype:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if EXACT:
        return acc + tl.dot(left, right, input_precision="tf32", max_num_imprecise_acc=1)
    else:
        return tl.dot(left, right, acc, input_precision="tf32")


@triton.jit
def _rest(x, DTYPE: tl.constexpr):
    """The remainder of rounding to a factor; 0 for infinity."""
    rest = x - factor(x, DTYPE).to(tl.float32)
    return tl.where(rest == rest, rest, 0.0)


@triton.jit
def whole_product(a, b, acc, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """`product` that, with EXACT, adds the product of the rounding remainders of a float32 factor."""
    if EXACT and DTYPE != tl.float32:  # noqa: SIM300
        if a.dtype == tl.float32:
            acc = product(_rest(a, DTYPE), b, acc, DTYPE, EXACT)
        if b.dtype == tl.float32:
            acc = product(a, _rest(b, DTYPE), acc, DTYPE, EXACT)
    acc = product(a, b, acc, DTYPE, EXACT)
    return acc


@triton.jit
def first_column(x, ONES: tl.constexpr):
    """The first column of a (rows, ONES) tile."""
    return tl.sum(tl.where((tl.arange(0, ONES) == 0)[None, :], x, 0.0), axis=1)


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """x / y; correctly rounded if no rounding to a shorter dtype follows."""
    if x.dtype == tl.float64:
        return x / y
    elif EXACT:
        x, y = tl.broadcast(x, y)
        return tl.div_rn(x, y)
    else:
        return x * (1.0 / y)


@triton.jit
def sees(CHUNK: tl.constexpr, BLOCK, BACK: tl.constexpr):
    """(tokens, tokens) mask of a group: a row sees its own block and, with BACK, earlier blocks; else later ones."""
    block = tl.arange(0, CHUNK) // tl.full((), BLOCK, tl.int32)  # a division of 64 bits takes many registers
    if BACK:
        return block[:, None] >= block[None, :]
    else:
        return block[:, None] <= block[None, :]
