"""Generate a video segment by segment, with a memory that grows by the same number of tokens per segment.

Each segment is denoised from noise by flow matching, conditioned on the memory of everything before, on the last clean
latent frames, and on the prompt of the shot nearest to its middle. Then it is decoded and encoded, and its tokens are
appended to the memory (arXiv 2512.23851).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from ..checks import (
    MOST_SECONDS,
    MOST_SEED,
    Checked,
    PathName,
    SamplerSteps,
    not_negative,
    parse_json,
    positive,
    require,
)
from ..errors import MemoryFormatError, UserError
from ..files import beside, cannot_write, check_file, locked, remove_parts, write_json
from ..model.dit import KVCache
from ..model.encoder import MemoryTokens
from ..model.flow import sample
from ..model.memory_model import MemoryModel
from ..vae import PATCH, VideoCodec, frames_to_float, frames_to_uint8, pad_frames
from ..video import read_clip
from ..video.clip import ClipSpec
from ..video.write import video_writer
from ..weights import WeightsFile, write_tensors
from .history import GrowingMemory
from .storyboard import Storyboard

_FORMAT = "vidmem.segment"
_VERSION = 1
_SETTINGS = "settings.json"
# Names of the files that are kept until the video is finished.
PARTS = ("segment-*.safetensors", _SETTINGS)
# Values of every weight that go into the fingerprint of a model; training changes all of them.
_FINGERPRINT_VALUES = 1024


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Settings of `generate`.

    Args:
        seconds: Length of the video, in seconds; None for that of the storyboard.
        steps: Number of denoising steps (Euler) per segment.
        seed: Random seed of the noise.
        segment: Latent frames denoised together.
        window: Number of clean latent frames before a segment that the model reads beside the memory; None for the
            number it was trained with, 0 for none.
        guidance: Scale of classifier-free guidance; 1 turns it off, other values double the time.
        shift: Timestep shift of flow matching; None for that of training.
        cross_attention: Whether the memory is also read by cross-attention; None if the model was trained so.
        kv_cache: Whether the history's keys and values are reused in all denoising steps of a segment; None to
            reuse them only if the result is the same.
        start: Video file to continue; the result follows it and does not repeat it.

    Raises:
        ValueError: A value is out of range.
    """

    seconds: Annotated[float | None, positive(MOST_SECONDS)] = None
    steps: SamplerSteps = 16
    seed: Annotated[int, not_negative(MOST_SEED)] = 0
    segment: Annotated[int, positive(100_000)] = 6
    window: Annotated[int | None, not_negative(100_000)] = None
    guidance: Annotated[float, not_negative(1e6)] = 1.0
    shift: Annotated[float | None, positive(1000)] = None
    cross_attention: bool | None = None
    kv_cache: bool | None = None
    start: Annotated[Path | None, PathName()] = None


class Progress(NamedTuple):
    """Progress of `generate`.

    Attributes:
        segment: Number of the current segment, from 1.
        segments: Number of all segments.
        step: Denoising steps done of the current segment.
        steps: Denoising steps of a segment.
        seconds: Length of video generated so far, in seconds.
        context: Tokens of memory and clean frames that the current segment reads.
        left: Estimated time left, in seconds; None before the first step.
    """

    segment: int
    segments: int
    step: int
    steps: int
    seconds: float
    context: int
    left: float | None


class SegmentGenerator:
    """Generates the segments of a video one by one, and appends each to the history.

    Args:
        model: The model.
        vae: Its VAE.
        config: Settings; `start` is not used.

    Attributes:
        memory: Memory of the history.
        frames: Latent frames of the history.

    Raises:
        UserError: The settings ask for cross-attention or a KV cache that the model does not support.
    """

    def __init__(self, model: MemoryModel, vae: VideoCodec, config: GenerateConfig) -> None:
        model.config.require_boxes()
        self.model, self.vae, self.config = model, vae, config
        own = model.config.dit
        if config.cross_attention and not own.memory_cross_attention:
            raise UserError("this model has no cross-attention to the memory; leave out --cross-attention")
        if config.kv_cache and own.diffusers is not None:
            raise UserError("a diffusers transformer supports no KV cache; leave out --kv-cache")
        self.cross_attention = own.memory_cross_attention and config.cross_attention is not False
        self.keep = config.kv_cache if config.kv_cache is not None else not own.history_sees_video
        self.window_length = own.window if config.window is None else config.window
        self.device = model.device
        self.memory = GrowingMemory(model, vae)
        self.cache: dict = {}  # of the VAE's decoder
        self.frames = 0
        self.window: torch.Tensor | None = None

    @property
    def context(self) -> tuple[int, int]:
        """Number of memory tokens, and of tokens of clean frames, that the next segment reads."""
        tokens = self.memory.tokens
        clean = self.window.shape[2:] if self.window is not None else (0, 0, 0)
        return tokens.tokens.shape[1] if tokens else 0, clean[0] * (clean[1] // PATCH) * (clean[2] // PATCH)

    @torch.inference_mode()
    def make(self, prompt: str, number: int, step: Callable[[int], None]) -> torch.Tensor:
        """Generate the segment after the history.

        Args:
            prompt: Prompt of the segment.
            number: Number of the segment, from 0; the noise depends on this number and the seed only.
            step: Called after each denoising step with the number of steps done.

        Returns:
            float32 (1, C, segment, H, W), scaled latents.
        """
        config, count = self.config, self.config.segment
        # With seed + number instead, runs of neighbouring seeds would share noise.
        seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1, np.uint64)[0] >> 1)
        shape = (1, self.model.config.vae.channels, count, *self.model.config.latent_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        prompts = [prompt] if config.guidance == 1 else [prompt, ""]
        text, b = self.model.text(prompts), len(prompts)
        tokens = self.memory.tokens
        given = {
            "frames": self._places(self.frames, count).expand(b, -1),
            "memory": MemoryTokens(*(x.expand(b, -1, -1) for x in tokens)) if tokens else None,
            "cache": KVCache() if self.keep else None,
            "memory_cross_attention": self.cross_attention,
        }
        if self.window is not None:
            length = self.window.shape[2]
            given["window"] = self.window.expand(b, -1, -1, -1, -1)
            given["window_frames"] = self._places(self.frames - length, length).expand(b, -1)
        done = 0

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            nonlocal done
            both = self.model.dit(x.expand(b, -1, -1, -1, -1), t.expand(b), *text, **given)
            done += 1
            step(done)
            with_prompt, without = both[:1], both[1:]
            return without + config.guidance * (with_prompt - without) if len(without) else with_prompt

        return sample(velocity, noise, config.steps, config.shift or self.model.config.shift)

    @torch.inference_mode()
    def take_in(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode a segment as the continuation of the history and append it to the memory, part by part.

        Args:
            latents: (1, C, T, H, W), scaled latents of the segment.

        Returns:
            Iterator over its frames, uint8 (t, H', W', 3).
        """
        height, width = self.model.config.height, self.model.config.width
        for part in latents.split(self.vae.chunk, 2):
            frames = self.vae.decode(self.vae.unscale(part), self.cache)
            # Rounded to uint8 as in a video file, so that a generated history equals one read from a file.
            pictures = frames_to_uint8(frames[..., :height, :width])
            self._remember(part, frames_to_float(pictures))
            yield pictures

    @torch.inference_mode()
    def start_from(self, frames: torch.Tensor) -> None:
        """Set the history to the frames of an existing video.

        Args:
            frames: uint8 (T, H', W', 3), of the model's size; first frames that do not fill a latent frame are dropped.

        Raises:
            UserError: The frames do not fill a single latent frame.
        """
        vae = self.vae
        count = vae.latent_frames(len(frames))
        count -= vae.video_frames(count) > len(frames)
        if count < 1:
            raise UserError(f"--start must be a video of at least {vae.first_frames} frames, got {len(frames)}")
        frames = frames[len(frames) - vae.video_frames(count) :]
        multiple = (1, vae.stride[1] * PATCH, vae.stride[2] * PATCH)
        cache: dict = {}
        sizes = [vae.video_frames(min(vae.chunk, count))]
        while sum(sizes) < len(frames):
            sizes.append(min(vae.chunk * vae.stride[0], len(frames) - sum(sizes)))
        for part in frames.split(sizes):
            clip = frames_to_float(part.to(self.device))
            latents = vae.scale(vae.encode(pad_frames(clip, multiple), cache)).float()
            vae.decode(vae.unscale(latents), self.cache)  # only to fill the decoder's cache
            self._remember(latents, clip)

    def _remember(self, latents: torch.Tensor, frames: torch.Tensor) -> None:
        self.memory.append(latents, frames)
        self.frames += latents.shape[2]
        if self.window_length:
            before = [] if self.window is None else [self.window]
            self.window = torch.cat([*before, latents], 2)[:, :, -self.window_length :].clone()

    def _places(self, start: int, count: int) -> torch.Tensor:
        return torch.arange(start, start + count, device=self.device, dtype=torch.float32)[None]


def generate(
    storyboard: Storyboard,
    model: MemoryModel,
    vae: VideoCodec,
    output: Path,
    config: GenerateConfig,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Generate a video from a storyboard and write it to an MP4 file.

    The latents of finished segments are kept in a folder beside the output until the video is finished. After an
    interrupt, the same call resumes after the last finished segment and gives the same video.

    Args:
        storyboard: Shots with start times and prompts, from `read_storyboard`.
        model: The model, from `load_model`.
        vae: Its VAE, from `load_vae`, on the same device.
        output: File *.mp4 to write.
        config: Settings.
        restart: Discard the segments of an interrupted call.
        progress: Called after every denoising step.

    Returns:
        A report: seconds, frames and latent frames of the video, tokens of memory and of clean frames before each
        segment and after the last, `context_per_second`, and the seconds it took.

    Raises:
        UserError: Neither `config` nor the storyboard gives a length, the output cannot be written, or an interrupted
            call with other settings has left segments.
    """
    began = time.perf_counter()
    seconds = config.seconds or storyboard.seconds
    if seconds is None:
        raise UserError("the length of the video is missing; give --seconds, or `seconds` in the storyboard")
    fps = model.config.fps
    asked = max(1, round(seconds * fps))
    generator = SegmentGenerator(model, vae, config)
    check_file(output)
    with locked(beside(output), output):
        return _generate(storyboard, generator, output, asked, restart, progress, began)


def parts_of(output: Path) -> Path:
    """Folder that keeps the segments of a video until it is finished."""
    return output.with_name(f"{output.name}.parts")


def _generate(
    storyboard: Storyboard,
    generator: SegmentGenerator,
    output: Path,
    asked: int,
    restart: bool,
    progress: Callable[[Progress], None] | None,
    began: float,
) -> dict[str, Any]:
    model, vae, config, fps = generator.model, generator.vae, generator.config, generator.model.config.fps
    parts = parts_of(output)
    _open_parts(parts, _settings(storyboard, model, vae, config, asked), restart)
    if config.start is not None:
        spec = ClipSpec(model.config.height, model.config.width, fps, seconds=None)
        generator.start_from(read_clip(config.start, spec).frames)
    before = generator.frames
    most = asked - _frames_after(vae, before, 1)  # video frames of all latent frames after the next one
    segments = max(1, -(-(1 + -(-most // vae.stride[0])) // config.segment))

    memory: list[int] = []
    clean: list[int] = []
    found = 0
    started, steps_done = 0.0, 0

    def tell(number: int, made: int, done: int) -> None:
        nonlocal steps_done
        steps_done += 1
        if progress is not None:
            left = (segments - number) * config.steps - done
            pace = (time.perf_counter() - started) / steps_done
            context = memory[-1] + clean[-1]
            progress(Progress(number + 1, segments, done, config.steps, made / fps, context, pace * left))

    with video_writer(output, fps) as write:
        for number in range(segments):
            for counts, count in zip((memory, clean), generator.context, strict=True):
                counts.append(count)
            made = _frames_after(vae, before, number * config.segment)
            file = parts / f"segment-{number:05d}.safetensors"
            if file.exists():
                latents = _read_segment(file, generator)
                found += 1
            else:
                started = started or time.perf_counter()
                middle = (made + _frames_after(vae, before, (number + 1) * config.segment)) / 2 / fps
                prompt = storyboard.prompt_at(middle)
                latents = generator.make(prompt, number, functools.partial(tell, number, made))
                write_tensors(file, {"latents": latents}, {"format": _FORMAT, "version": str(_VERSION)})
            for pictures in generator.take_in(latents):
                if made < asked:  # the last segment may be longer than the rest of the video
                    write(pictures[: asked - made])
                made += len(pictures)
    remove_parts(parts, PARTS)
    memory.append(generator.context[0])
    clean.append(generator.context[1])
    per_latent = vae.stride[0] / fps
    return {
        "output": str(output),
        "seconds": asked / fps,
        "frames": asked,
        "size": [model.config.height, model.config.width],
        "fps": fps,
        "segments": segments,
        "segments_found": found,
        "latent_frames": segments * config.segment,
        "history_latent_frames": before,
        "memory_tokens": memory,
        "window_tokens": clean,
        "context_per_second": (memory[-1] - memory[0]) / (segments * config.segment * per_latent),
        "wall_seconds": time.perf_counter() - began,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
    }


def _read_segment(file: Path, generator: SegmentGenerator) -> torch.Tensor:
    """Read the latents of a segment that an earlier call generated."""
    config = generator.model.config
    shape = (1, config.vae.channels, generator.config.segment, *generator.model.config.latent_size)
    weights = WeightsFile(file, _FORMAT, _VERSION)
    if weights.shapes != {"latents": shape}:
        raise MemoryFormatError(f"{file}: is damaged; give --restart to discard the segments")
    return weights.read()["latents"].to(generator.device)


def _frames_after(vae: VideoCodec, before: int, count: int) -> int:
    """Video frames of `count` latent frames that follow `before`."""
    return vae.video_frames(before + count) - vae.video_frames(before)


def _settings(
    storyboard: Storyboard, model: MemoryModel, vae: VideoCodec, config: GenerateConfig, frames: int
) -> dict[str, Any]:
    """All settings that the latents depend on, as JSON values under the names that messages use."""
    start = None
    if config.start is not None:
        try:
            start = hashlib.sha256(config.start.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"{config.start}: cannot be read ({error.strerror}); give --start the path of a video"
            ) from error
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("seconds", "start")}
    shots = [[shot.at, shot.prompt] for shot in storyboard.shots]
    values |= {
        "frames": frames,
        "start": start,
        "storyboard": {"shots": shots, "style": storyboard.style},
        "model": _fingerprint(model),
        "vae": _fingerprint(vae),
    }
    return json.loads(json.dumps(values))


def _fingerprint(part: Any) -> str:
    kind = repr(part.config) if hasattr(part, "config") else part.channels
    if isinstance(part, MemoryModel):  # in the form of the first versions, so that their videos can be resumed
        kind = re.sub(r"compression=Compression\(time=(\d+), height=(\d+), width=(\d+)\)", r"rate=(\2, \3, \1)", kind)
        kind = re.sub(r"(mlp=\d+), ", r"\1, patch=2, ", kind)
        for later in (", width=0", ", diffusers=None", ", memory_in_sequence=True", ", lora_rank=0"):
            kind = kind.replace(later, "")
    digest = hashlib.sha256(f"{type(part).__name__} {kind}".encode())
    for name, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:_FINGERPRINT_VALUES].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _open_parts(parts: Path, settings: dict[str, Any], restart: bool) -> None:
    """Make the folder of segments, or check that an existing one has the same settings."""
    if restart:
        remove_parts(parts, PARTS)
    file = parts / _SETTINGS
    if file.is_file():
        try:
            found = parse_json(file.read_text(), "settings")
            require(isinstance(found, dict), "settings must be a mapping of keys to values", found)
        except ValueError as error:
            raise MemoryFormatError(f"{file}: is damaged; give --restart to discard the segments") from error
        other = [name for name in settings if settings[name] != found.get(name)]
        if other:
            name, was, now = other[0], found.get(other[0]), settings[other[0]]
            # The values of a digest or a whole storyboard would not help a reader.
            values = "" if isinstance(now, (dict, str)) or isinstance(was, str) else f" ({was}, this run has {now})"
            raise UserError(
                f"{parts}: holds segments of an interrupted run with another {name}{values}; "
                "give the same settings to resume, or --restart to discard them"
            )
        return
    try:
        parts.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(parts, error) from error
    write_json(file, settings)
