"""Sample inputs of the sparse gathering ops."""

import torch

from .._numerics import accumulate_dtype
from ..testing import public_call, sample_inputs
from . import api


@sample_inputs("gather_tokens")
def gather_tokens(make):
    index = make.randint(-1, 7, (2, 9))
    yield "own bank", (make.randn(2, 7, 5), index, None, None)
    yield "shared bank, int64", (make.randn(1, 7, 5), index.long(), None, None)
    yield "out_dtype", (make.randn(1, 7, 33), index, None, torch.float32)
    yield "strided", (make.strided(make.randn(2, 7, 5)), make.strided(index), None, None)
    yield "transposed", (make.randn(2, 19, 7).transpose(1, 2), index, None, None)
    yield "one channel", (make.randn(2, 7, 1), index, None, None)
    yield "no channels", (make.randn(1, 7, 0), index, None, None)
    yield "no index", (make.randn(2, 7, 5), index[:, :0], None, None)
    yield "no batch", (make.randn(0, 7, 5), index[:0], None, None)
    yield "no rows", (make.randn(2, 0, 5), torch.full_like(index, -1), None, None)
    scale = make.rand(2, 7, dtype=torch.float32)
    rows = make.randint(-127, 128, (2, 7, 37), torch.int8)
    yield "int8", (rows, index, scale, None)
    yield "int8, strided", (make.strided(rows), index, make.strided(scale), make.dtype)
    # Every byte, with subnormals and both zeros; the two NaNs separately, as they make the gradient of scale NaN.
    codes = torch.arange(256, dtype=torch.uint8, device=make.device)
    nans = codes[(codes & 0x7F) == 0x7F].repeat(7).view(1, 7, 2).view(torch.float8_e4m3fn)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(7).view(1, 7, 254).view(torch.float8_e4m3fn)
    yield "float8, shared", (codes, index, scale[:1], make.dtype)
    yield "float8, NaN", (nans, index, scale[:1], None)


@sample_inputs("scatter_add_tokens")
def scatter_add_tokens(make):
    index = make.randint(-1, 4, (2, 9))
    yield "duplicates", (make.randn(2, 9, 5), index, 4)
    yield "int64, untouched rows", (make.randn(2, 9, 33), index.long(), 11)
    yield "all to one row", (make.randn(2, 9, 40), torch.full_like(index, 2), 4)
    yield "strided", (make.strided(make.randn(2, 9, 5)), make.strided(index), 4)
    yield "wide", (make.randn(2, 9, 1031), index, 4)
    yield "wide, strided", (make.strided(make.randn(2, 9, 1031)), index, 4)
    yield "no channels", (make.randn(2, 9, 0), index, 4)
    yield "no source", (make.randn(2, 0, 5), index[:, :0], 3)
    yield "no batch", (make.randn(0, 9, 5), index[:0], 4)
    yield "no rows", (make.randn(2, 9, 5), torch.full_like(index, -1), 0)


@sample_inputs("quantize_rows")
def quantize_rows(make):
    for dtype in (torch.int8, torch.float8_e4m3fn):
        yield f"{dtype}", (make.randn(2, 7, 37), dtype)
        yield f"{dtype}, strided", (make.strided(make.randn(2, 3, 5)), dtype)
        yield f"{dtype}, transposed", (make.randn(2, 19, 4).transpose(1, 2), dtype)
        yield f"{dtype}, one channel", (make.randn(1, 5, 1), dtype)
        yield f"{dtype}, wide", (make.randn(1, 3, 1031), dtype)
    yield "no channels", (make.randn(2, 3, 0), torch.int8)
    yield "no rows", (make.randn(2, 0, 5), torch.int8)
    yield "no batch", (make.randn(0, 3, 5), torch.float8_e4m3fn)


@sample_inputs("quantize_rows_backward")
def quantize_rows_backward(make):
    scale_dtype = accumulate_dtype(make.dtype)
    for label, (x, dtype) in quantize_rows(make):
        yield label, (make.randn(*x.shape[:-1], dtype=scale_dtype), x, dtype)


@sample_inputs("select_tokens")
def select_tokens(make):
    x = make.randn(2, 9, 5)
    yield "by norm", (x, 4, None)
    yield "by score", (x, 4, make.randn(2, 9))
    yield "equal scores", (x, 4, make.randint(0, 2, (2, 9), make.dtype))
    yield "strided", (make.strided(x), 4, make.strided(make.randn(2, 9)))
    yield "wide", (make.randn(1, 33, 257), 17, None)
    yield "all", (x, 9, None)
    yield "none", (x, 0, None)
    yield "one channel", (make.randn(2, 9, 1), 3, None)
    yield "no tokens", (x[:, :0], 0, None)
    yield "no batch", (x[:0], 4, None)


@sample_inputs("topk_blocks")
def topk_blocks(make):
    q, k = make.randn(2, 11, 3, 5), make.randn(2, 23, 3, 5)
    yield "partial blocks", (q, k, 4, 5, 3)
    yield "strided", (make.strided(q), make.strided(k), 4, 5, 3)
    yield "whole blocks", (q, make.randn(2, 16, 3, 5), 11, 4, 2)
    yield "blocks of one", (q, k, 1, 1, 7)
    yield "every block", (q, k, 16, 5, 5)
    yield "head size 64", (make.randn(1, 70, 2, 64), make.randn(1, 300, 2, 64), 32, 16, 9)
    yield "none", (q, k, 4, 5, 0)
    yield "no queries", (q[:, :0], k, 4, 5, 3)
    yield "no keys", (q, k[:, :0], 4, 5, 0)
    yield "no batch", (q[:0], k[:0], 4, 5, 3)
    yield "nearest of many", (make.randn(1, 130, 1, 65), make.randn(1, 301, 1, 65), 1, 1, 1)
    tied = make.randint(-1, 2, (1, 120, 2, 6)).to(make.dtype)
    yield "equal scores", (tied[:, :50], tied, 1, 1, 33)


@sample_inputs("topk_blocks_causal")
def topk_blocks_causal(make):
    wide = accumulate_dtype(make.dtype)
    q, k = make.randn(2, 5, 3, 4, dtype=wide), make.randn(2, 7, 3, 4, dtype=wide)
    last, present = make.randint(0, 7, (1, 5), torch.int64), make.randint(0, 2, (2, 7)) > 0
    yield "own last blocks, shared keys", (q, k, make.randint(0, 7, (2, 5)), present[:1], 3)
    yield "shared last blocks", (q, k, last, present, 7)
    yield "strided", (make.strided(q), make.strided(k), make.strided(last), make.strided(present), 2)
    tied = make.randint(-1, 2, (1, 40, 2, 3)).to(wide)
    yield (
        "equal scores",
        (tied, tied, torch.arange(40, device=make.device).unsqueeze(0), make.randint(0, 2, (1, 40)) > 0, 9),
    )
    yield "none", (q, k, last, present, 0)
    yield "no queries", (q[:, :0], k, last[:, :0], present, 3)
    yield "no keys", (q, k[:, :0], last - 7, present[:, :0], 0)
    yield "no batch", (q[:0], k[:0], last, present[:1], 3)


def _bank(m, s, dtype=None):
    """A bank with an index into it; for 8-bit dtypes also the scale."""
    index = m.randint(-1, s["M"], (s["B"], s["K"]))
    if dtype is None:
        return m.randn(s["B"], s["M"], s["C"]), index
    rows, scale = api.quantize_rows(m.randn(s["B"], s["M"], s["C"]), dtype)
    return rows, index, scale


public_call("gather_tokens", "own bank", api.gather_tokens, "B M C", "B K", make=_bank)
public_call(
    "gather_tokens",
    "shared bank, int64",
    api.gather_tokens,
    *("1 M C", "B K"),
    make=lambda m, s: (m.randn(1, s["M"], s["C"]), m.randint(-1, s["M"], (s["B"], s["K"]), torch.int64)),
)
for _dtype in (torch.int8, torch.float8_e4m3fn):
    public_call(
        "gather_tokens",
        f"{_dtype}".removeprefix("torch."),
        lambda bank, index, scale: api.gather_tokens(bank, index, scale=scale),
        *("B M C", "B K", "B M"),
        make=lambda m, s, dtype=_dtype: _bank(m, s, dtype),
    )
    public_call(
        "quantize_rows", f"{_dtype}".removeprefix("torch."), lambda x, d=_dtype: api.quantize_rows(x, d), "B M C"
    )
public_call("quantize_rows", "two dimensions", api.quantize_rows, "M C")
public_call("quantize_rows", "five dimensions", api.quantize_rows, "B T H M C")
public_call(
    "scatter_add_tokens",
    "into 40",
    lambda src, index: api.scatter_add_tokens(src, index, 40),
    *("B K C", "B K"),
    make=lambda m, s: (m.randn(s["B"], s["K"], s["C"]), m.randint(-1, 40, (s["B"], s["K"]))),
)
public_call("select_tokens", "some", lambda x: api.select_tokens(x, 4), "B N 5", N=6)
public_call(
    "select_tokens",
    "half by score",
    lambda x, score: api.select_tokens(x, x.shape[1] // 2, score=score),
    *("B N 5", "B N"),
    constant=(1,),
)
public_call(
    "topk_blocks",
    "some",
    lambda q, k: api.topk_blocks(q, k, block_size=(4, 3), topk=2),
    *("B Lq H D", "B Lk H D"),
    Lk=6,
)
public_call(
    "topk_blocks",
    "masked keys, one always",
    lambda q, k, shown: api.topk_blocks(q, k, block_size=(4, 3), topk=2, key_mask=shown > 0, always=(1,)),
    *("B Lq H D", "B Lk H D", "B Lk"),
    constant=(2,),
    Lk=6,
)
public_call(
    "topk_blocks", "causal", lambda x: api.topk_blocks(x, x, block_size=(3, 3), topk=2, causal=True), "B L H D", L=6
)
public_call(
    "topk_blocks",
    "tiles of their own sizes",
    lambda q, k, sizes: api.topk_blocks(q, k, block_size=(4, 4), topk=2, block_sizes=sizes),
    *("B 9 H D", "1 9 H D", "3"),
    make=lambda m, s: (
        m.randn(s["B"], 9, s["H"], s["D"]),
        m.randn(1, 9, s["H"], s["D"]),
        torch.tensor([4, 3, 2], device=m.device),
    ),
)
