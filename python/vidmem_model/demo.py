"""The demo: a video's history becomes a short context, and random frames are read back from it.

Every frame is read from a memory file opened afresh, after the decoded video and its latents have
been given up; only the few source frames that results are compared with are kept.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from vidmem_kernels import Choice, recording

from .checks import MOST_SEED, Checked, PathName, not_negative, positive
from .errors import UserError
from .evaluate.metrics import psnr, ssim
from .files import output_folder, write_json
from .machine import available_bytes, describe_device, versions
from .measure.attention import ProfileConfig, check_room, profile
from .measure.peak import PeakMemory, process_peak, timed
from .memory.config import METHODS, CompressorConfig
from .memory.dct import CompressedMemory, compress
from .memory.file import read_memory, write_memory
from .model.config import Rate
from .show import plots as report
from .vae import PATCH, DCTCodec, VideoCodec
from .video import Clip, fetch_sample_clip, probe, read_clip
from .video.clip import ClipSpec

Progress = Callable[[str, int, int | None], None]

# 20 s from here show close-ups, foliage, motion and a change of scene.
SAMPLE_START = 60.0
SAMPLE_CREDIT = "Big Buck Bunny (c) Blender Foundation, CC-BY 3.0"
# Names of what the demo writes.
FILES = ("report.json", "memory-*.safetensors", "memory_vs_context.*", "contact_sheet*.png")
# Bytes that decoding and compressing need for each byte of decoded video.
_ROOM = {"dct": 4, "merge": 6, "learned": 12}


@dataclass(frozen=True)
class DemoConfig(Checked):
    """What the demo does.

    Args:
        video: a video file, or None for the sample film.
        clip: the part to take.
        frames: how many frames to read back.
        seed: of the frames' random positions.
        rate: patch tokens that one token of memory covers, (height, width, time).
        learned: also take the same part at the trained model's size and rate, and show its memory
            beside dct and merge with as many tokens, as wide.
        profile: what the memory profile measures.
    """

    video: Annotated[Path | None, PathName()] = None
    clip: ClipSpec = ClipSpec()
    frames: Annotated[int, positive(10_000)] = 8
    seed: Annotated[int, not_negative(MOST_SEED)] = 0
    rate: Rate = (4, 4, 2)
    learned: bool = False
    profile: ProfileConfig = ProfileConfig(lengths=(1.0, 5.0, 20.0))


class Stages:
    """Time and peak memory of the steps of a run, in the order they ended."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure what happens inside as one stage."""
        with PeakMemory() as memory:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        self.done.append(
            {
                "stage": name,
                "seconds": seconds,
                "peak_rss_bytes": memory.peak_bytes,
                "grown_bytes": memory.grown_bytes,
                "measured_with": memory.method,
            }
        )


def load_clip(video: Path, spec: ClipSpec, method: str, progress: Callable[[int, int | None], None] | None) -> Clip:
    """Decode a clip, after a look at whether it can be compressed in the memory there is.

    Args:
        video: a video file.
        spec: the part to take.
        method: the compressor that is to follow.
        progress: as for `read_clip`.

    Returns:
        Clip.

    Raises:
        UserError: more memory is needed than there is.
        MediaError: as `read_clip`.
    """
    info = probe(video)
    seconds = max(0.0, info.duration - spec.start) if info.duration else spec.seconds or 0.0
    seconds = min(seconds, spec.seconds or seconds)
    pixels = (spec.height or info.height) * (spec.width or info.width)
    need = _ROOM[method] * 3 * pixels * seconds * (spec.fps or info.fps)
    free = available_bytes()
    if need > free:
        raise UserError(
            f"{video}: {seconds:g} s at this size take about {need / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; take fewer --seconds or a smaller --size"
        )
    return read_clip(video, spec, progress)


def context_tokens(size: tuple[int, int, int], codec: VideoCodec) -> int:
    """Patch tokens of a clip of (frames, rows, columns): its context before compression."""
    cells = [codec.stride[0], *(stride * PATCH for stride in codec.stride[1:])]
    return math.prod(-(-n // cell) for n, cell in zip(size, cells, strict=True))


def run_demo(config: DemoConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the demo and write its folder: report.json, memory files, and pictures.

    Args:
        config: what to do.
        out: folder for the results; made if missing, filled only when all has succeeded. An interrupt leaves the
            memory files that are whole in a folder that holds no earlier demo.
        progress: called with (description, done, total or None).

    Returns:
        What report.json holds.

    Raises:
        UserError: something the user can mend; nothing is left behind.
    """
    tell = progress or (lambda *_: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_room(config.profile, device)
    with output_folder(out) as folder:
        sample = config.video is None
        video = fetch_sample_clip(progress=progress is not None) if sample else config.video
        try:
            with recording() as choices:
                result = _run(config, video, folder, device, tell)
        except (KeyboardInterrupt, SystemExit) as stop:
            kept = _keep(folder, out)
            if kept and isinstance(stop, KeyboardInterrupt):
                raise KeyboardInterrupt(f"{' and '.join(kept)} kept in {out}") from stop
            raise
        result["video"]["credit"] = SAMPLE_CREDIT if sample else None
        result["kernels"] = _kernels(choices)
        result["peak_rss_bytes"] = process_peak()
        write_json(folder / "report.json", result)
    return result


def _keep(staging: Path, out: Path) -> list[str]:
    """Move the memory files of an interrupted demo to its folder, unless they would stand beside another's report."""
    memories = sorted(staging.glob("memory-*.safetensors"))
    if not memories or (out / "report.json").exists():
        return []
    out.mkdir(exist_ok=True)
    for file in memories:
        file.replace(out / file.name)
    return [file.name for file in memories]


def _run(config: DemoConfig, video: Path, folder: Path, device: str, tell: Progress) -> dict[str, Any]:
    stages = Stages()
    with stages.measure("decode"):
        clip = load_clip(video, config.clip, "merge", lambda *n: tell("decode", *n))
    size = tuple(clip.frames.shape[:3])
    if config.frames > size[0]:
        raise UserError(
            f"the clip has {size[0]} frames, --frames asks for {config.frames} of them; give --frames in [1, {size[0]}]"
        )
    chosen = sorted(random.Random(config.seed).sample(range(size[0]), config.frames))
    sources = clip.frames[chosen]
    codec = DCTCodec()
    before = context_tokens(size, codec)
    latent_frames = -(-size[0] // codec.stride[0])
    latents = []
    with stages.measure("encode"):
        for chunk in codec.encode_chunks(clip.frames.split(2 * codec.stride[0]), torch.float16):
            latents.append(chunk)
            tell("encode", sum(c.shape[2] for c in latents), latent_frames)
    result = {
        "format": "vidmem.demo",
        "version": 1,
        "video": _describe(clip, config.clip.start),
        "config": {"seed": config.seed, "frames": config.frames, "rate": config.rate},
        "context_tokens_before": before,
        "methods": {},
    }
    fps = clip.fps
    del clip
    for method in METHODS:
        file = folder / f"memory-{method}.safetensors"
        with stages.measure(f"compress, {method}"):
            compressed = compress(
                latents,
                codec,
                size,
                CompressorConfig(method=method, rate=config.rate),
                lambda *n, method=method: tell(f"compress, {method}", *n),
            )
        tell(f"store, {method}", 0, None)
        with stages.measure(f"store, {method}"):
            write_memory(file, compressed, fps=fps, source=video.name)
        result["methods"][method] = _stored(file, compressed, before)
        del compressed
    del latents
    retrieved = {m: _retrieve(m, folder / f"memory-{m}.safetensors", chosen, stages, tell) for m in METHODS}
    with stages.measure("compare"):
        _compare(result["methods"], retrieved, chosen, sources, fps)
    small = _run_learned(config, video, folder, stages, tell) if config.learned else None
    result["learned"] = small and small[0]
    with stages.measure("memory profile"):
        curve = profile(config.profile, device, progress=lambda what, *n: tell(what, *n))
    write_json(folder / "memory_vs_context.json", curve)
    result["skipped"] = report.plots_missing()
    if result["skipped"] is None:
        tell("pictures", 0, None)
        with stages.measure("pictures"):
            report.write_memory_plot(folder / "memory_vs_context.png", curve)
            _draw(folder / "contact_sheet.png", result, sources, retrieved)
            if small:
                _draw(folder / "contact_sheet_learned.png", *small)
    result["files"] = sorted(file.name for file in folder.iterdir()) + ["report.json"]
    result["stages"] = stages.done
    result["device"] = describe_device("cpu")
    result["versions"] = versions()
    return result


def _run_learned(
    config: DemoConfig, video: Path, folder: Path, stages: Stages, tell: Progress
) -> tuple[dict[str, Any], torch.Tensor, dict[str, tuple[list[torch.Tensor], list[float]]]]:
    """Do the same at the trained model's size and rate, for a history as long as those it was trained on.

    Results, source frames, frames read back.
    """
    from .evaluate.baselines import compress_training_free
    from .memory.learned import DEFAULT_MODEL, compress_learned, open_shipped

    trained = open_shipped(DEFAULT_MODEL)
    model = trained.model.config
    start, seconds = config.clip.start, config.clip.seconds
    if config.video is None and trained.held_out:
        start = trained.held_out[0][0]  # of the sample film, a part that was not trained on
    if trained.seconds:
        seconds = min(trained.seconds, seconds or trained.seconds)
    spec = ClipSpec(model.height, model.width, model.fps, start, seconds)
    where = f", {model.height}x{model.width}"
    with stages.measure(f"decode{where}"):
        clip = load_clip(video, spec, "learned", lambda *n: tell(f"decode{where}", *n))
    size = tuple(clip.frames.shape[:3])
    chosen = sorted(random.Random(config.seed).sample(range(size[0]), min(config.frames, size[0])))
    before = context_tokens(size, trained.vae)
    result: dict[str, Any] = {"video": _describe(clip, spec.start), "context_tokens_before": before, "methods": {}}
    for method in ("learned", *METHODS):
        file = folder / (f"memory-{method}{where.replace(', ', '-')}.safetensors")
        tell(f"compress, {method}{where}", 0, None)
        with stages.measure(f"compress, {method}{where}"):
            if method == "learned":
                compressed = compress_learned(clip.frames)
            else:
                compressed = compress_training_free(
                    method, clip.frames, model.encoders[0].compression.rate, model.dit.dim
                )
            write_memory(file, compressed, fps=clip.fps, source=video.name)
        result["methods"][method] = _stored(file, compressed, before)
    sources, fps = clip.frames[chosen], clip.fps
    del clip
    retrieved = {
        m: _retrieve(f"{m}{where}", folder / entry["file"], chosen, stages, tell)
        for m, entry in result["methods"].items()
    }
    _compare(result["methods"], retrieved, chosen, sources, fps)
    return result, sources, retrieved


def _describe(clip: Clip, start: float) -> dict[str, Any]:
    frames, height, width = clip.frames.shape[:3]
    return {
        "source": clip.source.name,
        "start_seconds": start,
        "seconds": frames / clip.fps,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": clip.fps,
        "shorter_than_asked": clip.short,
        "remarks": list(clip.remarks),
    }


def _stored(file: Path, compressed: CompressedMemory, before: int) -> dict[str, Any]:
    rows, channels = compressed.tokens.shape
    return {
        "file": file.name,
        "bytes_on_disk": file.stat().st_size,
        "context_tokens_after": rows,
        "channels": channels,
        "compression": before / rows,
    }


def _compare(
    methods: dict[str, dict[str, Any]],
    retrieved: dict[str, tuple[list[torch.Tensor], list[float]]],
    chosen: list[int],
    sources: torch.Tensor,
    fps: float,
) -> None:
    """Add to each method's results how close its frames are to their sources."""
    for method, (images, times) in retrieved.items():
        entry = methods[method]
        entry["retrieved"] = [
            {
                "frame": index,
                "seconds": index / fps,
                "psnr_db": _finite(psnr(image, source)),
                "ssim": ssim(image, source),
                "retrieve_seconds": passed,
            }
            for index, image, source, passed in zip(chosen, images, sources, times, strict=True)
        ]
        known = [r["psnr_db"] for r in entry["retrieved"] if r["psnr_db"] is not None]
        entry["mean_psnr_db"] = statistics.fmean(known) if known else None
        entry["mean_ssim"] = statistics.fmean(r["ssim"] for r in entry["retrieved"])


def _retrieve(
    name: str, file: Path, chosen: list[int], stages: Stages, tell: Progress
) -> tuple[list[torch.Tensor], list[float]]:
    """Open the memory file anew and read the chosen frames; images and seconds for each."""
    images: list[torch.Tensor] = []
    times = []
    with stages.measure(f"retrieve, {name}"):
        memory = read_memory(file)
        for index in chosen:
            times.append(timed(lambda index=index: images.append(memory.retrieve(index))))
            tell(f"retrieve, {name}", len(images), len(chosen))
    return images, times


def _finite(value: float) -> float | None:
    """PSNR of equal images is infinite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def _kernels(choices: list[Choice]) -> dict[str, dict[str, list[str]]]:
    """Op -> device -> the backends that ran it."""
    used: dict[str, dict[str, list[str]]] = {}
    for choice in choices:
        backends = used.setdefault(choice.op, {}).setdefault(choice.device, [])
        if choice.backend not in backends:
            backends.append(choice.backend)
    return dict(sorted(used.items()))


def _caption(entry: dict[str, Any]) -> str:
    value = entry["psnr_db"]
    return ("equal" if value is None else f"PSNR {value:.2f}") + f"   SSIM {entry['ssim']:.3f}"


def _draw(
    path: Path,
    result: dict[str, Any],
    sources: torch.Tensor,
    retrieved: dict[str, tuple[list[torch.Tensor], list[float]]],
) -> None:
    rows = []
    entries = {method: result["methods"][method]["retrieved"] for method in retrieved}
    for i, source in enumerate(sources):
        first = next(iter(entries.values()))[i]
        rows.append(
            report.SheetRow(
                f"frame {first['frame']}\n{first['seconds']:.2f} s",
                source,
                {m: (retrieved[m][0][i], _caption(entries[m][i])) for m in retrieved},
            )
        )
    after = " and ".join(f"{n:,}" for n in dict.fromkeys(m["context_tokens_after"] for m in result["methods"].values()))
    video = result["video"]
    report.write_contact_sheet(
        path,
        rows,
        f"{video['seconds']:.3g} s of {video['source']}: {result['context_tokens_before']:,} tokens "
        f"→ {after}; frames read back from the memory file, PSNR in dB",
    )
