"""Named sizes of the benchmarks, and their origin.

A video clip of T x H x W tokens is flattened to N = T * H * W. 81 frames of 480 x 832 pixels are 21 x 30 x 52 tokens in
Wan 2.1 (a VAE of stride 4 x 8 x 8, patches of 1 x 2 x 2); its 1.3B model has 12 heads of 128 (C = 1536), HunyuanVideo
24 heads of 128 (C = 3072). Sizes for the CPU have fewer heads where the time would be too long.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

CLIP_480P = (21, 30, 52)  # Wan 2.1, 81 frames of 480 x 832
CLIP_240P = (21, 15, 26)  # half the height and width, which two CPU cores process in a second
HISTORY_20S = (120, 30, 52)  # 20 s at 24 frames per second and 480 x 832
HISTORY_60S = (360, 30, 52)
MEMORY_20S = 60 * 7 * 13  # those 20 s compressed by 2 x 4 x 4


class Shape(NamedTuple):
    """One set of sizes.

    Attributes:
        sizes: sizes by the names that the benchmark's `make` uses.
        where: origin of the sizes.
        devices: device types that run it by default; others run it only by name.
    """

    sizes: dict[str, Any]
    where: str
    devices: tuple[str, ...] = ()


CPU, GPU, BOTH = ("cpu",), ("cuda",), ("cpu", "cuda")
SMOKE = "smallest that has every code path; for tests"

# Results are verified on inputs of about this number of tokens and at most this number of heads, smaller ones first.
# The last ones exceed the range of int16 indices, even if half of the tokens merge.
VERIFIED_AT = ((4096, 2), (4096, 64), (16_384, 2), (16_384, 64), (81_920, 64))
_RESIDUE = 4096  # a multiple of every tile size, also times 16, and of the divisors that Triton specialises lengths for


def smaller(sizes: dict[str, Any], max_tokens: int, heads: int, by_frame: bool = False) -> dict[str, Any]:
    """The same task with at most about `max_tokens` tokens, at sizes for which kernels choose similar code.

    Channels, head sizes, blocks and topk stay. Lengths keep their remainder modulo 4,096; clips their picture size
    (with fewer pictures, the same number modulo 16), windows their frames (of fewer tokens), a choice its share. At
    most `heads` heads; with `by_frame`, whole frames.
    """
    small = dict(sizes)

    def length(n: int) -> int:
        return n if n <= max_tokens else max_tokens // _RESIDUE * _RESIDUE + n % _RESIDUE

    def whole(count: int, size: int) -> int:
        """At least four of `count` parts, about max_tokens / size, with the same remainder modulo 16."""
        fewer = max(4, max_tokens // size)
        return count if count <= fewer else min(count, fewer + (count - fewer) % 16)

    if "grid" in sizes:
        frames, height, width = sizes["grid"]
        small["grid"] = (whole(frames, height * width), height, width)
        small["N"] = prod(small["grid"])
    elif "frames" in sizes:
        frame = sizes["Lk"] // sizes["frames"]
        fewer = max(1, max_tokens // sizes["frames"] // 128) * 128 + frame % 128
        small |= {name: sizes[name] // frame * min(frame, fewer) for name in ("Lq", "Lk")}
    elif by_frame and sizes["L"] % sizes["frame"] == 0:
        small["L"] = whole(sizes["L"] // sizes["frame"], sizes["frame"]) * sizes["frame"]
    else:
        small |= {name: length(sizes[name]) for name in ("N", "L", "Lq", "Lk", "K", "M") if name in sizes}
    if "keep" in sizes:
        small["keep"] = sizes["keep"] * small["N"] // sizes["N"]
    if "H" in sizes:
        small["H"] = min(heads, sizes["H"])
    return small


def _clip(grid: tuple[int, int, int], channels: int, **more: Any) -> dict[str, Any]:
    return {"N": prod(grid), "C": channels, "grid": grid, **more}


def _attention(lq: int, lk: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"B": 1, "Lq": lq, "Lk": lk, "H": heads, "D": 128, **more}


def _linear(length: int, heads: int, size: int, **more: Any) -> dict[str, Any]:
    return {"B": 1, "L": length, "H": heads, "D": size, **more}


N480, N240 = prod(CLIP_480P), prod(CLIP_240P)
N20S, N60S = prod(HISTORY_20S), prod(HISTORY_60S)

_GATHER = {
    "smoke": Shape({"M": 96, "C": 24, "K": 64}, SMOKE),
    "memory20s": Shape({"M": MEMORY_20S, "C": 3072, "K": 4096}, "4,096 tokens read from a memory of 20 s", BOTH),
    "history20s": Shape({"M": N20S, "C": 3072, "K": N480}, "a clip's worth of tokens from 20 s, uncompressed", GPU),
}
_MATCH = {
    "smoke": Shape({"N": 192, "C": 16}, SMOKE),
    "n16k": Shape({"N": 16_384, "C": 128}, "half a Wan clip, keys averaged over heads", CPU),
    "n16k-c512": Shape({"N": 16_384, "C": 512}, "the same, four heads side by side", CPU),
    "clip480p": Shape({"N": N480, "C": 128}, "Wan clip at 480 x 832, keys averaged over heads", GPU),
}
_MATCH_WINDOW = {
    "smoke": Shape(_clip((4, 6, 8), 16), SMOKE),
    "clip480p": Shape(_clip(CLIP_480P, 128), "Wan clip at 480 x 832, keys averaged over heads", BOTH),
    "history20s": Shape(_clip(HISTORY_20S, 128), "20 s at 480 x 832", BOTH),
    "history60s": Shape(_clip(HISTORY_60S, 128), "60 s at 480 x 832: linear in N or not", GPU),
}
_MERGE = {
    "smoke": Shape({"N": 192, "C": 24}, SMOKE),
    "n8k-c512": Shape({"N": 8192, "C": 512}, "half of a 240 x 416 clip merged, narrow", CPU),
    "n16k-c1536": Shape({"N": 16_384, "C": 1536}, "half of half a Wan clip merged, Wan 1.3B", CPU),
    "clip480p": Shape({"N": N480, "C": 3072}, "half of a 480 x 832 clip merged, HunyuanVideo", GPU),
}
_LINEAR = {
    "smoke": Shape(_linear(130, 2, 16, frame=26), SMOKE),
    "16k-d64": Shape(_linear(16_384, 8, 64, frame=1024), "half a Wan clip, 8 heads of 64", CPU),
    "clip240p": Shape(_linear(N240, 12, 128, frame=15 * 26), "240 x 416 clip, Wan 1.3B", CPU),
    "16k-d128": Shape(_linear(16_384, 12, 128, frame=1024), "half a Wan clip, Wan 1.3B"),
    "1k": Shape(_linear(1024, 12, 64, frame=256), "short enough for all scores at once"),
    "clip480p": Shape(_linear(N480, 12, 128, frame=30 * 52), "480 x 832 clip, Wan 1.3B", GPU),
    "history20s": Shape(_linear(N20S, 12, 128, frame=30 * 52), "20 s at 480 x 832, Wan 1.3B"),
    "history60s-d64": Shape(_linear(N60S, 4, 64, frame=30 * 52), "60 s at 480 x 832: what memory it takes"),
}
_CROSS = {
    "smoke": Shape(_attention(70, 96, 2), SMOKE),
    "frame-memory20s": Shape(_attention(390, MEMORY_20S, 4), "a 240 x 416 frame reads the memory of 20 s", CPU),
    "4k-5k": Shape(_attention(4096, 5120, 8), "4,096 queries read 5,120 tokens"),
    "clip480p-memory5k": Shape(_attention(N480, 5120, 24), "HunyuanVideo's heads, a clip reads 5,120 tokens", GPU),
}

SHAPES: dict[str, dict[str, Shape]] = {
    "gather_tokens": _GATHER,
    "gather_tokens_int8": _GATHER,
    "gather_tokens_fp8": _GATHER,
    "gather_tokens_pinned": {
        "smoke": Shape({"M": 96, "C": 24, "K": 64}, SMOKE),
        "history20s": Shape({"M": N20S, "C": 3072, "K": 5120}, "5,120 tokens of 20 s that lie on the host", BOTH),
    },
    "scatter_add_tokens": {
        "smoke": Shape({"K": 200, "M": 40, "C": 24}, SMOKE),
        "history20s-c128": Shape({"K": N20S, "M": MEMORY_20S, "C": 128}, "20 s of keys summed into a memory", CPU),
        "clip480p": Shape({"K": N480, "M": MEMORY_20S, "C": 3072}, "a clip summed into a memory", GPU),
        "history20s": Shape({"K": N20S, "M": MEMORY_20S, "C": 3072}, "20 s summed into a memory", GPU),
    },
    "quantize_rows": {
        "smoke": Shape({"M": 96, "C": 24}, SMOKE),
        "memory20s": Shape({"M": MEMORY_20S, "C": 3072}, "memory of 20 s", CPU),
        "history20s": Shape({"M": N20S, "C": 3072}, "20 s, uncompressed", GPU),
    },
    "select_tokens": {
        "smoke": Shape({"N": 192, "C": 24, "keep": 50}, SMOKE),
        "clip240p": Shape({"N": N240, "C": 1536, "keep": N240 // 4}, "a quarter of a 240 x 416 clip", CPU),
        "clip480p": Shape({"N": N480, "C": 3072, "keep": N480 // 4}, "a quarter of a 480 x 832 clip", GPU),
    },
    "match_tokens": _MATCH,
    "match_tokens_window": _MATCH_WINDOW,
    "match_neighbors": _MATCH_WINDOW,
    "merge_tokens": _MERGE,
    "unmerge_tokens": _MERGE,
    "topk_blocks": {
        "smoke": Shape(_attention(130, 200, 2, block=(32, 16), topk=3), SMOKE),
        "clip240p-clip480p": Shape(
            _attention(N240, N480, 4, block=(128, 64), topk=32), "a clip picks blocks of a longer history", CPU
        ),
        "clip480p-nearest": Shape(
            {"B": 1, "Lq": N480, "Lk": MEMORY_20S, "H": 1, "D": 64, "block": (1, 1), "topk": 1},
            "the nearest of the memory's tokens for each of a clip",
            BOTH,
        ),
        "clip480p-history60s": Shape(
            _attention(N480, N60S, 12, block=(128, 64), topk=64), "a clip picks blocks of 60 s, Wan 1.3B", GPU
        ),
    },
    "linear_attention": _LINEAR,
    "linear_attention_frames": {**_LINEAR, "16k-d64": _LINEAR["16k-d64"]._replace(devices=())},
    "linear_attention_causal": _LINEAR,
    "cross_attention": _CROSS,
    "cross_attention_bias": _CROSS,
    "cross_attention_window": {
        "smoke": Shape(_attention(70, 96, 2, frames=8, window=3), SMOKE),
        "clip240p": Shape(
            _attention(7 * 390, 8 * 390, 4, frames=8, window=2), "frames of 240 x 416 that see 2 of 8", CPU
        ),
        "4k-5k": Shape(_attention(4096, 5120, 8, frames=32, window=8), "a quarter of 32 frames of 160 tokens"),
        "clip480p": Shape(
            _attention(N480 - 7 * 1560, N480, 12, frames=21, window=8), "a clip whose frames see 8, Wan 1.3B", GPU
        ),
    },
    "cross_attention_blocks": {
        "smoke": Shape(_attention(70, 96, 2, block=(32, 16), topk=2), SMOKE),
        "frame-memory20s": Shape(
            _attention(390, MEMORY_20S, 4, block=(128, 64), topk=21), "a quarter of the 86 blocks of keys", CPU
        ),
        "4k-5k": Shape(_attention(4096, 5120, 8, block=(128, 64), topk=20), "a quarter of the 80 blocks of keys"),
        "clip480p": Shape(
            _attention(N480, N480, 12, block=(128, 64), topk=64), "an eighth of the 512 blocks of a clip", GPU
        ),
    },
    "merge_attention_states": {
        "smoke": Shape(_linear(70, 2, 16), SMOKE),
        "4k": Shape(_linear(4096, 8, 128), "4,096 queries"),
        "clip240p": Shape(_linear(N240, 12, 128), "a 240 x 416 clip, Wan 1.3B", CPU),
        "clip480p": Shape(_linear(N480, 24, 128), "a 480 x 832 clip, HunyuanVideo's heads", GPU),
    },
}
