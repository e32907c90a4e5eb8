"""Benchmarks for tests of the suite: alternatives, and calls of ours, that hang, fail, die or are wrong."""

import os
import subprocess
import time

import torch

import vidmem_kernels
from benchmarks.registry import Benchmark, Work, baseline, benchmark, randn
from benchmarks.shapes import Shape

SHAPES = {"smoke": Shape({"M": 40, "C": 8, "K": 30}, "for tests")}


def forever():
    """Hangs as a compiler does: in a process that was started, too."""
    subprocess.Popen(["sleep", "313.131"])
    while True:
        time.sleep(0.1)


@benchmark("suite_double", covers="gather_tokens", shapes=SHAPES)
class Double(Benchmark):
    def make(self, s, dtype, device, rng):
        index = torch.arange(s["K"], dtype=torch.int32, device=device).unsqueeze(0)
        return {"x": randn(rng, dtype, 1, s["M"], s["C"]), "index": index}

    def call(self, x, s, backend):
        return 2 * vidmem_kernels.gather_tokens(x["x"], x["index"], backend=backend)

    def work(self, s, itemsize):
        return Work(2 * s["K"] * s["C"] * itemsize)

    @baseline("add")
    def add(self, x, s):
        rows = x["x"][:, : s["K"]]
        return rows + rows

    @baseline("dies")
    def dies(self, x, s):
        os._exit(3)

    @baseline("hangs")
    def hangs(self, x, s):
        forever()

    @baseline("raises")
    def raises(self, x, s):
        raise RuntimeError("no such thing")

    @baseline("square, wrong")
    def square(self, x, s):
        return x["x"][:, : s["K"]] ** 2


@benchmark("suite_hangs", covers="gather_tokens", shapes=SHAPES)
class Hangs(Double):
    def call(self, x, s, backend):
        return super().call(x, s, backend) if backend == "reference" else forever()

    hangs = dies = raises = None


@benchmark("suite_wrong", covers="gather_tokens", shapes=SHAPES)
class Wrong(Double):
    def call(self, x, s, backend):
        return super().call(x, s, backend) * (1.0 if backend == "reference" else 1.0001)

    hangs = dies = raises = None
