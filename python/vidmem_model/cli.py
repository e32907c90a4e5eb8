"""The command `vidmem`.

A mistake of the user ends in one line on stderr and exit code 2, an interrupt in one line and 130.
Results go to stdout, progress to stderr where that is a terminal. VIDMEM_DEBUG=1 shows tracebacks.
Modules that import torch are imported inside the commands, so that help and usage errors are quick.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from .errors import UserError

T = TypeVar("T")
# Typer brought click along as a dependency once and carries a copy now: the base class of usage
# errors is found from either.
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_INTERRUPTED = 130
_TERMINATED = 143

app = typer.Typer(
    name="vidmem",
    help="Compress a video's history to a short context and read it back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit code: 0, 2 for a mistake of the user, 1 for one of this program, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _terminable():
        return _run(arguments)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: list[str]) -> int:
    try:
        with typer.main.get_command(app).make_context("vidmem", arguments) as context:
            context.command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        _say("vidmem: interrupted; nothing was written")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`vidmem info | head`); keep Python from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("VIDMEM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        message, code = _explain(error)
        _say(f"vidmem: error: {message}")
        return code


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(_TERMINATED)


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr)


def _explain(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, _UsageProblem):
        where = getattr(getattr(error, "ctx", None), "command_path", "vidmem")
        return f"{error.format_message().rstrip('.')}; see `{where} --help`", 2
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "out of memory; take fewer --seconds or a smaller --size", 2
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory; give shorter --lengths or --device cpu", 2
    if type(error).__name__ == "BackendError":
        return f"{error}; choose another --backend or leave it out", 2
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("vidmem"):
        return f"the package {error.name} is not installed; add it with pip", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    what = f"{type(error).__name__}: {error}"
    return f"this is a bug: {what}; VIDMEM_DEBUG=1 shows where, please report it", 1


def _configured(kind: Callable[..., T], **values: Any) -> T:
    """Build a configuration; what it refuses is a mistake of the user."""
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{str(error).partition(': ')[2]}; see `vidmem --help`") from error


def _numbers(option: str, text: str, form: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """Split `text` as `form` is written, e.g. "480x832"."""
    separator, count = ("x", form.count("x") + 1) if "x" in form else (",", None)
    try:
        values = tuple(parse(part) for part in text.lower().split(separator))
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        raise UserError(f"{option} must look like {form}, got {text!r}")
    return values


def _size(text: str) -> tuple[int | None, int | None]:
    return (None, None) if text == "source" else _numbers("--size", text, "480x832", int)


def _rate(text: str) -> tuple[int, int, int]:
    return _numbers("--rate", text, "4x4x2", int)


def _fps(text: str) -> float | None:
    if text == "source":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--fps must be a number or source, got {text!r}") from error


def _lengths(text: str) -> tuple[float, ...]:
    return _numbers("--lengths", text, "1,2,5,10,20", float)


Video = Annotated[Path, typer.Argument(help="A video file.")]
Size = Annotated[str, typer.Option(help="Rows x columns, or source; scaled to cover, centre cropped.")]
Fps = Annotated[str, typer.Option(help="Frames per second, or source.")]
Seconds = Annotated[float, typer.Option(help="Length to take.")]
Rate = Annotated[str, typer.Option(help="Patch tokens per memory token: height x width x time.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")]


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A bar on stderr that tells of the present step and vanishes; None where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        step = ""

        def tell(description: str, done: int, total: int | None) -> None:
            nonlocal step
            if description != step:
                step = description
                bars.reset(task, description=description)
            bars.update(task, completed=done, total=total)

        yield tell


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    backend: Annotated[
        str | None,
        typer.Option(
            envvar="VIDMEM_BACKEND",
            help="Kernels to use: auto, cpu, triton, cuda, library or reference.",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from vidmem_kernels import __version__

        print(f"vidmem {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
    if backend:
        from vidmem_kernels import use_backend

        try:
            context.with_resource(use_backend(backend))
        except ValueError as error:
            reason = str(error).partition(": ")[2]
            raise UserError(f"--backend (or VIDMEM_BACKEND) {reason}") from error


@app.command()
def demo(
    video: Annotated[Path | None, typer.Argument(help="A video file; without one, a sample film is fetched.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo_output"),
    seconds: Seconds = 20.0,
    start: Annotated[float | None, typer.Option(help="First second to take; 0, or 60 in the sample film.")] = None,
    size: Size = "480x832",
    fps: Fps = "24",
    rate: Rate = "4x4x2",
    frames: Annotated[int, typer.Option(help="How many frames to read back.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the positions of those frames.")] = 0,
    lengths: Annotated[str, typer.Option(help="Seconds of history that the memory profile measures at.")] = "1,5,20",
) -> None:
    """Compress 20 s of video by both methods, read random frames back, compare, plot memory."""
    shape, rate_, fps_, lengths_ = _size(size), _rate(rate), _fps(fps), _lengths(lengths)
    from . import demo as demo_
    from .config import ClipSpec
    from .profile import ProfileConfig

    if start is None:
        start = demo_.SAMPLE_START if video is None else 0.0
    clip = _configured(ClipSpec, height=shape[0], width=shape[1], fps=fps_, start=start, seconds=seconds)
    config = _configured(
        demo_.DemoConfig,
        video=video,
        clip=clip,
        frames=frames,
        seed=seed,
        rate=rate_,
        profile=_configured(ProfileConfig, lengths=lengths_),
    )
    with _progress() as tell:
        result = demo_.run_demo(config, output, tell)
    from .tables import print_demo

    print_demo(result, output)


@app.command()
def compress(
    video: Video,
    output: Annotated[Path, typer.Option("--output", "-o", help="Memory file to write.")],
    method: Annotated[str, typer.Option(help="dct or merge.")] = "dct",
    size: Size = "480x832",
    fps: Fps = "24",
    seconds: Seconds = 20.0,
    start: Annotated[float, typer.Option(help="First second to take.")] = 0.0,
    rate: Rate = "4x4x2",
    budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens to keep, for merge; by default what rate gives.")
    ] = None,
    channels: Annotated[int, typer.Option(help="Width of a dct token.")] = 3072,
    dtype: Annotated[str, typer.Option(help="float16, float32, float8 or int8.")] = "float16",
) -> None:
    """Compress a video to a memory file."""
    shape, rate_, fps_ = _size(size), _rate(rate), _fps(fps)
    import torch

    from .compressor import compress as compress_
    from .config import ClipSpec, CompressorConfig
    from .demo import context_tokens, load_clip
    from .memory import write_memory
    from .report import check_file
    from .vae import DCTCodec

    clip_spec = _configured(ClipSpec, height=shape[0], width=shape[1], fps=fps_, start=start, seconds=seconds)
    config = _configured(CompressorConfig, method=method, rate=rate_, channels=channels, budget=budget, dtype=dtype)
    check_file(output)
    codec = DCTCodec()
    with _progress() as tell:
        step = (lambda name: lambda *n: tell(name, *n)) if tell else lambda _: None
        clip = load_clip(video, clip_spec, method, step("decode"))
        shape_ = tuple(clip.frames.shape[:3])
        latents = codec.encode_chunks(clip.frames.split(2 * codec.stride[0]), torch.float16)
        memory = compress_(latents, codec, shape_, config, step(f"compress, {method}"))
        write_memory(output, memory, fps=clip.fps, source=clip.source.name)
    before, after = context_tokens(shape_, codec), len(memory.tokens)
    short = f" (the video ends before {seconds:g} s)" if clip.short else ""
    print(
        f"{output}: {shape_[0]} frames of {shape_[1]}x{shape_[2]} at {clip.fps:g} fps{short}, "
        f"{before:,} -> {after:,} tokens ({before / after:.1f}x), "
        f"{output.stat().st_size / 1e6:.1f} MB"
    )


@app.command()
def retrieve(
    memory: Annotated[Path, typer.Argument(help="A memory file that vidmem wrote.")],
    frame: Annotated[int, typer.Option(help="Which frame to read, from 0.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
) -> None:
    """Read one frame from a memory file."""
    from .memory import read_memory
    from .report import write_png

    if output.suffix.lower() != ".png":
        raise UserError(f"{output}: frames are written as PNG; give a name that ends in .png")
    opened = read_memory(memory)
    image = opened.retrieve(frame)
    write_png(output, image)
    print(
        f"{output}: frame {frame} of {opened.frames} ({frame / opened.fps:.2f} s), "
        f"{opened.width}x{opened.height} pixels, from {len(opened.bank):,} {opened.method} tokens"
    )


@app.command()
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON and plot.")] = Path("profile_output"),
    lengths: Annotated[str, typer.Option(help="Seconds of history.")] = "1,2,5,10,20",
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; auto: float32 on the CPU.")] = "auto",
    device: Device = "auto",
) -> None:
    """Measure memory and time against context length on this device."""
    lengths_ = _lengths(lengths)
    from . import profile as profile_
    from . import report
    from .tables import print_profile

    config = _configured(profile_.ProfileConfig, lengths=lengths_, heads=heads, head_dim=head_dim, dtype=dtype)
    device_ = _device(device)
    with report.output_folder(output) as folder, _progress() as tell:
        result = profile_.profile(config, device_, progress=tell)
        report.write_json(folder / "memory_vs_context.json", result)
        skipped = report.plots_missing()
        if skipped is None:
            report.write_memory_plot(folder / "memory_vs_context.png", result)
    print_profile(result, output, skipped)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; try --device cpu")
    return name


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show versions, devices, and which kernels run here or why not."""
    from vidmem_kernels.info import collect, render

    found = collect()
    print(json.dumps(found, indent=2) if as_json else render(found))
