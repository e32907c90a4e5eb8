"""The lists of tiles that Triton's kernels of cross-attention walk, against who sees whom in drawn calls."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vidmem_kernels import _dispatch
from vidmem_kernels._op import OPS
from vidmem_kernels.cross_attn.times import window_bounds

pytest.importorskip("triton")
from vidmem_kernels.cross_attn import triton_plan  # noqa: E402

BLOCK = {"block_m": 16, "block_n": 16}
INF = math.inf


@pytest.fixture(autouse=True)
def available(device):
    if reason := _dispatch.unavailable(OPS["cross_attention"], "triton", device):
        pytest.skip(reason=reason)


def drawn_times(rng, batch, count):
    dtype = rng.choice([torch.int32, torch.int64, torch.float32, torch.float64])
    times = torch.randint(-30, 30, rng.choice([(count,), (batch, count), (1, count)])).to(dtype)
    if rng.random() < 0.6:
        times = times.sort(-1).values
    if rng.random() < 0.3:
        times[..., count // 3 :] += 1000  # a gap
    if dtype.is_floating_point and rng.random() < 0.5:
        for special in (math.nan, INF, -INF):
            times[torch.rand(times.shape) < 0.1] = special
    return times


def drawn(seed, kind):
    """A Visibility, and (lanes of batch, heads, queries, keys): seen in its window, and listed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads = rng.randint(1, 2), rng.randint(1, 2)
    queries, keys = rng.randint(1, 45), rng.randint(1, 70)
    sinks = rng.choice([0, 0, rng.randint(0, keys)])
    size_q, size_k, times, window, index = queries, keys, None, None, None
    seen, listed = (torch.ones(batch, heads, queries, keys, dtype=torch.bool) for _ in range(2))
    if "window" in kind:
        times = drawn_times(rng, batch, queries), drawn_times(rng, batch, keys)
        window = [rng.choice([0.0, 2.5, float(rng.randint(0, 20)), 2.0**63, 1e300, INF]) for _ in range(2)]
        first, last, at = window_bounds(*times, window)
        seen = ((first[:, :, None] <= at[:, None]) & (at[:, None] <= last[:, :, None]))[:, None].expand_as(seen)
    if "blocks" in kind:
        size_q, size_k = (min(n, rng.randint(1, 50)) for n in (queries, keys))
        rows, blocks = -(-queries // size_q), -(-keys // size_k)
        topk = rng.choice([0, 1, 3, 70])
        index = torch.randint(-1, blocks, (batch, rng.choice([1, heads]), rows, topk))
        index = index.to(rng.choice([torch.int32, torch.int64]))
        row, column = torch.arange(queries) // size_q, torch.arange(keys) // size_k
        listed = (index[:, :, row, None, :] == column[:, None]).any(-1).expand_as(listed)
    arguments = (queries, keys, sinks, times, window, index, size_q, size_k)
    return arguments, seen, listed


def tiles_of(length, size, block):
    """Rows of every tile, each in one block of `size`."""
    found = []
    for begin in range(0, length, size):
        stop = min(begin + size, length)
        found += [range(s, max(s, min(s + block, stop))) for s in range(begin, begin + size, block)]
    return found


@pytest.mark.parametrize("kind", ["window", "blocks", "window blocks"])
@pytest.mark.parametrize("by_key", [False, True])
def test_lists(kind, by_key, device):
    for seed in range(5):
        check(*drawn(seed, kind), by_key, device, f"{kind} {seed}")


def check(arguments, seen, listed, by_key, device, what):
    queries, keys, sinks, times, window, index, size_q, size_k = arguments
    times, index = ([t.to(device) for t in times] if times else None), (index if index is None else index.to(device))
    visibility = triton_plan.Visibility(queries, keys, sinks, times, window, index, size_q, size_k)
    found = visibility.arguments(**BLOCK, by_key=by_key)
    ranges, entries = found["ranges"].tolist(), found["entries"].tolist()
    q_tiles, k_tiles = tiles_of(queries, size_q, 16), tiles_of(keys, size_k, 16)
    rows, others = (k_tiles, q_tiles) if by_key else (q_tiles, k_tiles)
    sink = torch.arange(keys) < sinks
    used = set()
    for b in range(seen.shape[0]):
        for h in range(seen.shape[1]):
            lane = b * found["tiles_stride_b"] + h * found["tiles_stride_h"]
            for r, row in enumerate(rows):
                begin, middle, end = ranges[lane * len(rows) + r]
                listing = entries[begin:end]
                assert begin <= middle <= end <= len(entries)
                assert len({e >> 1 for e in listing}) == len(listing), f"{what}: a tile twice"
                used.add((lane, r, begin, end))
                held = {}
                for place, entry in enumerate(listing):
                    held[entry >> 1] = (begin + place < middle, entry & 1)
                for o, other in enumerate(others):
                    q_rows, k_rows = (list(other), list(row)) if by_key else (list(row), list(other))
                    if not q_rows or not k_rows:
                        assert o not in held, f"{what}: an empty tile"
                        continue
                    pairs = (seen & listed)[b, h][q_rows][:, k_rows] | sink[k_rows]
                    if pairs.any():
                        assert o in held, f"{what}: tile {o} is missing from row {r}"
                    if o in held:
                        full, is_listed = held[o]
                        assert not full or (pairs.all() and len(k_rows) == 16), f"{what}: hidden keys without a mask"
                        assert is_listed == int(listed[b, h, q_rows[0], k_rows[0]]), what
                        if index is not None:
                            assert is_listed or sink[k_rows].any(), f"{what}: tile {o} is not listed"
    spans = sorted({(begin, end) for _, _, begin, end in used if begin < end})
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)), f"{what}: lists overlap"


def test_a_sorted_window_needs_few_tiles(device):
    """Of times in order, as frames are, only the tiles that the window reaches, and masks at its two edges alone."""
    times = torch.arange(240, device=device) // 8
    visibility = triton_plan.Visibility(240, 240, 0, (times, times), [6.0, 0.0], None, 240, 240)
    for by_key in (False, True):
        ranges = visibility.arguments(**BLOCK, by_key=by_key)["ranges"]
        count, masked = (ranges[:, 2] - ranges[:, 0]), (ranges[:, 2] - ranges[:, 1])
        assert count.max() == 4 and masked.max() == 2


class Watched(TorchDispatchMode):
    """Names of the operators of torch that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


class Counted:
    """In place of a kernel: counts its launches."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        self.launches += 1
        return lambda *args, **options: None


def test_planning_is_two_launches(device, monkeypatch):
    """Three where blocks and a window are listed by key; torch does no more than get memory."""
    times = torch.arange(64, device=device)
    index = torch.zeros(1, 1, 4, 2, dtype=torch.int64, device=device)
    for pair, blocks, by_key, count in (
        ((times, times), None, False, 2), ((times, times), None, True, 2), (None, index, False, 1),
        (None, index, True, 2), ((times, times), index, False, 2), ((times, times), index, True, 3),
    ):  # fmt: skip
        size = 64 if blocks is None else 16
        visibility = triton_plan.Visibility(64, 64, 0, pair, [1.0, 1.0], blocks, size, size)
        counted = Counted()
        for name in ("_attention_times_kernel", "_window_tiles_kernel", "_block_tiles_kernel", "_block_queries_kernel"):
            monkeypatch.setattr(triton_plan, name, counted)
        with Watched() as watched:
            visibility.arguments(**BLOCK, by_key=by_key)
        assert counted.launches == count
        assert watched.names <= {"aten.empty.memory_format", "aten.view.default", "aten.unsqueeze.default"}
