"""The demo: compress a video with every method, read frames back, one from each part, and compare with the source.

Frames are read from newly opened memory files, after the decoded video and its latents are freed; only the source
frames for the comparison are kept.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from vidmem_kernels import Choice, recording

from .checks import MOST_SEED, Checked, Entries, PathName, not_negative, positive, require
from .errors import UserError
from .evaluate.baselines import compress_alike
from .evaluate.metrics import psnr, ssim
from .files import output_folder, write_json
from .machine import describe_device, versions
from .measure.attention import ProfileConfig, check_room, profile
from .measure.peak import process_peak, timed
from .measure.stages import Stages
from .memory import METHODS, MethodName, listed, trained, untrained
from .memory.compressor import CompressedMemory, compress
from .memory.config import CompressorConfig
from .memory.file import read_memory, write_memory
from .memory.method import EncodedClip, context_tokens, encoded
from .model.config import Compression
from .show.plots import plots_missing, write_memory_plot
from .show.sheet import write_memories_sheet
from .vae import DCTCodec
from .video import Clip, fetch_sample_clip, load_clip
from .video.clip import ClipSpec

Progress = Callable[[str, int, int | None], None]

# The 20 s from here contain close-ups, foliage, motion and a cut.
SAMPLE_START = 60.0
SAMPLE_CREDIT = "Big Buck Bunny (c) Blender Foundation, CC-BY 3.0"
# Names of the files that the demo writes.
FILES = ("report.json", "memory-*.safetensors", "memory_vs_context.*", "contact_sheet*.png")
WHAT = (
    "A video's history as memory files: for each method the tokens before and after, the bytes of the file, and frames "
    "read back from that file alone, one from each equal part of the video. psnr_db and ssim compare a frame with the "
    "source; psnr_db is null where both are equal. What attention to such a history costs is in memory_vs_context.json."
)
# For each method the frames read back, and the time of each read in seconds.
_Retrieved = dict[str, tuple[list[torch.Tensor], list[float]]]


@dataclass(frozen=True)
class DemoConfig(Checked):
    """Configuration of the demo.

    Args:
        video: Video file, or None for the sample film.
        clip: Part, frame size and frame rate to take.
        frames: Number of frames to read back: the clip is cut into as many equal parts, and one is read from each.
        seed: Random seed of the frames' positions in those parts.
        compression: Patch tokens per memory token.
        trained: Methods with a trained model. For each of them the same part is also taken at the size and rate of
            its model, and compared with the other methods at the same number and width of tokens.
        profile: Configuration of the memory profile.
    """

    video: Annotated[Path | None, PathName()] = None
    clip: ClipSpec = ClipSpec()
    frames: Annotated[int, positive(10_000)] = 8
    seed: Annotated[int, not_negative(MOST_SEED)] = 0
    compression: Compression = Compression()
    trained: Annotated[tuple[MethodName, ...], Entries(0, 100)] = ()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        have = f"DemoConfig: trained must be methods with a trained model ({listed(trained(), 'and')})"
        require(set(self.trained) <= set(trained()), have, self.trained)


def run_demo(config: DemoConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the demo and write report.json, memory files and pictures to a folder.

    Args:
        config: Configuration of the demo.
        out: Output folder; made if it is missing, filled only after everything has succeeded. After an interrupt it
            gets the finished memory files, unless it holds an earlier demo.
        progress: Called with (description, steps done, steps in total or None).

    Returns:
        The content of report.json.

    Raises:
        UserError: A mistake that the user can fix; no files are left.
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
    """Move the memory files of an interrupted demo to its folder, unless that holds the report of another demo."""
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
        room = max(METHODS[name].room for name in untrained())
        clip = load_clip(video, config.clip, room, lambda *n: tell("decode", *n))
    if config.frames > len(clip.frames):
        raise UserError(
            f"the clip has {len(clip.frames)} frames, --frames asks for {config.frames} of them; "
            f"give --frames in [1, {len(clip.frames)}]"
        )
    chosen = _choose(config, clip)
    sources = clip.frames[chosen]
    result = {
        "format": "vidmem.demo",
        "version": 2,
        "what": WHAT,
        "video": _describe(clip, config.clip.start),
        "config": {"seed": config.seed, "frames": config.frames, "compression": asdict(config.compression)},
        "context_tokens_before": context_tokens(clip.size, DCTCodec.stride),
        "methods": {},
    }
    with stages.measure("encode"):
        latents = _encode(clip, tell)
    del clip
    for name in untrained():
        file = folder / f"memory-{name}.safetensors"
        with stages.measure(f"compress, {name}"):
            compressed = compress(latents, CompressorConfig(method=name, compression=config.compression), progress=tell)
        tell(f"store, {name}", 0, None)
        with stages.measure(f"store, {name}"):
            write_memory(file, compressed)
        result["methods"][name] = _stored(file, compressed, result["context_tokens_before"])
        del compressed
    fps = latents.fps
    del latents
    retrieved = {
        method: _retrieve(f"retrieve, {method}", folder / entry["file"], chosen, stages, tell)
        for method, entry in result["methods"].items()
    }
    with stages.measure("compare"):
        _compare(result["methods"], retrieved, chosen, sources, fps)
    sheets = {"contact_sheet.png": (result, sources, retrieved)}
    for name in trained():
        result[name] = None
        if name in config.trained:
            result[name], *frames = _run_trained(name, config, video, folder, stages, tell)
            sheets[f"contact_sheet_{name}.png"] = (result[name], *frames)
    with stages.measure("memory profile"):
        curve = profile(config.profile, device, progress=lambda what, *n: tell(what, *n))
    write_json(folder / "memory_vs_context.json", curve)
    result["skipped"] = plots_missing()
    if result["skipped"] is None:
        tell("pictures", 0, None)
        with stages.measure("pictures"):
            write_memory_plot(folder / "memory_vs_context.png", curve)
            for sheet, (part, originals, read) in sheets.items():
                images = {method: frames for method, (frames, _) in read.items()}
                write_memories_sheet(folder / sheet, part, originals, images)
    result["files"] = sorted(file.name for file in folder.iterdir()) + ["report.json"]
    result["stages"] = stages.done
    result["device"] = describe_device("cpu")
    result["versions"] = versions()
    return result


def _choose(config: DemoConfig, clip: Clip) -> list[int]:
    """Choose the frames to read back: one from each of `config.frames` equal parts of the clip, in order.

    Each is drawn from the middle half of its part, so that neighbours in the sheet are never near duplicates.
    """
    random_ = random.Random(config.seed)
    count = min(config.frames, len(clip.frames))
    bounds = [i * len(clip.frames) // count for i in range(count + 1)]
    margins = [(end - start) // 4 for start, end in itertools.pairwise(bounds)]
    return [
        random_.randrange(start + margin, end - margin)
        for (start, end), margin in zip(itertools.pairwise(bounds), margins, strict=True)
    ]


def _encode(clip: Clip, tell: Progress) -> EncodedClip:
    """Encode all latents of a clip once, for several methods."""
    made = encoded(clip)
    total, latents = made.codec.latent_frames(len(clip.frames)), []
    for chunk in made.latents:
        latents.append(chunk)
        tell("encode", sum(c.shape[2] for c in latents), total)
    return replace(made, latents=latents)


def _run_trained(
    name: str, config: DemoConfig, video: Path, folder: Path, stages: Stages, tell: Progress
) -> tuple[dict[str, Any], torch.Tensor, _Retrieved]:
    """Run the demo at the size and rate of a method's model, for a history of its training length.

    Returns:
        Results, source frames, frames read back.
    """
    asked = CompressorConfig(name)
    opened = METHODS[name].load().open_model(asked.model_name)
    model = opened.model.config
    start, seconds = config.clip.start, config.clip.seconds
    if config.video is None and opened.held_out:
        start = opened.held_out[0][0]  # a part of the sample film that was not used in training
    if opened.seconds:
        seconds = min(opened.seconds, seconds or opened.seconds)
    size = f"{model.height}x{model.width}"
    with stages.measure(f"decode, {size}"):
        spec = ClipSpec(model.height, model.width, model.fps, start, seconds)
        clip = load_clip(video, spec, METHODS[name].room, lambda *n: tell(f"decode, {size}", *n))
    chosen = _choose(config, clip)
    before = context_tokens(clip.size, opened.vae.stride)
    result: dict[str, Any] = {"video": _describe(clip, start), "context_tokens_before": before, "methods": {}}
    for method in (name, *untrained()):
        file = folder / f"memory-{method}-{size}.safetensors"
        if file.exists():  # written for another model of this size
            file = folder / f"memory-{method}-{size}-{name}.safetensors"
        tell(f"compress, {method}, {size}", 0, None)
        with stages.measure(f"compress, {method}, {size}"):
            if method == name:
                compressed = compress(clip, asked)
            else:
                compressed = compress_alike(method, clip, model.encoders[0].compression, model.dit.dim)
            write_memory(file, compressed)
        result["methods"][method] = _stored(file, compressed, before)
    sources, fps = clip.frames[chosen], clip.fps
    del clip
    retrieved = {
        method: _retrieve(f"retrieve, {method}, {size}", folder / entry["file"], chosen, stages, tell)
        for method, entry in result["methods"].items()
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
    retrieved: _Retrieved,
    chosen: list[int],
    sources: torch.Tensor,
    fps: float,
) -> None:
    """Add the quality of each method's frames to its results."""
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
    stage: str, file: Path, chosen: list[int], stages: Stages, tell: Progress
) -> tuple[list[torch.Tensor], list[float]]:
    """Open the memory file and read the chosen frames; return the images and the seconds of each."""
    images: list[torch.Tensor] = []
    times = []
    with stages.measure(stage):
        memory = read_memory(file)
        for index in chosen:
            times.append(timed(lambda index=index: images.append(memory.retrieve(index))))
            tell(stage, len(images), len(chosen))
    return images, times


def _finite(value: float) -> float | None:
    """Replace infinity, the PSNR of equal images, by None, because JSON has no infinity."""
    return value if math.isfinite(value) else None


def _kernels(choices: list[Choice]) -> dict[str, dict[str, list[str]]]:
    """Map op -> device -> backends that ran it."""
    used: dict[str, dict[str, list[str]]] = {}
    for choice in choices:
        backends = used.setdefault(choice.op, {}).setdefault(choice.device, [])
        if choice.backend not in backends:
            backends.append(choice.backend)
    return dict(sorted(used.items()))
