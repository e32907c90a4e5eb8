"""Generation of a video segment by segment, with a memory that grows by the same number of tokens each time.

A segment starts as noise and becomes latent frames by flow matching, given the memory of all that came
before, the last clean latent frames and the prompt of the storyboard's shot nearest to its middle. Then
it is decoded, encoded on its own, and its tokens are appended to the memory (arXiv 2512.23851).
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
# Names of what is kept until the video is whole.
PARTS = ("segment-*.safetensors", _SETTINGS)
# Values of every weight that tell one model from another: training changes them all.
_FINGERPRINT_VALUES = 1024


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """How a video is made.

    Args:
        seconds: length, or None for the storyboard's.
        steps: Euler steps a segment.
        seed: of the noise.
        segment: latent frames made together.
        window: clean latent frames before a segment, or None for the model's own number.
        guidance: scale of classifier-free guidance; 1 is none, and takes half the time of others.
        shift: of the steps' times towards the noise, or None for the model's own.
        cross_attention: whether blocks read the memory by cross-attention too, or None for the model's own way.
        kv_cache: whether the history's keys and values are kept over the steps of a segment, or None
            for only where that changes nothing.
        start: a video to continue; what is made follows it and does not repeat it.

    Raises:
        ValueError: a value is out of range.
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
    """How far the work is.

    Attributes:
        segment, segments: number of the present one, from 1, and of all.
        step, steps: of the present segment that are done, and of all.
        seconds: of video that are made.
        context: tokens of memory and clean frames that the present segment is made from.
        left: seconds of work left; None before a step is done.
    """

    segment: int
    segments: int
    step: int
    steps: int
    seconds: float
    context: int
    left: float | None


class SegmentGenerator:
    """Makes the segments of a video, and takes each in as history.

    Args:
        model, vae: the model and its VAE.
        config: how the video is made; its `start` is not looked at.

    Attributes:
        memory: of the history.
        frames: latent frames of the history.

    Raises:
        UserError: the configuration asks for cross-attention or a cache that the model lacks.
    """

    def __init__(self, model: MemoryModel, vae: VideoCodec, config: GenerateConfig) -> None:
        model.config.require_boxes()
        self.model, self.vae, self.config = model, vae, config
        own = model.config.dit
        if config.cross_attention and not own.memory_cross_attention:
            raise UserError("this model has no cross-attention to the memory; leave --cross-attention out")
        if config.kv_cache and own.diffusers is not None:
            raise UserError("a transformer of diffusers keeps no keys and values; leave --kv-cache out")
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
        """Tokens of the memory, and of the clean frames, that the next segment is made from."""
        tokens = self.memory.tokens
        clean = self.window.shape[2:] if self.window is not None else (0, 0, 0)
        return tokens.tokens.shape[1] if tokens else 0, clean[0] * (clean[1] // PATCH) * (clean[2] // PATCH)

    @torch.inference_mode()
    def make(self, prompt: str, number: int, step: Callable[[int], None]) -> torch.Tensor:
        """Make the segment after the history.

        Args:
            prompt: what it shows.
            number: of the segment, from 0; noise depends on it and the seed alone.
            step: called with the number of steps done after each.

        Returns:
            float32 (1, C, segment, H, W), scaled.
        """
        config, count = self.config, self.config.segment
        # Two runs of neighbouring seeds share no noise, as they would with seed + number.
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
            latents: (1, C, T, H, W), scaled.

        Returns:
            Iterator over its frames, uint8 (t, H', W', 3).
        """
        height, width = self.model.config.height, self.model.config.width
        for part in latents.split(self.vae.chunk, 2):
            frames = self.vae.decode(self.vae.unscale(part), self.cache)
            # As the frames are read from a file, so that a history made here and one read are alike.
            pictures = frames_to_uint8(frames[..., :height, :width])
            self._remember(part, frames_to_float(pictures))
            yield pictures

    @torch.inference_mode()
    def start_from(self, frames: torch.Tensor) -> None:
        """Take in a history that was filmed.

        Args:
            frames: uint8 (T, H', W', 3), of the model's size; the first that fill no latent frame are left out.

        Raises:
            UserError: there is not a single latent frame of them.
        """
        vae = self.vae
        count = vae.latent_frames(len(frames))
        count -= vae.video_frames(count) > len(frames)
        if count < 1:
            raise UserError(f"--start must have at least {vae.first_frames} frames, got {len(frames)}")
        frames = frames[len(frames) - vae.video_frames(count) :]
        multiple = (1, vae.stride[1] * PATCH, vae.stride[2] * PATCH)
        cache: dict = {}
        sizes = [vae.video_frames(min(vae.chunk, count))]
        while sum(sizes) < len(frames):
            sizes.append(min(vae.chunk * vae.stride[0], len(frames) - sum(sizes)))
        for part in frames.split(sizes):
            clip = frames_to_float(part.to(self.device))
            latents = vae.scale(vae.encode(pad_frames(clip, multiple), cache)).float()
            vae.decode(vae.unscale(latents), self.cache)  # only for what its cache then holds
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
    """Make a video from a storyboard and write it to an MP4 file.

    The latents of every segment are kept in a folder beside the output until the video is whole. If the
    work is stopped, the same call goes on after the last whole segment and gives the same video.

    Args:
        storyboard: what to show.
        model, vae: the model and its VAE, on one device.
        output: a file *.mp4.
        config: how to make it.
        restart: forget the segments that an earlier call left behind.
        progress: called after every step.

    Returns:
        Report: seconds, frames, latent frames, tokens of memory and of clean frames before each segment
        and after the last, `context_per_second`, seconds of work.

    Raises:
        UserError: nothing says how long the video is to be, the output cannot be written, or segments were
            left behind that were made with other settings.
    """
    began = time.perf_counter()
    seconds = config.seconds or storyboard.seconds
    if seconds is None:
        raise UserError("nothing says how long the video is to be; give --seconds, or seconds in the storyboard")
    fps = model.config.fps
    asked = max(1, round(seconds * fps))
    generator = SegmentGenerator(model, vae, config)
    check_file(output)
    with locked(beside(output), output):
        return _generate(storyboard, generator, output, asked, restart, progress, began)


def parts_of(output: Path) -> Path:
    """Folder that keeps the segments of a video until it is whole."""
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
    most = asked - _frames_after(vae, before, 1)  # frames of the latent frames after the next one
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
                if made < asked:  # the last segment may be longer than what is left
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
    """Latents that an earlier call made."""
    config = generator.model.config
    shape = (1, config.vae.channels, generator.config.segment, *generator.model.config.latent_size)
    weights = WeightsFile(file, _FORMAT, _VERSION)
    if weights.shapes != {"latents": shape}:
        raise MemoryFormatError(f"{file}: is damaged; --restart makes the video anew")
    return weights.read()["latents"].to(generator.device)


def _frames_after(vae: VideoCodec, before: int, count: int) -> int:
    """Video frames of `count` latent frames that follow `before`."""
    return vae.video_frames(before + count) - vae.video_frames(before)


def _settings(
    storyboard: Storyboard, model: MemoryModel, vae: VideoCodec, config: GenerateConfig, frames: int
) -> dict[str, Any]:
    """All that the latents depend on, as JSON holds it, each under the name that a message calls it by."""
    start = None
    if config.start is not None:
        try:
            start = hashlib.sha256(config.start.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{config.start}: cannot be read ({error.strerror}); give the path of a video") from error
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
    if isinstance(part, MemoryModel):  # as the first versions wrote it, so that their videos go on
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
    """Make the folder of segments, or check that the one there was made with the same settings."""
    if restart:
        remove_parts(parts, PARTS)
    file = parts / _SETTINGS
    if file.is_file():
        try:
            found = parse_json(file.read_text(), "settings")
            require(isinstance(found, dict), "settings must be a mapping of keys to values", found)
        except ValueError as error:
            raise MemoryFormatError(f"{file}: is damaged; --restart makes the video anew") from error
        other = [name for name in settings if settings[name] != found.get(name)]
        if other:
            name, was, now = other[0], found.get(other[0]), settings[other[0]]
            # A digest or a whole storyboard says nothing to a reader.
            values = "" if isinstance(now, (dict, str)) or isinstance(was, str) else f" ({was}, now {now})"
            raise UserError(
                f"{parts}: holds segments made with another {name}{values}; "
                "give the same settings to go on, or --restart"
            )
        return
    try:
        parts.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(parts, error) from error
    write_json(file, settings)
