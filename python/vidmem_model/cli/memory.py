"""The commands that write and read memory files: demo, compress, retrieve."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from ..checks import SamplerSteps
from ..errors import UserError
from ..memory import METHODS, MethodName, listed, takers, trained, untrained
from ..progress import note, progress_bar
from .app import app
from .options import Seconds, Video, checked, configured, parse_fps, parse_lengths, parse_rate, parse_size

_ANY_SIZE = listed(untrained(), "and")
_SIZE = "Frame size in pixels, height x width, or source to keep that of the video."
_FPS = "Frames per second, or source to keep those of the video."
_RATE = "Compression rate: patch tokens per memory token, height x width x time."
_FIXED = f"Not allowed with --method {listed(trained(), 'or')}."
_METHODS = [f"{each.name} ({each.about})" if each.about else each.name for each in METHODS.values()]


@app.command()
def demo(
    video: Annotated[
        Path | None, typer.Argument(help="Video file to compress; without one, a sample film is downloaded.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output folder for memory files, pictures and report.json.")
    ] = Path("demo_output"),
    seconds: Seconds = 20.0,
    start: Annotated[
        float | None,
        typer.Option(help="Start of the part to compress, in seconds.", show_default="0, or 60 in the sample film"),
    ] = None,
    size: Annotated[str | None, typer.Option(help=f"{_SIZE} Used by {_ANY_SIZE}.", show_default="480x832")] = None,
    fps: Annotated[str | None, typer.Option(help=f"{_FPS} Used by {_ANY_SIZE}.", show_default="24")] = None,
    rate: Annotated[str | None, typer.Option(help=f"{_RATE} Used by {_ANY_SIZE}.", show_default="4x4x2")] = None,
    frames: Annotated[
        int, typer.Option(help="Number of frames to read back, one from each equal part of the clip.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Random seed that chooses a frame in each part.")] = 0,
    lengths: Annotated[
        str, typer.Option(help="History lengths at which attention memory is measured, in seconds.")
    ] = "1,2,5,10,20",
) -> None:
    """Compress 20 s of video with every method, read frames back and compare them.

    dct and merge use --size, --fps and --rate. The trained model has a fixed frame size and frame rate; it runs only
    if none of these options is given.

    Frames are scaled to cover --size, then centre-cropped: for a portrait video give a portrait size, such as 832x480.
    """
    at_default = (size, fps, rate) == (None, None, None)
    shape, fps_ = parse_size(size or "480x832"), parse_fps(fps or "24")
    lengths_ = parse_lengths(lengths)
    rate_ = parse_rate(rate or "4x4x2")
    from ..demo import FILES, SAMPLE_START, DemoConfig, run_demo
    from ..files import outputs
    from ..measure.attention import ProfileConfig
    from ..shipped import shipped
    from ..show.tables import print_demo
    from ..video.clip import ClipSpec

    if start is None:
        start = SAMPLE_START if video is None else 0.0
    clip = configured(ClipSpec, height=shape[0], width=shape[1], fps=fps_, start=start, seconds=seconds)
    config = configured(
        DemoConfig,
        video=video,
        clip=clip,
        frames=frames,
        seed=seed,
        compression=rate_,
        trained=[name for name in trained() if at_default and shipped(METHODS[name].model)],
        profile=configured(ProfileConfig, lengths=lengths_),
    )
    outputs([video], folders={output: FILES})
    with progress_bar() as tell:
        result = run_demo(config, output, tell)
    taken = [part["video"]["remarks"] for part in (result, *(result[name] for name in trained())) if part]
    note(dict.fromkeys(itertools.chain(*taken)))
    print_demo(result, output)


@app.command()
def compress(
    video: Video,
    output: Annotated[Path, typer.Option("--output", "-o", help="Memory file to write, in the safetensors format.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help=f"Compression method: {listed(_METHODS, 'or')}.")
    ] = "dct",
    size: Annotated[str | None, typer.Option(help=f"{_SIZE} {_FIXED}", show_default="480x832")] = None,
    fps: Annotated[str | None, typer.Option(help=f"{_FPS} {_FIXED}", show_default="24")] = None,
    seconds: Seconds = 20.0,
    start: Annotated[float, typer.Option(help="Start of the part to compress, in seconds.")] = 0.0,
    rate: Annotated[str | None, typer.Option(help=f"{_RATE} {_FIXED}", show_default="4x4x2")] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Number of memory tokens to keep; requires --method {listed(takers('budget'), 'or')}.",
            show_default="the number that --rate gives",
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help=f"Channels of a memory token, for --method {listed(takers('channels'), 'or')}.", show_default="3072"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Storage format of the tokens: float16, float32, float8 or int8.")
    ] = "float16",
) -> None:
    """Compress a video to a memory file.

    Frames are scaled to cover --size, then centre-cropped: for a portrait video give a portrait size, such as 832x480.
    """
    options = {"--size": size, "--fps": fps, "--rate": rate, "--budget": budget, "--channels": channels}
    given = [name for name, value in options.items() if value is not None]
    model = METHODS[method].model if method in METHODS else None
    if model and given:
        raise UserError(
            f"{given[0]} is not allowed with --method {method}: {METHODS[method].about} has a fixed one; "
            f"leave it out, or choose --method {listed(untrained(), 'or')}"
        )
    shape, fps_ = parse_size(size or "480x832"), parse_fps(fps or "24")
    rate_ = parse_rate(rate or "4x4x2")
    from ..files import outputs
    from ..memory.config import CompressorConfig
    from ..shipped import shipped
    from ..video.clip import ClipSpec

    checked(MethodName, "--method", method)
    channels_ = 3072 if channels is None else channels
    config = configured(
        CompressorConfig, method=method, compression=rate_, channels=channels_, budget=budget, dtype=dtype
    )
    outputs([video, *(shipped(METHODS[name].model) for name in trained())], [output])
    from ..memory import compressor
    from ..memory.file import write_memory
    from ..memory.method import context_tokens
    from ..vae import DCTCodec
    from ..video import load_clip

    if model:
        *shape, fps_ = compressor.raster(config)
    spec = configured(ClipSpec, height=shape[0], width=shape[1], fps=fps_, start=start, seconds=seconds)
    with progress_bar() as tell:
        clip = load_clip(video, spec, METHODS[method].room, tell and (lambda *n: tell("decode", *n)))
        note(clip.remarks)
        memory = compressor.compress(clip, config, progress=tell)
        write_memory(output, memory)
    before, after = context_tokens(clip.size, DCTCodec.stride), len(memory.tokens)
    frames, height, width = clip.size
    short = f" (the video ends before {seconds:g} s)" if clip.short else ""
    print(
        f"{output}: {frames} frames of {height}x{width} at {clip.fps:g} fps{short}, "
        f"{before:,} -> {after:,} tokens ({before / after:.1f}x), "
        f"{output.stat().st_size / 1e6:.1f} MB (sizes are height x width)"
    )


@app.command()
def retrieve(
    memory: Annotated[Path, typer.Argument(help="Memory file that `vidmem compress` wrote.")],
    frame: Annotated[int, typer.Option(help="Number of the frame to read, counted from 0.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Number of denoising steps; requires a memory of --method {listed(takers('steps'), 'or')}.",
            show_default="8",
        ),
    ] = None,
) -> None:
    """Read one frame from a memory file and write it as PNG."""
    from ..files import outputs
    from ..memory.file import read_memory
    from ..video.png import write_png

    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: frames are written as PNG; give --output a name that ends in .png")
    checked(SamplerSteps | None, "--steps", steps)
    outputs([memory], [output])
    opened = read_memory(memory)
    image = opened.retrieve(frame, steps)
    write_png(output, image)
    print(
        f"{output}: frame {frame} of {opened.frames} ({frame / opened.fps:.2f} s), "
        f"{opened.height}x{opened.width} (height x width), from {len(opened.bank):,} {opened.method} tokens"
    )
