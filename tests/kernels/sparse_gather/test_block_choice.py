"""topk_blocks of blocks of their own lengths, with a mask of keys, blocks that are always there, in causal order."""

import random

import pytest
import torch
from bank_helpers import ids, refuses
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from vidmem_kernels import topk_blocks
from vidmem_kernels.sparse_gather import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn_sizes(draw, length, most):
    """Lengths of blocks that make up `length` rows; some are empty."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(draw.randint(0, most), length - sum(sizes)))
    return sizes + [0] * draw.randint(0, 1)


def whole(length, size):
    return [min(size, length - start) for start in range(0, length, size)]


def by_loops(q, k, q_sizes, k_sizes, topk, key_mask, always, causal):
    """Everything as the docstring says it, block by block, in Python's numbers."""

    def rows_of(sizes):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def mean(x, rows):
        return [sum(x[r][d] for r in rows) / max(1, len(rows)) for d in range(len(x[0]) if x else 0)]

    batch = max(q.shape[0], k.shape[0]) if 0 not in (q.shape[0], k.shape[0]) else 0
    blocks_q, blocks_k = rows_of(q_sizes), rows_of(k_sizes)
    found = torch.empty(batch, q.shape[2], len(q_sizes), topk, dtype=torch.int32)
    for b in range(batch):
        shown = [True] * k.shape[1] if key_mask is None else key_mask[b % key_mask.shape[0]].tolist()
        kept = [[r for r in rows if shown[r]] for rows in blocks_k]
        for h in range(q.shape[2]):
            queries, keys = q[b % q.shape[0], :, h].tolist(), k[b % k.shape[0], :, h].tolist()
            means = [mean(keys, rows) for rows in kept]
            for i, rows in enumerate(blocks_q):
                query = mean(queries, rows)
                own = None
                if causal:
                    last = rows.stop - 1 + k.shape[1] - q.shape[1]
                    own = next((j for j, r in enumerate(blocks_k) if r.stop > last), len(blocks_k) - 1)
                can = [j for j, r in enumerate(kept) if r and (own is None or j <= own)]
                wanted = [j for j in can if j == own] + [j for j in can if j != own and always(i, j)]
                score = {j: sum(x * y for x, y in zip(query, means[j], strict=True)) for j in can}
                rest = sorted((j for j in can if j not in wanted), key=lambda j: (-score[j], j))
                found[b, h, i] = torch.tensor(([*wanted, *rest] + [-1] * topk)[:topk])
    return found


def case(seed, dtype):
    """A drawn call, (q, k, options), and what must come of it. All means and scores are exact: ties are ties."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    block = draw.randint(1, 6), draw.randint(1, 6)
    batches = draw.choice([(1, 1), (2, 2), (1, 2), (2, 1), (3, 3)])
    lq, heads, size = draw.randint(0, 14), draw.randint(1, 2), draw.randint(1, 3)
    causal = draw.random() < 0.4
    lk = lq + draw.choice([0, 0, draw.randint(0, 9)]) if causal else draw.randint(0, 26)
    q, k = ((torch.randint(-2, 3, (b, n, heads, size)) * 60).to(dtype) for b, n in zip(batches, (lq, lk), strict=True))
    options = {"block_size": block, "causal": causal}
    q_sizes, k_sizes = whole(lq, block[0]), whole(lk, block[1])
    if draw.random() < 0.6:
        q_sizes, k_sizes = drawn_sizes(draw, lq, block[0]), drawn_sizes(draw, lk, block[1])
        kind = draw.choice([torch.int32, torch.int64])
        options["block_sizes"] = tuple(torch.tensor(s, dtype=kind) for s in (q_sizes, k_sizes))
        if lq == lk and block[0] == block[1] and draw.random() < 0.7:
            q_sizes, options["block_sizes"] = k_sizes, options["block_sizes"][1]
    topk = options["topk"] = draw.randint(0, len(k_sizes))
    mask = None
    if draw.random() < 0.5:
        mask = torch.rand(draw.choice([1, max(batches)]), lk) < draw.choice([0.2, 0.7])
        options["key_mask"] = mask
        if mask.shape[0] in (1, k.shape[0]):
            k = k.masked_fill(~mask.view(*mask.shape, 1, 1), torch.nan)
    always = lambda i, j: False  # noqa: E731
    kind = draw.choice(["none", "none", "list", "tensor", "mask"])
    if kind in ("list", "tensor"):
        blocks = draw.sample(range(len(k_sizes)), draw.randint(0, topk))
        always = lambda i, j: j in blocks  # noqa: E731
        options["always"] = blocks if kind == "list" else torch.tensor(blocks, dtype=torch.int64)
    elif kind == "mask":
        grid = torch.rand(len(q_sizes), len(k_sizes)) < 0.3
        always = lambda i, j: bool(grid[i, j])  # noqa: E731
        options["always"] = grid
    return q, k, options, (q_sizes, k_sizes, topk, mask, always, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_by_loops(dtype, device):
    for seed in range(60):
        q, k, options, about = case(seed, dtype)
        on = lambda v: v.to(device) if isinstance(v, torch.Tensor) else v  # noqa: E731
        moved = torch.utils._pytree.tree_map(on, options)
        got = topk_blocks(q.to(device), k.to(device), **moved)
        assert got.dtype == torch.int32
        assert torch.equal(got.cpu(), by_loops(q, k, *about)), (seed, options)


def test_plain_calls_say_the_same(device):
    """Options that say what is so anyway change no block."""
    draw = random.Random(5)
    for _ in range(20):
        block, length = draw.randint(1, 7), draw.randint(1, 40)
        q, k = torch.randn(2, draw.randint(1, 30), 2, 8, device=device), torch.randn(2, length, 2, 8, device=device)
        options = {"block_size": (draw.randint(1, 5), block), "topk": draw.randint(0, -(-length // block))}
        plain = topk_blocks(q, k, **options)
        assert torch.equal(topk_blocks(q, k, key_mask=torch.ones(1, length, device=device) > 0, **options), plain)
        assert torch.equal(topk_blocks(q, k, always=(), **options), plain)
        sizes = [
            torch.tensor(whole(n, b), device=device)
            for n, b in zip((q.shape[1], length), options["block_size"], strict=True)
        ]
        assert torch.equal(topk_blocks(q, k, block_sizes=sizes, **options), plain)
        one = topk_blocks(q[:1], k, **options)
        assert torch.equal(one, topk_blocks(q[:1].expand(2, -1, -1, -1), k, **options))


def strided(x):
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def test_strided_and_backends():
    for seed in range(20):
        q, k, options, _ = case(seed, torch.float32)
        plain = topk_blocks(q, k, **options)
        if "key_mask" in options:
            options["key_mask"] = options["key_mask"].T.contiguous().T
        assert torch.equal(topk_blocks(strided(q), strided(k), **options), plain)
        for backend in ("auto", "cpu", "reference"):
            assert torch.equal(topk_blocks(q, k, backend=backend, **options), plain)


def test_one_graph_for_all_sizes():
    def call(q, k, sizes, mask, always):
        options = {"block_size": (4, 4), "block_sizes": sizes, "key_mask": mask, "always": always}
        return topk_blocks(q, k, topk=3, **options), topk_blocks(q, k, topk=2, causal=True, **options)

    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for batch, heads, sizes in ((2, 5, [4, 3, 4, 2, 1, 4]), (3, 2, [1, 4, 3, 3, 2]), (5, 7, [2, 2, 2, 4, 4, 1, 3, 2])):
        length, blocks = sum(sizes), len(sizes)
        q, k = torch.randn(batch, length, heads, 9), torch.randn(batch, length, heads, 9)
        given = torch.tensor(sizes), torch.rand(batch, length) < 0.7, torch.rand(blocks, blocks) < 0.3
        for a, b in zip(compiled(q, k, *given), call(q, k, *given), strict=True):
            assert torch.equal(a, b)
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_under_vmap():
    q, k = torch.randn(3, 2, 7, 2, 4), torch.randn(3, 2, 9, 2, 4)
    mask = torch.rand(3, 2, 9) < 0.6

    def call(q, k, mask):
        options = {"block_size": (3, 2), "topk": 3, "key_mask": mask, "always": [1]}
        return torch.stack([topk_blocks(q, k, **options), topk_blocks(q, k, causal=True, **options)])

    mapped = torch.vmap(call)(q, k, mask)
    assert torch.equal(mapped, torch.stack([call(*each) for each in zip(q, k, mask, strict=True)]))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_causal_scores_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(reference, "_SCORES", 4096)
    q = torch.randn(2, 500, 3, 4)
    with Largest() as seen:
        found = reference.topk_blocks_causal(q, q, torch.arange(500)[None], torch.ones(1, 500, dtype=torch.bool), 5)
    assert seen.elements < 2 * 3 * 500 * 500 / 8
    monkeypatch.undo()
    assert torch.equal(found, topk_by_one_product(q, 5))


def topk_by_one_product(q, topk):
    scores = torch.einsum("bihd,bjhd->bhij", q, q).masked_fill(
        ~torch.ones(500, 500, dtype=torch.bool).tril(), -torch.inf
    )
    found = scores.sort(dim=3, descending=True, stable=True)
    return found.indices[..., :topk].masked_fill(found.values[..., :topk] == -torch.inf, -1).int()


def test_scores_that_are_no_numbers():
    """NaN counts as -inf, which is still before a block that is not there."""
    for dtype in (torch.float32, torch.float64):
        k = torch.tensor([torch.nan, 1.0, 0.0, -torch.inf, 5.0, 2.0], dtype=dtype).view(1, 6, 1, 1)
        q, mask = torch.ones_like(k), torch.tensor([[True, True, False, True, False, True]])
        options = {"block_size": (1, 1), "key_mask": mask}
        assert topk_blocks(q, k, topk=6, **options)[0, 0, 0].tolist() == [5, 1, 0, 3, -1, -1]
        assert topk_blocks(q, k, topk=6, causal=True, **options)[0, 0, 3].tolist() == [3, 1, 0, -1, -1, -1]


def test_refuses():
    q, k, name = torch.zeros(2, 7, 3, 4), torch.zeros(2, 10, 3, 4), "topk_blocks: "

    def call(error, message, q=q, k=k, **options):
        refuses(error, name + message, topk_blocks, q, k, **{"block_size": (4, 4), "topk": 2, **options})

    call(ValueError, "q and k must have the same B, got 2 and 3", k=torch.zeros(3, 10, 3, 4))
    call(TypeError, "block_sizes must be a tensor or a pair of tensors, got int", block_sizes=4)
    one, two, many = torch.tensor([4, 3]), torch.tensor([4, 4, 2]), torch.tensor([4, 4, 4])
    call(TypeError, "block_sizes must be a tensor or a pair of tensors, got tuple", block_sizes=(one, two, two))
    call(TypeError, "block_sizes of k must be a tensor, got list", block_sizes=(one, [4, 4, 2]))
    call(TypeError, "block_sizes of k must be int32 or int64, got float32", block_sizes=(one, two.float()))
    call(ValueError, "block_sizes of q must have shape (blocks), got (1, 2)", block_sizes=(one[None], two))
    message = "block_sizes of k must cover all 10 rows by blocks of at most 4 rows, got 2 blocks"
    call(ValueError, message, block_sizes=(one, one))
    call(IndexError, "the sum of block_sizes of k must be in [10, 10], got 12", block_sizes=(one, many))
    call(IndexError, "block_sizes of k must be in [0, 4], got 5", block_sizes=(one, torch.tensor([5, 4, 1])))
    call(IndexError, "block_sizes of k must be in [0, 4], got -1", block_sizes=(one, torch.tensor([4, -1, 4, 3])))
    call(ValueError, "topk must be in [0, 3], got 4", topk=4, block_sizes=(one, two))
    call(TypeError, "key_mask must be bool, got float32", key_mask=torch.ones(2, 10))
    call(ValueError, "key_mask must have shape (B|1, Lk), got (10,)", key_mask=torch.ones(10, dtype=torch.bool))
    call(ValueError, "k and key_mask must have the same Lk, got 10 and 7", key_mask=torch.ones(2, 7) > 0)
    call(ValueError, "key_mask must have batch 1 or that of q and k, got 2 and 3", key_mask=torch.ones(3, 10) > 0)
    call(TypeError, "always must be block numbers or a bool mask, got int", always=1)
    call(ValueError, "always[1] must be in [0, 2], got 3", always=(1, 3))
    call(TypeError, "always[0] must be an int, got float", always=(1.0,))
    call(ValueError, "the number of blocks in always must be in [0, 2], got 3", always=(0, 1, 2))
    call(IndexError, "always must be in [0, 2], got 3", always=torch.tensor([3]))
    call(TypeError, "always must be int32 or int64, got float32", always=torch.tensor([3.0]))
    message = "always must have shape (blocks of q, blocks of k), got (2, 3) and (3, 3)"
    call(ValueError, message, always=torch.ones(3, 3) > 0)
    call(TypeError, "causal must be a bool, got int", causal=1)
    call(ValueError, "causal requires at least as many keys as queries, got 7 and 10", q=k, k=q, causal=True)
