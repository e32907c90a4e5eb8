"""The commands `generate` (storyboard to video) and `storyboard` (idea to storyboard, by a language model)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import MOST_SECONDS, MOST_SEED, not_negative, positive
from ..errors import UserError
from ..progress import note
from .app import app
from .options import Device, checked, configured, parse_device

if TYPE_CHECKING:
    from ..generation.generator import Progress


@app.command()
def generate(
    storyboard: Annotated[
        Path, typer.Argument(help="Storyboard to follow, a YAML file of shots with start times and prompts.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="MP4 file to write.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model file, or folder that holds it and its vae.safetensors.", show_default="the shipped model"
        ),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="VAE file or folder.", show_default="vae.safetensors beside the model")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Folder of the text encoder, required by models that use one.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length of the video, in seconds.", show_default="that of the storyboard")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps per segment.")] = 16,
    seed: Annotated[int, typer.Option(help="Random seed of the noise.")] = 0,
    segment: Annotated[int, typer.Option(help="Latent frames denoised together.")] = 6,
    window: Annotated[
        int | None,
        typer.Option(
            help="Latest latent frames that the model reads uncompressed, beside the memory; 0 for none.",
            show_default="as in training",
        ),
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance scale; other values than 1 double the time.")
    ] = 1.0,
    shift: Annotated[
        float | None,
        typer.Option(
            help="Timestep shift of flow matching; above 1 spends more steps at high noise.",
            show_default="as in training",
        ),
    ] = None,
    cross_attention: Annotated[
        bool | None,
        typer.Option(
            "--cross-attention/--no-cross-attention",
            help="Read the memory by cross-attention, too.",
            show_default="as in training",
        ),
    ] = None,
    kv_cache: Annotated[
        bool | None,
        typer.Option(
            "--kv-cache/--no-kv-cache",
            help="Reuse the history's keys and values in all denoising steps.",
            show_default="on where the result is exact",
        ),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Video file to continue.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the segments of an interrupted run and start again.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="JSON file to write: token counts and times.")] = None,
    device: Device = "auto",
) -> None:
    """Generate a video from a storyboard, segment by segment; run the same command again to resume."""
    from ..generation.storyboard import read_storyboard

    board = read_storyboard(storyboard)
    device = parse_device(device)
    from ..files import outputs, write_json
    from ..generation.generator import PARTS, GenerateConfig, parts_of
    from ..generation.generator import generate as generate_
    from ..model.file import files_of, load_model
    from ..model.text import require_encoder
    from ..shipped import CONTINUING_MODEL, shipped
    from ..vae import load_vae
    from ..video import probe, remarks
    from ..video.clip import ClipSpec

    config = configured(
        GenerateConfig,
        seconds=seconds,
        steps=steps,
        seed=seed,
        segment=segment,
        window=window,
        guidance=guidance,
        shift=shift,
        cross_attention=cross_attention,
        kv_cache=kv_cache,
        start=start,
    )
    model = model or shipped(CONTINUING_MODEL)
    if model is None:
        raise UserError("this installation of vidmem ships no model; give --model")
    read = [storyboard, start, vae, text, *files_of(model)]
    outputs(read, [output, report], {parts_of(output): PARTS})
    net = load_model(model, text)
    require_encoder(net.config.text, text, "with --text")
    net = net.to(device)
    codec = load_vae(net.config.vae, vae or net.vae_weights)
    if device != "cpu" and hasattr(codec, "to"):
        codec = codec.to(device)
    if start is not None:
        note(remarks(start, probe(start), ClipSpec(net.config.height, net.config.width)))
    try:
        with _progress() as tell:
            made = generate_(board, net, codec, output, config, restart, tell)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("run the same command again to resume after the last finished segment") from stop
    if report is not None:
        write_json(report, made)
    first, last = made["memory_tokens"][0], made["memory_tokens"][-1]
    count = made["segments"]
    print(
        f"{output}: {made['seconds']:g} s of {net.config.height}x{net.config.width} at {net.config.fps:g} fps "
        f"(height x width) in {count} segment{'s' * (count != 1)}, took {made['wall_seconds']:.0f} s; "
        f"memory {first:,} -> {last:,} tokens, {made['context_per_second']:g} tokens/s, "
        f"and up to {max(made['window_tokens']):,} tokens of uncompressed frames"
    )


@app.command()
def storyboard(
    idea: Annotated[str, typer.Argument(help="What the video is about, in a sentence.")],
    lm: Annotated[
        Path, typer.Option("--lm", help="Folder of a causal language model in the Hugging Face format, such as Qwen.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Storyboard to write, a YAML file.")],
    seconds: Annotated[float, typer.Option(help="Length of the video, in seconds.")] = 20.0,
    shots: Annotated[int, typer.Option(min=1, help="Number of shots.")] = 5,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Random seed of the first answer; an invalid answer is asked for again with the next seed."
        ),
    ] = 0,
    device: Device = "auto",
) -> None:
    """Write a storyboard with a local language model."""
    checked(Annotated[float, positive(MOST_SECONDS)], "--seconds", seconds)
    checked(Annotated[int, positive(100_000)], "--shots", shots)
    checked(Annotated[int, not_negative(MOST_SEED)], "--seed", seed)
    if not idea.strip():
        raise UserError("the idea must not be empty; say what the video is about")
    from ..files import outputs, replacing
    from ..generation.storyboard import format_storyboard, language_model, write_storyboard

    outputs([lm], [output])
    made = write_storyboard(idea, language_model(lm, device=parse_device(device)), seconds, shots, seed)
    with replacing(output) as part:
        part.write_text(format_storyboard(made), encoding="utf-8")
    print(f"{output}: {len(made.shots)} shots in {seconds:g} s")


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None] | None]:
    """A progress line on stderr: segment, seconds generated, context and time left; None without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("loading", total=None, left="")

        def tell(now: Progress) -> None:
            minutes, seconds = divmod(round(now.left), 60)
            bars.update(
                task,
                description=f"segment {now.segment}/{now.segments}, {now.seconds:.1f} s generated, "
                f"context {now.context:,} tokens",
                completed=(now.segment - 1) * now.steps + now.step,
                total=now.segments * now.steps,
                left=f"{minutes}:{seconds:02d} left",
            )

        yield tell
