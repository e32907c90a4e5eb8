"""The table of tests/test_export.py: calls of every public function, with names for the sizes of their tensors."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import vidmem_kernels as vk


class Case(NamedTuple):
    """A call, its tensors and the names of their dimensions ("B N 4": the last one is fixed)."""

    function: str
    label: str
    call: Callable
    shapes: tuple[str, ...]
    make: Callable  # (Make, sizes by name) -> the tensors
    least: dict[str, int]  # smallest size of a dimension that is not 1


CASES: list[Case] = []
# They compute nothing, or live on files.
NOT_TRACED = {
    "BackendError", "Choice", "LinearAttentionState", "MemoryBank", "MemoryFileError", "MergeResult", "QuantizedRows",
    "SelectResult", "explain", "recording", "use_backend",
}  # fmt: skip


def case(function, label, call, *shapes, make=None, **least):
    """Without `make` all tensors are normal."""

    def normal(m, sizes):
        return tuple(m.randn(*(int(d) if d.isdigit() else sizes[d] for d in shape.split())) for shape in shapes)

    CASES.append(Case(function, label, call, shapes, make or normal, least))


# --- token merging ---


def _half(x, **options):
    return vk.match_tokens(x, x.shape[1] // 2, **options)


def _plan(m, sizes):
    """Tensors of a plan that merges R of N tokens."""
    return tuple(vk.MergePlan.from_assignment(m.randint(0, sizes["R"], (sizes["B"], sizes["N"])), sizes["R"]))


def _merge(x):
    plan = _half(x)
    tokens, size = vk.merge_tokens(x, plan)
    return vk.unmerge_tokens(tokens, plan), tokens, size


PLAN = ("B N", "B R", "B N", "B R+1")
case("match_tokens", "half", _half, "B N 5")
case("match_tokens", "a third, channels", lambda x: vk.match_tokens(x, x.shape[1] // 3), "B N C", C=1)
case("match_tokens", "3/10", lambda x: vk.match_tokens(x, x.shape[1] * 3 // 10), "B N 5")
case("match_tokens", "some", lambda x: vk.match_tokens(x, 3), "B N 5", N=6)
case("match_tokens", "none", lambda x: vk.match_tokens(x, 0), "B N 5")
case("match_tokens", "of a half", lambda x: _half(vk.merge_tokens(x, _half(x)).tokens), "B N 5", N=4)
case("match_tokens", "grid", lambda x: vk.match_tokens(x, 20, grid=(3, 4, 4), window=(1, 0, 1)), "B 48 5")
case(
    "match_tokens",
    "grid of the sizes",
    lambda x: vk.match_tokens(x.flatten(1, 3), x.shape[1] * x.shape[2] * x.shape[3] // 4, grid=x.shape[1:4]),
    "B T H W 5", T=2, H=2, W=2,
)  # fmt: skip
case("match_neighbors", "grid", lambda x: vk.match_neighbors(x, 11, grid=(3, 4, 5)), "B 60 5")
case(
    "match_neighbors",
    "grid of the sizes",
    lambda x: vk.match_neighbors(x.flatten(1, 3), x.shape[1] * x.shape[2] * x.shape[3] // 3, grid=x.shape[1:4]),
    "B T H W C", T=2, H=2, W=2, C=1,
)  # fmt: skip
case(
    "match_neighbors",
    "threshold",
    lambda x: vk.match_neighbors(x, None, grid=(3, 4, 5), threshold=0.5),
    "B 60 5",
)
case(
    "match_neighbors",
    "threshold, limit, merged",
    lambda x: vk.merge_tokens(x, vk.match_neighbors(x, 9, grid=(3, 4, 5), threshold=0.1)),
    "B 60 5",
)
case("merge_tokens", "there and back", _merge, "B N 5")
case(
    "merge_tokens",
    "plan given, sizes",
    lambda x, size, *plan: vk.merge_tokens(x, vk.MergePlan(*plan), size),
    "B N C", "B N", *PLAN,
    make=lambda m, s: (m.randn(s["B"], s["N"], s["C"]), m.rand(s["B"], s["N"]), *_plan(m, s)), R=1,
)  # fmt: skip
case(
    "unmerge_tokens",
    "plan given",
    lambda y, *plan: vk.unmerge_tokens(y, vk.MergePlan(*plan)),
    "B R C", *PLAN,
    make=lambda m, s: (m.randn(s["B"], s["R"], s["C"]), *_plan(m, s)), R=1,
)  # fmt: skip
case(
    "MergePlan",
    "from_assignment",
    lambda a: vk.MergePlan.from_assignment(a, 7),
    "B N",
    make=lambda m, s: (m.randint(0, 7, (s["B"], s["N"])),),
)
case(
    "MergePlan",
    "from_assignment, rows of another tensor, merged",
    lambda a, x, y: vk.merge_tokens(x, vk.MergePlan.from_assignment(a, y.shape[0])),
    "B N", "B N 5", "R",
    make=lambda m, s: (
        m.randint(0, s["R"], (s["B"], s["N"]), torch.int64), m.randn(s["B"], s["N"], 5), m.randn(s["R"]),
    ), R=1,
)  # fmt: skip

# --- sparse gathering ---


def _bank(m, s, lanes, dtype=None, index_dtype=torch.int32):
    index = m.randint(-1, s["M"], (s["B"], s["K"]), index_dtype)
    if dtype is None:
        return m.randn(lanes, s["M"], s["C"]), index
    rows, scale = vk.quantize_rows(m.randn(lanes, s["M"], s["C"]), dtype)
    return rows, index, scale


case("gather_tokens", "own bank", vk.gather_tokens, "B M C", "B K", make=lambda m, s: _bank(m, s, s["B"]))
case(
    "gather_tokens",
    "shared bank, int64, out_dtype",
    lambda bank, index: vk.gather_tokens(bank, index, out_dtype=torch.bfloat16),
    "1 M C", "B K",
    make=lambda m, s: _bank(m, s, 1, index_dtype=torch.int64),
)  # fmt: skip
for _dtype in (torch.int8, torch.float8_e4m3fn):
    case(
        "gather_tokens",
        f"{_dtype}".removeprefix("torch."),
        lambda bank, index, scale: vk.gather_tokens(bank, index, scale=scale),
        "B M C", "B K", "B M",
        make=lambda m, s, dtype=_dtype: _bank(m, s, s["B"], dtype),
    )  # fmt: skip
    case("quantize_rows", f"{_dtype}".removeprefix("torch."), lambda x, d=_dtype: vk.quantize_rows(x, d), "B M C")
case("quantize_rows", "two dimensions", vk.quantize_rows, "M C")
case("quantize_rows", "five dimensions", vk.quantize_rows, "B T H M C")
case(
    "scatter_add_tokens",
    "rows of another tensor",
    lambda src, index, bank: vk.scatter_add_tokens(src, index, bank.shape[1]),
    "B K C", "B K", "B M C",
    make=lambda m, s: (
        m.randn(s["B"], s["K"], s["C"]), m.randint(-1, s["M"], (s["B"], s["K"])), m.randn(s["B"], s["M"], s["C"]),
    ),
)  # fmt: skip
case(
    "scatter_add_tokens",
    "half as many rows, and fixed ones",
    lambda src, index: (vk.scatter_add_tokens(src, index, src.shape[1] // 2), vk.scatter_add_tokens(src, index, 40)),
    "B K C", "B K",
    make=lambda m, s: (m.randn(s["B"], s["K"], s["C"]), m.randint(-1, s["K"] // 2, (s["B"], s["K"]))),
)  # fmt: skip
case("select_tokens", "a quarter by norm", lambda x: vk.select_tokens(x, x.shape[1] // 4), "B N C")
case("select_tokens", "half by score", lambda x, s: vk.select_tokens(x, x.shape[1] // 2, score=s), "B N 5", "B N")
case("select_tokens", "all but two", lambda x: vk.select_tokens(x, x.shape[1] - 2), "B N 5", N=4)
case("select_tokens", "some", lambda x: vk.select_tokens(x, 4), "B N 5", N=6)
case("select_tokens", "all", lambda x: vk.select_tokens(x, x.shape[1]), "B N 5")
case(
    "topk_blocks",
    "some",
    lambda q, k: vk.topk_blocks(q, k, block_size=(4, 3), topk=2),
    "B Lq H D", "B Lk H D", Lk=6,
)  # fmt: skip
case(
    "topk_blocks",
    "a quarter",
    lambda q, k: vk.topk_blocks(q, k, block_size=(4, 2), topk=k.shape[1] // 4),
    "B Lq H 5", "B Lk H 5",
)  # fmt: skip

# --- linear attention ---

QKV = ("B L H 4", "B L H 4", "B L H 6")
for _map in ("relu", "elu1", "identity"):
    for _causal, _block in ((False, 1), (True, 1), (True, 4)):
        case(
            "linear_attention",
            f"{_map}{f', causal in blocks of {_block}' if _causal else ''}",
            lambda q, k, v, options=(_map, _causal, _block): vk.linear_attention(
                q,
                k,
                v,
                feature_map=options[0],
                causal=options[1],
                block_size=options[2],
                normalize=options[0] != "identity",
            ),
            *QKV,
        )
case(
    "linear_attention",
    "state, channels",
    lambda q, k, v, S, z: vk.linear_attention(
        q, k, v, causal=True, state=vk.LinearAttentionState(S, z), return_state=True
    ),
    "B L H D", "B L H D", "B L H E", "B H D E", "B H D",
    make=lambda m, s: (
        m.randn(s["B"], s["L"], s["H"], s["D"]), m.randn(s["B"], s["L"], s["H"], s["D"]),
        m.randn(s["B"], s["L"], s["H"], s["E"]), m.randn(s["B"], s["H"], s["D"], s["E"]),
        m.rand(s["B"], s["H"], s["D"]),
    ), D=1, E=1,
)  # fmt: skip
case(
    "linear_attention",
    "block of the size",
    lambda q, k, v: vk.linear_attention(q, k, v, causal=True, block_size=q.shape[1] // 2 + 1),
    *QKV,
)

# --- cross-attention ---

ATTENTION = ("B Lq H 4", "B Lk H 4", "B Lk H 6")


def _attention(*more):
    """Tensors of `ATTENTION`, and of `more` (functions of Make and sizes)."""

    def make(m, s):
        qkv = [m.randn(s["B"], s[length], s["H"], c) for length, c in (("Lq", 4), ("Lk", 4), ("Lk", 6))]
        return *qkv, *(f(m, s) for f in more)

    return make


def _cross(*names, **options):
    """A call of cross_attention whose tensors after q, k and v have names."""
    return lambda q, k, v, *rest: vk.cross_attention(q, k, v, **dict(zip(names, rest, strict=True)), **options)


def _blocks(m, s, heads=None, rows=4):
    return m.randint(-1, -(-s["Lk"] // 3), (s["B"], heads or s["H"], -(-s["Lq"] // rows), s["K"]))


def _sinks(q, k, v):
    return vk.cross_attention(q, k, v, num_sinks=k.shape[1] // 2, scale=0.3, return_lse=True)


def _q_times(m, s):
    return torch.arange(s["Lq"])


def _k_times(m, s):
    return torch.arange(s["Lk"], dtype=torch.float32).repeat(s["B"], 1) / 2


case("cross_attention", "plain, lse", _cross(return_lse=True), *ATTENTION)
case("cross_attention", "sinks of the size", _sinks, *ATTENTION)
case("cross_attention", "value channels", _cross(), "B Lq H 4", "B Lk H 4", "B Lk H E")
case(
    "cross_attention", "key_bias", _cross("key_bias"), *ATTENTION, "B Lk",
    make=_attention(lambda m, s: m.randn(s["B"], s["Lk"])),
)  # fmt: skip
case(
    "cross_attention", "key_bias a head", _cross("key_bias", return_lse=True), *ATTENTION, "B H Lk",
    make=_attention(lambda m, s: m.randn(s["B"], s["H"], s["Lk"])),
)  # fmt: skip
case(
    "cross_attention", "window, sinks", _cross("q_time", "k_time", window=(1.25, math.inf), num_sinks=1),
    *ATTENTION, "Lq", "B Lk", make=_attention(_q_times, _k_times), Lk=1,
)  # fmt: skip
case(
    "cross_attention", "blocks of one row", _cross("block_index", block_size=(1, 3), return_lse=True),
    *ATTENTION, "B H Lq K", make=_attention(lambda m, s: _blocks(m, s, rows=1)),
)  # fmt: skip
case(
    "cross_attention", "blocks", _cross("block_index", block_size=(4, 3), num_sinks=1), *ATTENTION, "B H Lq/4 K",
    make=_attention(_blocks), Lk=1,
)  # fmt: skip
case(
    "cross_attention", "blocks of all heads", _cross("block_index", block_size=(4, 3)), *ATTENTION, "B 1 Lq/4 K",
    make=_attention(lambda m, s: _blocks(m, s, heads=1)),
)  # fmt: skip
case(
    "cross_attention",
    "blocks found",
    lambda q, k, v: vk.cross_attention(
        q, k, v, block_index=vk.topk_blocks(q, k, block_size=(4, 3), topk=2), block_size=(4, 3)
    ),
    *ATTENTION, Lk=6,
)  # fmt: skip
case(
    "cross_attention", "all", _cross("key_bias", "q_time", "k_time", "block_index", window=(2, 1), num_sinks=1,
                                    block_size=(4, 3), scale=0.5, return_lse=True),
    *ATTENTION, "B Lk", "Lq", "B Lk", "B H Lq/4 K",
    make=_attention(lambda m, s: m.randn(s["B"], s["Lk"]), _q_times, _k_times, _blocks), Lk=1,
)  # fmt: skip
case(
    "merge_attention_states",
    "two",
    lambda a, b, c, d: vk.merge_attention_states([a, b], [c, d]),
    "B L H D", "B L H D", "B H L", "B H L",
)  # fmt: skip

# --- modules ---


class _Carry(torch.nn.Module):
    """Linear attention to a state that an earlier call returned."""

    def __init__(self):
        super().__init__()
        self.attention = vk.LinearAttention(8, 2, causal=True, block_size=2, feature_map="elu1")

    def forward(self, x, y):
        return self.attention(y, self.attention(x, None, True)[1], True)


class _Read(torch.nn.Module):
    """A memory read with proportional attention, as an encoder and a DiT do."""

    def __init__(self):
        super().__init__()
        self.attention = vk.MemoryCrossAttention(8, 2, memory_dim=6, qk_norm="rms_norm")
        torch.nn.init.ones_(self.attention.gate)

    def forward(self, x, memory):
        plan = vk.match_tokens(memory, memory.shape[1] // 2)
        tokens, size = vk.merge_tokens(memory, plan)
        return self.attention(x, tokens, key_bias=size.log())


def _module(cls, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(*args, **options)


case("LinearAttention", "relu", _module(vk.LinearAttention, 8, 2), "B L 8")
case("LinearAttention", "causal, state", _module(_Carry), "B L 8", "B Ly 8")
case("MemoryCrossAttention", "plain", _module(vk.MemoryCrossAttention, 8, 2, memory_dim=6), "B Lq 8", "B M 6")
case("MemoryCrossAttention", "of merged tokens", _module(_Read), "B Lq 8", "B M 6", B=1, M=4)
