"""Measures the cost of a call on tiny tensors, in µs, compared with plain PyTorch or with another commit.

    pytest benchmarks/overhead.py                   each public function, alternating with plain torch
    (pytest-benchmark) python benchmarks/overhead.py --base REV        alternating with the package of a git commit,
    which is built first python benchmarks/overhead.py --base FOLDER     … of a checkout that is built already

One thread, B=1, N=16, C=8 (unless given below: the smoke shape and first baseline of a function's benchmark), float32
on the CPU. A round measures one contender right after the other, each as the best of some repeats; the median over the
rounds is shown. Ratios are computed within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # after the folder of --serve

from benchmarks import cases  # noqa: E402, F401  (register themselves)
from benchmarks.registry import BENCHMARKS, Benchmark  # noqa: E402

N, C = 16, 8


def calls() -> dict[str, tuple[Callable, Callable, torch.Tensor | None]]:
    """For each public function: a call of it, the same in plain PyTorch, and the tensor with a gradient, if any."""
    import vidmem_kernels as vk

    x, q, lse = torch.randn(1, N, C), torch.randn(1, N, 1, C), torch.randn(1, 1, N)
    index = torch.randint(0, N, (1, N))
    wide = index.unsqueeze(2).expand(1, N, C)
    plan = vk.match_tokens(x, 4)
    y = torch.randn(1, plan.kept.shape[1], C)
    rows = plan.assignment.long().unsqueeze(2).expand(1, N, C)

    def match(x):
        m = F.normalize(x, dim=2)
        score, to = (m[:, ::2] @ m[:, 1::2].mT).max(2)
        return score.argsort(dim=1, descending=True)[:, :4], to

    def neighbors(x):
        m = F.normalize(x, dim=2).view(1, 4, 4, C)
        return (m[:, 1:] * m[:, :-1]).sum(3).amax(), (m[:, :, 1:] * m[:, :, :-1]).sum(3).topk(2)

    def merge(x):
        return x.new_zeros(y.shape).scatter_reduce(1, rows, x, "mean", include_self=False)

    def quantize(x):
        scale = x.abs().amax(2) / 127
        return (x / scale.unsqueeze(2)).round().to(torch.int8), scale

    def select(x):
        kept = x.norm(dim=2).topk(4).indices.sort().values
        return x.gather(1, kept.unsqueeze(2).expand(1, 4, C))

    def linear(q):
        p = q.relu()
        state, total = torch.einsum("blhd,blhe->bhde", p, q), p.sum(1)
        return torch.einsum("blhd,bhde->blhe", p, state) / (torch.einsum("blhd,bhd->blh", p, total)[..., None] + 1e-10)

    def attention(q):
        return F.scaled_dot_product_attention(q.mT, q.mT, q.mT).mT

    def states(q):
        both = torch.stack([lse, lse])
        weight = both.softmax(0).mT.unsqueeze(4).transpose(2, 3).reshape(2, 1, N, 1, 1)
        return (weight * torch.stack([q, q])).sum(0)

    def pooled(q):
        means = q.view(1, 4, 4, C).mean(2)
        return (means @ means.mT).topk(2).indices

    table = {
        "gather_tokens": (lambda x: vk.gather_tokens(x, index), lambda x: x.gather(1, wide), x),
        "scatter_add_tokens": (
            lambda x: vk.scatter_add_tokens(x, index, N), lambda x: torch.zeros(1, N, C).scatter_add(1, wide, x), x
        ),
        "unmerge_tokens": (lambda y: vk.unmerge_tokens(y, plan), lambda y: y.gather(1, rows), y),
        "merge_tokens": (lambda x: vk.merge_tokens(x, plan).tokens, merge, x),
        "match_tokens": (lambda _: vk.match_tokens(x, 4), lambda _: match(x), None),
        "match_neighbors": (lambda _: vk.match_neighbors(x, 4, grid=(1, 4, 4)), lambda _: neighbors(x), None),
        "quantize_rows": (lambda x: vk.quantize_rows(x).scale, lambda x: quantize(x)[1], x),
        "select_tokens": (lambda x: vk.select_tokens(x, 4).tokens, select, x),
        "topk_blocks": (lambda _: vk.topk_blocks(q, q, block_size=(4, 4), topk=2), lambda _: pooled(q), None),
        "linear_attention": (lambda q: vk.linear_attention(q, q, q), linear, q),
        "cross_attention": (lambda q: vk.cross_attention(q, q, q), attention, q),
        "merge_attention_states": (lambda q: vk.merge_attention_states([q, q], [lse, lse])[0], states, q),
    }  # fmt: skip
    for bench in BENCHMARKS.values():
        if bench.covers not in table and hasattr(vk, bench.covers):  # the other commit may lack it
            table[bench.covers] = of_benchmark(bench)
    return table


def of_benchmark(bench: Benchmark) -> tuple[Callable, Callable, torch.Tensor | None]:
    """The entry of `calls` for a function, from its benchmark."""
    s = bench.shapes["smoke"].sizes
    given = bench.make(s, torch.float32, "cpu", torch.Generator().manual_seed(0))
    first = bench.differentiable[:1]

    def on(function: Callable) -> Callable:
        return lambda tensor: function(given | dict.fromkeys(first, tensor))

    plain = bench.baselines("cpu", compiled=False)[0]
    ours = on(lambda x: next(iter(pytree.tree_leaves(bench.call(x, s, None)))))
    return ours, on(lambda x: plain.function(bench, x, s)), given[first[0]] if first else None


def steps(call: Callable, tensor: torch.Tensor | None) -> dict[str, Callable[[], None]]:
    """The steps to time: the call under no_grad and, with a gradient, forward and backward."""

    def forward():
        with torch.no_grad():
            call(tensor)

    found = {"no_grad": forward}
    if tensor is not None:
        leaf = tensor.clone().requires_grad_()
        grad = torch.ones_like(call(leaf))

        def both():
            torch.autograd.backward(call(leaf), grad)
            leaf.grad = None

        found["forward + backward"] = both
    return found


def micros(step: Callable[[], None], seconds: float = 0.01, repeats: int = 5) -> float:
    """The best of some repeats, in µs per call."""
    step()
    once = max(timeit.timeit(step, number=10) / 10, 1e-7)
    number = max(10, int(seconds / once))
    return min(timeit.repeat(step, number=number, repeat=repeats)) / number * 1e6


# --- beside plain torch ---

CASES = [(name, mode) for name, (*_, tensor) in calls().items() for mode in ("no_grad", "forward + backward")
         if mode == "no_grad" or tensor is not None]  # fmt: skip


@pytest.mark.parametrize("name, mode", CASES)
def test_beside_torch(benchmark, name, mode):
    torch.set_num_threads(1)
    ours, plain, tensor = calls()[name]
    torch_times = []
    other = steps(plain, tensor)[mode]
    benchmark.group = f"{name}, {mode}"
    benchmark.pedantic(
        steps(ours, tensor)[mode],
        setup=lambda: torch_times.append(micros(other, seconds=0.002, repeats=1)),
        rounds=100,
        warmup_rounds=5,
    )
    benchmark.extra_info["plain torch, us"] = round(statistics.median(torch_times), 2)


# --- beside another commit ---


def serve() -> None:
    """Measures what each input line asks for."""
    torch.set_num_threads(1)
    table = {
        f"{name}, {mode}": step
        for name, (ours, _, tensor) in calls().items()
        for mode, step in steps(ours, tensor).items()
    }
    print(json.dumps(list(table)), flush=True)
    for line in sys.stdin:
        print(micros(table[line.strip()]), flush=True)


class Package:
    """A process that measures the package in a folder."""

    def __init__(self, folder: Path):
        environment = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)
        self.names: list[str] = json.loads(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a measuring process failed, its output is above")
        return line

    def micros(self, name: str) -> float:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._answer())


def checkout(revision: str, folder: Path) -> Path:
    """Builds the package of a commit in `folder`."""
    archive = subprocess.run(["git", "-C", ROOT, "archive", revision], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, check=True)
    return folder


def compare(base: Path, rounds: int) -> dict[str, dict[str, float]]:
    ours, theirs = Package(ROOT), Package(base)
    figures = {}
    for name in [name for name in ours.names if name in theirs.names]:
        pairs = []
        for i in range(rounds):
            order = (ours, theirs) if i % 2 else (theirs, ours)
            found = {package: package.micros(name) for package in order}
            pairs.append((found[ours], found[theirs]))
        figures[name] = {
            "us": statistics.median(a for a, _ in pairs),
            "base_us": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(a / b for a, b in pairs),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="REV|FOLDER", help="commit or built checkout to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.base is None:
        parser.error("give --base, or call pytest benchmarks/overhead.py")
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(options.base).resolve()
        if not base.is_dir():
            base = checkout(options.base, Path(temporary))
        figures = compare(base, options.rounds)
    for name, row in figures.items():
        print(f"{name:45s} {row['us']:7.1f} µs  {row['base_us']:7.1f} µs at base  ratio {row['ratio']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
