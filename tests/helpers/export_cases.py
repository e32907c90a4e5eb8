"""The table of tests/kernels/test_export.py: every public call, and calls that only tracing tells from those.

What is particular here is a number that is computed of sizes, a call of several functions, or a module.
"""

import torch

import vidmem_kernels as vk
from vidmem_kernels.cross_attn.samples import ATTENTION, attend, attention_tensors, blocks_of
from vidmem_kernels.linear_attn.samples import QKV
from vidmem_kernels.linear_attn.samples import attend as attend_linear
from vidmem_kernels.testing import named_call, public_calls

CASES = public_calls()
# They compute nothing, or live on files.
NOT_TRACED = {
    "BackendError", "Choice", "LinearAttentionState", "MemoryBank", "MemoryFileError", "MergeResult", "QuantizedRows",
    "Rotary", "SelectResult", "TileOrder", "explain", "recording", "use_backend",
}  # fmt: skip


def case(*args, **options):
    CASES.append(named_call(*args, **options))


# --- token merging ---


def _half(x, **options):
    return vk.match_tokens(x, x.shape[1] // 2, **options)


def _merge(x):
    plan = _half(x)
    tokens, size = vk.merge_tokens(x, plan)
    return vk.unmerge_tokens(tokens, plan), tokens, size


case("match_tokens", "a third, channels", lambda x: vk.match_tokens(x, x.shape[1] // 3), "B N C", C=1)
case("match_tokens", "3/10", lambda x: vk.match_tokens(x, x.shape[1] * 3 // 10), "B N 5")
case("match_tokens", "some", lambda x: vk.match_tokens(x, 3), "B N 5", N=6)
case("match_tokens", "none", lambda x: vk.match_tokens(x, 0), "B N 5")
case("match_tokens", "of a half", lambda x: _half(vk.merge_tokens(x, _half(x)).tokens), "B N 5", N=4)
case(
    "match_tokens",
    "grid of the sizes",
    lambda x: vk.match_tokens(x.flatten(1, 3), x.shape[1] * x.shape[2] * x.shape[3] // 4, grid=x.shape[1:4]),
    "B T H W 5", T=2, H=2, W=2,
)  # fmt: skip
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
    "MergePlan",
    "from_assignment, rows of another tensor, merged",
    lambda a, x, y: vk.merge_tokens(x, vk.MergePlan.from_assignment(a, y.shape[0])),
    "B N", "B N 5", "R",
    make=lambda m, s: (
        m.randint(0, s["R"], (s["B"], s["N"]), torch.int64), m.randn(s["B"], s["N"], 5), m.randn(s["R"]),
    ), R=1,
)  # fmt: skip

# --- sparse gathering ---


case(
    "gather_tokens",
    "shared bank, int64, out_dtype",
    lambda bank, index: vk.gather_tokens(bank, index, out_dtype=torch.bfloat16),
    "1 M C", "B K",
    make=lambda m, s: (m.randn(1, s["M"], s["C"]), m.randint(-1, s["M"], (s["B"], s["K"]), torch.int64)),
)  # fmt: skip
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
case("select_tokens", "all but two", lambda x: vk.select_tokens(x, x.shape[1] - 2), "B N 5", N=4)
case("select_tokens", "all", lambda x: vk.select_tokens(x, x.shape[1]), "B N 5")
case(
    "topk_blocks",
    "a quarter",
    lambda q, k: vk.topk_blocks(q, k, block_size=(4, 2), topk=k.shape[1] // 4),
    "B Lq H 5", "B Lk H 5",
)  # fmt: skip

# --- linear attention ---

for _map in ("relu", "elu1", "identity"):
    case("linear_attention", f"{_map}, causal in blocks of 1", attend_linear(_map, 1), *QKV)
case(
    "linear_attention",
    "block of the size",
    lambda q, k, v: vk.linear_attention(q, k, v, causal=True, block_size=q.shape[1] // 2 + 1),
    *QKV,
)

# --- cross-attention ---


def _sinks(q, k, v):
    return vk.cross_attention(q, k, v, num_sinks=k.shape[1] // 2, scale=0.3, return_lse=True)


case("cross_attention", "sinks of the size", _sinks, *ATTENTION)
case("cross_attention", "value channels", attend(), "B Lq H 4", "B Lk H 4", "B Lk H E")
case(
    "cross_attention", "blocks of one row", attend("block_index", block_size=(1, 3), return_lse=True),
    *ATTENTION, "B H Lq K", make=attention_tensors(lambda m, s: blocks_of(m, s, rows=1)),
)  # fmt: skip
case(
    "cross_attention",
    "blocks found",
    lambda q, k, v: vk.cross_attention(
        q, k, v, block_index=vk.topk_blocks(q, k, block_size=(4, 3), topk=2), block_size=(4, 3)
    ),
    *ATTENTION, Lk=6,
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

# --- tiles ---


case("tile_order", "of the sizes", lambda x: vk.tile_order(x.shape, (2, 3, 2), device=x.device), "T H W")
case(
    "tile_order",
    "there and back",
    lambda x: x.flatten(1, 3)[:, (o := vk.tile_order(x.shape[1:4], (2, 3, 2), device=x.device)).order][:, o.inverse],
    "B T H W 3", T=2, H=2, W=2,
)  # fmt: skip

# --- rotary embedding ---


case("rotary", "three axes", lambda p: vk.rotary(p, (4, 2, 6)), "B N 3")
case("rotary", "shared, integers", lambda p: vk.rotary(p.long(), (4, 2), 256.0), "N 2")
case(
    "apply_rotary",
    "of a position each",
    lambda x, p: vk.apply_rotary(x, vk.rotary(p, (4, 2))),
    "B L H 6", "B L 2",
)  # fmt: skip
