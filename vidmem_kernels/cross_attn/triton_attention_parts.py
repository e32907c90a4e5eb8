"""Parts shared by the Triton kernels of cross_attention: factors of products, weights, tiles and visibility.

In half precision, scores and their maxima are in units of log 2: a GPU has exp2, and log2(e) is folded into the factor
that scales the scores anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def as_operand(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x as a factor of tl.dot; the interpreter has no bfloat16 products."""
    return x.to(dtype).to(tl.float32) if INTERPRET else x.to(dtype)


@triton.jit
def exp_of(x, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """exp(x) in float32, 2**x in half precision."""
    if PRECISION != "ieee":
        return tl.exp2(x)
    elif INTERPRET:
        return tl.exp(x)
    else:
        return libdevice.exp(x)  # tl.exp would round the product with log2(e)


@triton.jit
def unit_of(PRECISION: tl.constexpr):
    """The factor that converts a natural logarithm to the units of scores."""
    return 1.0 if PRECISION == "ieee" else LOG2E


@triton.jit
def weights_of(product, key_bias, base, SCALE, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """exp(product * SCALE + key_bias - base), with base in the units of scores; key_bias and base are broadcast."""
    score = product * (SCALE * unit_of(PRECISION))
    if key_bias is None:
        return exp_of(score - base, PRECISION, INTERPRET)
    elif PRECISION == "ieee":
        return exp_of(score + key_bias - base, PRECISION, INTERPRET)
    else:
        return exp_of(score + (key_bias * unit_of(PRECISION) - base), PRECISION, INTERPRET)


@triton.jit
def dot_alone(x, y, PRECISION: tl.constexpr):
    """x @ y, kept separate by the compiler from a longer sum."""
    return tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=1)


@triton.jit
def dot_rows(x, y, PRECISION: tl.constexpr):
    """x @ y.T.

    In float32, one running sum over more than 128 columns would err more than the reference: even and odd columns,
    which are in the same thread, are summed separately.
    """
    if PRECISION == "ieee" and x.shape[1] > 128:
        x_even, x_odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        y_even, y_odd = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
        return dot_alone(x_even, y_even.T, PRECISION) + dot_alone(x_odd, y_odd.T, PRECISION)
    else:
        return tl.dot(x, y.T, input_precision=PRECISION)


@triton.jit
def dot_split(x, y, acc, dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + x @ y with x rounded to dtype, or in two such parts, because the errors of few terms do not average out.

    In float32 the product is summed first: one running sum over thousands of rows would err more than the reference.
    """
    high = as_operand(x, dtype, INTERPRET)
    if PRECISION == "ieee":
        return acc + dot_alone(high, y, PRECISION)
    acc = tl.dot(high, y, acc, input_precision=PRECISION)
    if SPLIT:
        low = as_operand(x - high.to(tl.float32), dtype, INTERPRET)
        acc = tl.dot(low, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def lane_of(tile_count, H):
    """Batch, head and tile of a program; the tiles of one head are neighbours, so that its keys stay in the cache."""
    lane = tl.program_id(0) // tile_count
    return (lane // H).to(tl.int64), (lane % H).to(tl.int64), tl.program_id(0) % tile_count


@triton.jit
def tiles_in(L, SIZE, HAS_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The number of tiles that cover L rows, each within one block of SIZE rows."""
    return tl.cdiv(L, SIZE) * tl.cdiv(SIZE, BLOCK) if HAS_BLOCKS else tl.cdiv(L, BLOCK)


@triton.jit
def span_of(tile, L, SIZE, HAS_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """First row of a tile, and the end of its block."""
    if HAS_BLOCKS:
        parts = tl.cdiv(SIZE, BLOCK)
        begin = tile // parts * SIZE
        return begin + tile % parts * BLOCK, tl.minimum(begin + SIZE, L)
    else:
        return tile * BLOCK, L


@triton.jit
def range_of(ranges, row, whole, count):
    """Begin, middle and end of a row's tiles: without mask up to the middle. Without a list, all tiles."""
    if ranges is not None:
        return tl.load(ranges + row * 3), tl.load(ranges + row * 3 + 1), tl.load(ranges + row * 3 + 2)
    else:
        return 0, whole, count


@triton.jit
def entry_of(entries, i):
    if entries is not None:
        entry = tl.load(entries + i)
        return entry >> 1, entry & 1
    else:
        return i, 1


@triton.jit
def load_rows(where, there, d, D, EVEN_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a tile, 0 for rows that are not `there` and for columns past D; `where` points at them."""
    if MASKED and EVEN_D:
        return tl.load(where, there[:, None], other=0.0)
    elif MASKED:
        return tl.load(where, there[:, None] & (d < D)[None, :], other=0.0)
    elif EVEN_D:
        return tl.load(where)
    else:
        return tl.load(where, (d < D)[None, :], other=0.0)


@triton.jit
def visible(key, stop, listed, when, low, high, SINKS, HAS_BLOCKS: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Which keys are visible from windows [low, high]; keys may be on either axis, the rest broadcasts."""
    seen = key < stop
    listed += tl.zeros_like(key)
    if when is not None:
        within = (when >= low) & (when <= high)
        if HAS_BLOCKS and HAS_SINKS:
            within = within & (listed > 0)
        if HAS_SINKS:
            within = within | (key < SINKS)
        seen = seen & within
    elif HAS_SINKS:
        seen = seen & ((key < SINKS) | (listed > 0))
    return seen


@triton.jit
def seen_by_any(seen, product):
    """Columns that some row sees; all others must be excluded from products, because 0 times NaN is NaN.

    Derived from the products, which are in registers anyway, because a separate mask spilled. A column of -inf or NaN
    may count as hidden: its weight is 0 or NaN in any case.
    """
    return tl.max(tl.where(seen, product, float("-inf")), axis=0) > float("-inf")


@triton.jit
def softmax_step(
    product, key_bias, seen, row_max, SCALE, PRECISION: tl.constexpr, POSITIVE: tl.constexpr, INTERPRET: tl.constexpr
):
    """Weights of a tile of scores, the factor for the sums so far, and the new maxima of the rows.

    Without a bias, and if SCALE is POSITIVE, the maximum is taken before the scores are scaled, so that scaling and
    subtracting it is one instruction.
    """
    factor = SCALE * unit_of(PRECISION)
    folded: tl.constexpr = key_bias is None and POSITIVE and PRECISION != "ieee"
    if not folded:
        product = product * factor
        if key_bias is not None:
            product += key_bias * unit_of(PRECISION)
    if seen is not None:
        product = tl.where(seen, product, float("-inf"))
    tile_max = tl.max(product, axis=1)
    new_max = tl.maximum(row_max, tile_max * factor if folded else tile_max)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    product = product * factor - base[:, None] if folded else product - base[:, None]
    return exp_of(product, PRECISION, INTERPRET), exp_of(row_max - base, PRECISION, INTERPRET), new_max


@triton.jit
def log_sum_of(row_max, row_sum, PRECISION: tl.constexpr):
    """The natural logarithm of the sums, -inf for rows that see no key, and the divisor of the rows."""
    empty = row_sum == 0
    total = tl.where(empty, 1.0, row_sum)
    log_sum = row_max + tl.log(total) if PRECISION == "ieee" else (row_max + tl.log2(total)) / LOG2E
    return tl.where(empty, float("-inf"), log_sum), total
