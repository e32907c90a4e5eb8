"""Measures token merging in diffusers' Wan: error on latents of real video, time and memory against length.

    python benchmarks/integrations.py                         # under 3 minutes on two cores; prints the tables
    python benchmarks/integrations.py --frames 2 4 8 16 32    # longer videos: a frame is 390 tokens
    python benchmarks/integrations.py --quick                 # seconds: random latents, one small model
    python benchmarks/integrations.py --page docs/integrations.md -o benchmarks/results/integrations

The weights are random: this package contains no transformer of Wan. Errors are those of the first self-attention, whose
input is the same with and without merging, and of the model's prediction; both relative to the model without merging.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.integrations_tables import PART, tables  # noqa: E402
from benchmarks.page_parts import with_part  # noqa: E402
from benchmarks.record import describe, result_path, write_json  # noqa: E402
from benchmarks.timing import clock_of, interleave, speedup, summarise  # noqa: E402
from vidmem_kernels.diffusers import apply_token_merging  # noqa: E402

RATIOS = (0.0, 0.25, 0.5, 0.75)
NOISE = (0.1, 0.5, 0.9)
# Start times of the clips in the sample film, in seconds: a meadow, and a chase.
CLIPS = (60.0, 420.0)
# Pixels, and frames a second: 15 x 26 tokens a latent frame.
HEIGHT, WIDTH, FPS = 240, 416, 16.0
CHANNELS, TEXT_TOKENS = 16, 512
# Noise of two consecutive steps of a 30-step sampler, for plans that are kept.
STEP = 1 / 30

Row = dict[str, Any]


# Arguments of WanTransformer3DModel.
MODELS = {
    "tiny": {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 4, "text_dim": 64},
    "wan-1.3b": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "num_layers": 1,
        "text_dim": 4096,
    },
}


def make_model(name: str, device: torch.device) -> nn.Module:
    """Makes a model with random weights, the same in every call."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    made = WanTransformer3DModel(in_channels=CHANNELS, out_channels=CHANNELS, **MODELS[name])
    return made.eval().requires_grad_(False).to(device)


def merging_copy(model: nn.Module, kv_ratio: float, reused: bool) -> nn.Module:
    """Makes a copy of a model that merges tokens and shares its weights.

    Args:
        model: the model without merging.
        kv_ratio: share of keys and values that are merged away.
        reused: whether plans are made in the first block of the first forward pass and used in all others.

    Returns:
        The copy.
    """
    made = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    reuse = {"reuse_steps": 1_000_000, "reuse_blocks": len(made.blocks)} if reused else {}
    apply_token_merging(made, kv_ratio=kv_ratio, **reuse)
    return made


def film_latents(start: float, frames: int) -> Tensor:
    """Latents (1, C, frames, H, W) of the sample film from `start` seconds on, by the VAE of the package."""
    from vidmem_model.model.config import PRESETS
    from vidmem_model.shipped import CHECKPOINTS
    from vidmem_model.vae import load_vae
    from vidmem_model.video import read_clip
    from vidmem_model.video.clip import ClipSpec
    from vidmem_model.video.sample import fetch_sample_clip

    vae = load_vae(PRESETS["demo"].vae, CHECKPOINTS / "vae.safetensors")
    count = vae.video_frames(frames)
    spec = ClipSpec(HEIGHT, WIDTH, FPS, start=start, seconds=(count + 1) / FPS)
    pictures = read_clip(fetch_sample_clip(), spec).frames[:count]
    with torch.no_grad():
        return vae.scale(torch.cat(list(vae.encode_chunks([pictures])), 2))[:, :, :frames]


def drawn_latents(seed: float, frames: int) -> Tensor:
    """Smooth random latents of a small size, for a run that only checks that everything works."""
    draw = torch.Generator().manual_seed(int(seed))
    coarse = torch.randn(1, CHANNELS, frames, 3, 4, generator=draw)
    return nn.functional.interpolate(coarse, size=(frames, 12, 16), mode="trilinear")


class Forward:
    """Runs a model on noisy latents, and measures its self-attentions.

    Args:
        model: model on the device.
        latents: (1, C, T, H, W).
    """

    def __init__(self, model: nn.Module, latents: Tensor) -> None:
        device = next(model.parameters()).device
        draw = torch.Generator().manual_seed(1)
        self.model, self.latents = model, latents.to(device)
        self.noise = torch.randn(latents.shape, generator=draw).to(device)
        self.text = torch.randn(1, TEXT_TOKENS, model.config.text_dim, generator=draw).to(device)
        self.first: Tensor | None = None  # output of the first self-attention
        self.seconds = 0.0  # time of the self-attentions in the last forward pass
        self._began = 0.0
        for i, block in enumerate(model.blocks):
            block.attn1.register_forward_pre_hook(self._begin)
            block.attn1.register_forward_hook(self._end_first if i == 0 else self._end)

    @torch.no_grad()
    def __call__(self, noise: float = 0.5) -> Tensor:
        """The prediction for latents with the given share of noise."""
        self.seconds = 0.0
        noisy = (1 - noise) * self.latents + noise * self.noise
        time = torch.tensor([1000 * noise], device=noisy.device)
        return self.model(noisy, time, self.text, return_dict=False)[0]

    def _now(self) -> float:
        if self.latents.is_cuda:
            torch.cuda.synchronize(self.latents.device)
        return perf_counter()

    def _begin(self, *_: Any) -> None:
        self._began = self._now()

    def _end(self, *_: Any) -> None:
        self.seconds += self._now() - self._began

    def _end_first(self, module: nn.Module, given: Any, made: Tensor) -> None:
        self._end()
        self.first = made


def relative(made: Tensor, expected: Tensor) -> float:
    """The norm of the difference, divided by the norm of the expected tensor."""
    return float((made - expected).norm() / expected.norm())


def measure_errors(name: str, clips: dict[float, Tensor], device: torch.device) -> Iterator[Row]:
    """Errors at each ratio and share of noise, with plans of the same step and of the step before."""
    model = make_model(name, device)
    for clip, latents in clips.items():
        dense = Forward(merging_copy(model, 0.0, False), latents)
        for noise in NOISE:
            expected = dense(noise)
            for ratio in RATIOS[1:]:
                for reused in (False, True):
                    merged = Forward(merging_copy(model, ratio, reused), latents)
                    if reused:
                        merged(min(1.0, noise + STEP))
                    made = merged(noise)
                    yield {
                        "kind": "error",
                        "model": name,
                        "clip_second": clip,
                        "frames": latents.shape[2],
                        "noise": noise,
                        "kv_ratio": ratio,
                        "reused": reused,
                        "attention_error": relative(merged.first, dense.first),
                        "prediction_error": relative(made, expected),
                    }


def measure_costs(name: str, latents: Tensor, device: torch.device, budget: float) -> Iterator[Row]:
    """Time and peak memory of a forward pass at each ratio; with reuse, of the one after the plans were made."""
    model, clock = make_model(name, device), clock_of(device)
    choices = {(ratio, reused) for ratio in RATIOS for reused in (False, True) if ratio or not reused}
    forwards, attention, peaks = {}, {}, {}
    for choice in sorted(choices):
        forward = Forward(merging_copy(model, *choice), latents)
        if choice[1]:
            forward()  # makes the plans to keep
        peaks[str(choice)] = clock.peak_bytes(lambda forward=forward: forward)
        forwards[str(choice)], attention[str(choice)] = (choice, forward), []

    def call(key: str) -> Callable[[], Tensor]:
        def timed() -> Tensor:
            made = forwards[key][1]()
            attention[key].append(forwards[key][1].seconds)
            return made

        return timed

    seconds, errors = interleave(clock, {key: lambda _, key=key: call(key) for key in forwards}, 1, budget)
    if errors:
        raise RuntimeError("; ".join(errors.values()))
    _, _, frames, height, width = latents.shape
    for key, ((ratio, reused), _) in forwards.items():
        yield {
            "kind": "cost",
            "model": name,
            "frames": frames,
            "tokens": frames * (height // 2) * (width // 2),
            "kv_ratio": ratio,
            "reused": reused,
            "median_ms": summarise(seconds[key]).median,
            "speedup": speedup(seconds[key], seconds[str((0.0, False))]),
            "attention_ms": 1e3 * median(attention[key][-len(seconds[key]) :]),
            "peak_bytes": peaks[key],
            "rounds": len(seconds[key]),
        }


def _outlasts(rows: list[Row], name: str, frames: int, limit: float) -> bool:
    """Whether a forward pass will exceed `limit` seconds, by quadratic extrapolation from the last one that ran."""
    ran = [row for row in rows if row["kind"] == "cost" and row["model"] == name and not row["kv_ratio"]]
    return bool(ran) and 1e-3 * ran[-1]["median_ms"] * (frames / ran[-1]["frames"]) ** 2 > limit


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--frames", nargs="+", type=int, default=[2, 4, 8], help="latent frames that are timed")
    parser.add_argument("--error-frames", type=int, default=4, help="latent frames of the clips for errors")
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds for each length")
    parser.add_argument("--limit", type=float, default=10.0, help="longest forward, in seconds; others are left out")
    parser.add_argument("--quick", action="store_true", help="drawn latents, the tiny model, in seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    parser.add_argument("-o", "--output", type=Path, help=".json file or folder; default: nothing is written")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.frames, args.error_frames, args.seconds = ["tiny"], [3], 3, 0.1
    if min(*args.frames, args.error_frames) < 2:
        parser.error("--frames and --error-frames: must be at least 2, of which the first is never merged")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, started = torch.device(args.device), perf_counter()
    latents = drawn_latents if args.quick else film_latents
    result = describe(ROOT, device, sys.argv[1:] if argv is None else argv)
    result["left_out"] = []
    result |= {"latents": "drawn" if args.quick else "sample film, vae.safetensors", "weights": "random"}
    longest = latents(CLIPS[0], max(*args.frames, args.error_frames))
    clips = {CLIPS[0]: longest[:, :, : args.error_frames]}
    clips |= {start: latents(start, args.error_frames) for start in CLIPS[1:] if not args.quick}
    for name in args.models:
        print(f"errors of {name}", file=sys.stderr, flush=True)
        # The block of full width takes half a minute per clip, so it gets only one.
        result["rows"] += measure_errors(name, clips if name == "tiny" else {CLIPS[0]: clips[CLIPS[0]]}, device)
        for frames in sorted(args.frames):
            if _outlasts(result["rows"], name, frames, args.limit):
                result["left_out"].append({"model": name, "frames": frames})
                continue
            print(f"costs of {name}, {frames} latent frames", file=sys.stderr, flush=True)
            result["rows"] += measure_costs(name, longest[:, :, :frames], device, args.seconds)
    result |= {"complete": True, "seconds": perf_counter() - started}
    print(tables(result))
    if args.page is not None:
        args.page.write_text(with_part(args.page.read_text(), PART, tables(result)))
    if args.output is not None:
        path = result_path(args.output, ROOT, result)
        write_json(path, result)
        print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
