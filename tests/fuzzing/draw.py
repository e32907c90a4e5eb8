"""Draws sizes, values and memory layouts: all that a case is made of comes from its seed and its number."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TILES = (16, 32, 48, 64, 128)  # where kernels change from whole tiles to a tail
LARGE = {torch.float16: 1e3}
TINY = {torch.float16: 1e-4}


class Draw:
    """The random choices of one case.

    Args:
        seed, case: name the case; the same two give the same case.

    Attributes:
        small: sizes stay small enough for Triton's interpreter.
        large: now and then, sizes are of several tiles and more.
    """

    def __init__(self, seed: int, case: int):
        self.random = random.Random(f"{seed}/{case}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.small = False
        self.large = False

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def dtype(self) -> torch.dtype:
        return self.random.choices(FLOATS, (4, 3, 2, 1))[0]

    def size(self, most: int = 300, empty: float = 0.03) -> int:
        """A length: mostly a few, often a tile and one more or less, seldom none."""
        if self.small:
            most = min(most, 34)
        kind = self.random.random()
        if kind < empty:
            return 0
        if kind < empty + 0.1:
            return 1
        if kind < 0.55:
            return min(most, self.between(2, 9))
        if kind < 0.85:
            return min(most, self.pick(*TILES) + self.between(-1, 1))
        return self.between(1, most * 4 if self.large else most)

    def batch(self) -> int:
        return self.random.choices((0, 1, 2, 3), (1, 12, 10, 4))[0]

    # --- values ---

    def values(self, *shape: int, dtype: torch.dtype, kind: str | None = None) -> Tensor:
        """Normal values of any scale, or some that repeat, vanish or are small integers."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        kinds = ("normal", "large", "tiny", "repeated", "zeros", "integers", "scales")
        kind = kind or self.random.choices(kinds, (12, 2, 1, 2, 1, 2, 1))[0]
        if kind == "large":
            x = x * LARGE.get(dtype, 1e4)
        elif kind == "tiny":
            x = x * TINY.get(dtype, 1e-15)
        elif kind == "repeated" and x.dim() > 1 and x.shape[1] > 1:
            x = x[:, torch.randint(min(3, x.shape[1]), (x.shape[1],), generator=self.generator)]
        elif kind == "zeros":
            x = x * (torch.rand(shape[:-1], generator=self.generator) < 0.6).unsqueeze(-1) if shape else x * 0
        elif kind == "integers":
            x = x.round()
        elif kind == "scales" and x.dim() > 1:
            x = x * 10.0 ** torch.randint(-3, 3, x.shape[:-1], generator=self.generator).unsqueeze(-1)
        return x.to(dtype)

    def tensor(self, *shape: int, dtype: torch.dtype, kind: str | None = None) -> Tensor:
        """Drawn values in a drawn layout; now and then every slice along one axis is the same memory."""
        x = self.values(*shape, dtype=dtype, kind=kind)
        if x.numel() and self.chance(0.06):
            axis = self.between(0, x.dim() - 1)
            return self.layout(x.narrow(axis, 0, 1)).expand(shape)
        return self.layout(x)

    def positive(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Sizes and scales: at least a half, less than four."""
        return self.layout((torch.rand(shape, generator=self.generator, dtype=torch.float64) * 3.5 + 0.5).to(dtype))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 or int64 in [low, high), in a drawn layout."""
        x = torch.randint(low, max(high, low + 1), shape, generator=self.generator)
        return self.layout(x.to(self.pick(torch.int32, torch.int64)))

    def mask(self, *shape: int, share: float) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    # --- layouts ---

    def layout(self, x: Tensor) -> Tensor:
        """The same values with drawn strides, as a view of memory whose other elements are NaN or out of range."""
        if self.chance(0.4) or x.dim() == 0:
            return x.contiguous()
        axes = list(range(x.dim()))
        if self.chance(0.5):
            self.random.shuffle(axes)
        steps = [self.pick(2, 3) if self.chance(0.25) else 1 for _ in axes]
        pads = [self.between(1, 3) if self.chance(0.25) else 0 for _ in axes]
        sizes = [x.shape[a] * s + p for a, s, p in zip(axes, steps, pads, strict=True)]
        start = self.between(0, 5)
        strides = [1] * len(sizes)
        for i in reversed(range(len(sizes) - 1)):
            strides[i] = strides[i + 1] * max(1, sizes[i + 1])
        memory = poison(start + max(1, strides[0] * sizes[0]), x.dtype)
        stride = [0] * x.dim()
        for a, step, of in zip(axes, steps, strides, strict=True):
            stride[a] = of * step
            if x.shape[a] <= 1 and self.chance(0.5):  # means nothing, and must not be relied on
                stride[a] = self.pick(0, 1, 7, 4096)
        view = memory.as_strided(x.shape, stride, start)
        return view.copy_(x)


def poison(count: int, dtype: torch.dtype) -> Tensor:
    """Memory that nobody should read: NaN, or an index that fits nowhere."""
    if dtype == torch.float8_e4m3fn:
        return torch.full((count,), 0x7F, dtype=torch.uint8).view(dtype)
    fill = float("nan") if dtype.is_floating_point else min(torch.iinfo(dtype).max, 2**30)
    return torch.full((count,), fill, dtype=dtype)


def describe(value: Any) -> str:
    """An argument in a few words."""
    if isinstance(value, Tensor):
        text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return text if value.is_contiguous() else f"{text} strides {list(value.stride())}"
    if isinstance(value, tuple | list):
        return f"({', '.join(describe(v) for v in value)})"
    return str(value)
