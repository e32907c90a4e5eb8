"""Commands that make memory files and read them: demo, compress, retrieve."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from ..checks import OneOf, SamplerSteps
from ..errors import UserError
from ..progress import note, progress_bar
from .app import app
from .options import Seconds, Video, checked, configured, parse_fps, parse_lengths, parse_rate, parse_size


@app.command()
def demo(
    video: Annotated[Path | None, typer.Argument(help="A video file; without one, a sample film is fetched.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo_output"),
    seconds: Seconds = 20.0,
    start: Annotated[float | None, typer.Option(help="First second to take; 0, or 60 in the sample film.")] = None,
    size: Annotated[str | None, typer.Option(help="Height x width, or source, for dct and merge; 480x832.")] = None,
    fps: Annotated[str | None, typer.Option(help="Frames per second, or source, for dct and merge; 24.")] = None,
    rate: Annotated[
        str | None, typer.Option(help="Patch tokens per token of dct and merge, height x width x time; 4x4x2.")
    ] = None,
    frames: Annotated[int, typer.Option(help="How many frames to read back.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the positions of those frames.")] = 0,
    lengths: Annotated[str, typer.Option(help="Seconds of history that the memory profile measures at.")] = "1,5,20",
) -> None:
    """Compress 20 s of video, read random frames back, compare, plot memory.

    dct and merge run at --size; the trained model beside them at its own, unless --size, --fps or --rate is given.

    Frames are scaled to cover the size and centre-cropped: a portrait clip is best given a portrait --size.
    """
    shape, rate_, fps_ = parse_size(size or "480x832"), parse_rate(rate or "4x4x2"), parse_fps(fps or "24")
    lengths_ = parse_lengths(lengths)
    from .. import demo as demo_
    from ..files import outputs
    from ..measure.attention import ProfileConfig
    from ..memory.learned import DEFAULT_MODEL, shipped
    from ..video.clip import ClipSpec

    if start is None:
        start = demo_.SAMPLE_START if video is None else 0.0
    clip = configured(ClipSpec, height=shape[0], width=shape[1], fps=fps_, start=start, seconds=seconds)
    config = configured(
        demo_.DemoConfig,
        video=video,
        clip=clip,
        frames=frames,
        seed=seed,
        rate=rate_,
        learned=(size, fps, rate) == (None, None, None) and shipped(DEFAULT_MODEL) is not None,
        profile=configured(ProfileConfig, lengths=lengths_),
    )
    outputs([video], folders={output: demo_.FILES})
    with progress_bar() as tell:
        result = demo_.run_demo(config, output, tell)
    taken = [part["video"]["remarks"] for part in (result, result["learned"]) if part]
    note(dict.fromkeys(itertools.chain(*taken)))
    from ..show.tables import print_demo

    print_demo(result, output)


@app.command()
def compress(
    video: Video,
    output: Annotated[Path, typer.Option("--output", "-o", help="Memory file to write.")],
    method: Annotated[str, typer.Option("--method", "-m", help="dct, merge or learned (the trained model).")] = "dct",
    size: Annotated[str | None, typer.Option(help="Height x width, or source; 480x832, learned: its own.")] = None,
    fps: Annotated[str | None, typer.Option(help="Frames per second, or source; 24, learned: its own.")] = None,
    seconds: Seconds = 20.0,
    start: Annotated[float, typer.Option(help="First second to take.")] = 0.0,
    rate: Annotated[
        str | None, typer.Option(help="Patch tokens per token, height x width x time; 4x4x2, learned: its own.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens to keep, for merge; by default what rate gives.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="Width of a dct token, 3072.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, float32, float8 or int8.")] = "float16",
) -> None:
    """Compress a video to a memory file.

    Frames are scaled to cover the size and centre-cropped: a portrait clip is best given a portrait --size.
    """
    options = {"--size": size, "--fps": fps, "--rate": rate, "--budget": budget, "--channels": channels}
    given = [name for name, value in options.items() if value is not None]
    if method == "learned" and given:
        raise UserError(f"{given[0]} is for dct and merge; the trained model has its own")
    shape, rate_, fps_ = parse_size(size or "480x832"), parse_rate(rate or "4x4x2"), parse_fps(fps or "24")
    from ..files import outputs
    from ..memory.config import METHODS, CompressorConfig
    from ..memory.learned import DEFAULT_MODEL, shipped
    from ..video.clip import ClipSpec

    checked(Annotated[str, OneOf(*METHODS, "learned")], "--method", method)

    training_free = "dct" if method == "learned" else method
    channels_ = 3072 if channels is None else channels
    config = configured(
        CompressorConfig, method=training_free, rate=rate_, channels=channels_, budget=budget, dtype=dtype
    )
    outputs([video, shipped(DEFAULT_MODEL)], [output])
    import torch

    from ..demo import context_tokens, load_clip
    from ..memory.dct import compress as compress_
    from ..memory.file import write_memory
    from ..vae import DCTCodec

    codec = DCTCodec()
    if method == "learned":
        from ..memory.learned import compress_learned, open_shipped

        model = open_shipped(DEFAULT_MODEL).model.config
        shape, fps_ = (model.height, model.width), model.fps
    clip_spec = configured(ClipSpec, height=shape[0], width=shape[1], fps=fps_, start=start, seconds=seconds)
    with progress_bar() as tell:
        step = (lambda name: lambda *n: tell(name, *n)) if tell else lambda _: None
        clip = load_clip(video, clip_spec, method, step("decode"))
        note(clip.remarks)
        shape_ = tuple(clip.frames.shape[:3])
        if method == "learned":
            memory = compress_learned(clip.frames, dtype=dtype)
        else:
            latents = codec.encode_chunks(clip.frames.split(2 * codec.stride[0]), torch.float16)
            memory = compress_(latents, codec, shape_, config, step(f"compress, {method}"))
        write_memory(output, memory, fps=clip.fps, source=clip.source.name)
    before, after = context_tokens(shape_, codec), len(memory.tokens)
    short = f" (the video ends before {seconds:g} s)" if clip.short else ""
    print(
        f"{output}: {shape_[0]} frames of {shape_[1]}x{shape_[2]} at {clip.fps:g} fps{short}, "
        f"{before:,} -> {after:,} tokens ({before / after:.1f}x), "
        f"{output.stat().st_size / 1e6:.1f} MB (sizes are height x width)"
    )


@app.command()
def retrieve(
    memory: Annotated[Path, typer.Argument(help="A memory file that vidmem wrote.")],
    frame: Annotated[int, typer.Option(help="Which frame to read, from 0.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the sampler, for a learned memory.")] = None,
) -> None:
    """Read one frame from a memory file."""
    from ..files import outputs
    from ..memory.file import read_memory
    from ..video.png import write_png

    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: frames are written as PNG; give a name that ends in .png")
    checked(SamplerSteps | None, "--steps", steps)
    outputs([memory], [output])
    opened = read_memory(memory)
    image = opened.retrieve(frame, steps)
    write_png(output, image)
    print(
        f"{output}: frame {frame} of {opened.frames} ({frame / opened.fps:.2f} s), "
        f"{opened.height}x{opened.width} (height x width), from {len(opened.bank):,} {opened.method} tokens"
    )
