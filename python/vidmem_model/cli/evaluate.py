"""The command `evaluate retrieval`: reconstruction quality of trained memories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..progress import progress_bar
from .app import app
from .options import configured

evaluate = typer.Typer(help="Evaluate trained models on held-out video.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate")


@evaluate.command()
def retrieval(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Model file or folder to evaluate; repeat for several.", show_default="the shipped model"),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Folder of training runs; runs of one configuration share a table row.")
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Video file to take histories from.", show_default="the test blocks of the model's training videos"
        ),
    ] = None,
    clips: Annotated[int, typer.Option(help="Maximum number of histories to evaluate.")] = 8,
    history: Annotated[
        int | None, typer.Option(help="Length of a history, in frames.", show_default="as in training")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps per frame.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of the noise.")] = 0,
    json_: Annotated[
        Path | None, typer.Option("--json", help="JSON file to write, with one value per frame position.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Plot to write (.png, .pdf or .svg): quality against tokens.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write: the table.")] = None,
) -> None:
    """Read every frame back from trained memories and compare it with dct, merge and the mean frame.

    Results are kept beside the first output file until the command ends: after an interrupt, the same command resumes.
    """
    from ..evaluate.held_out import RetrievalConfig, choose_histories, find_models, trained_films, trained_history
    from ..evaluate.retrieval import RUNS, evaluate_retrieval
    from ..files import outputs, remove_parts, replacing, write_json
    from ..model.file import files_of
    from ..shipped import shipped
    from ..show.figure import check_plot
    from ..show.plots import plots_missing
    from ..show.retrieval import write_retrieval_plot
    from ..show.tables import print_retrieval, retrieval_markdown

    outputs([video], [json_, plot, markdown])
    if plot and (missing := plots_missing()):
        raise UserError(f"--plot: {missing}")
    models = [*(model or []), *(find_models(table) if table else [])]
    if not models:
        models = [path for path in (shipped(),) if path]
    if not models:
        raise UserError("this installation of vidmem ships no model; give --model or --table")
    films = [video] if video else trained_films(models[0])
    first = next((path for path in (json_, markdown, plot) if path), None)
    store = table / "retrieval-runs" if table else first and first.with_name(f"{first.name}.parts")
    folders = {store: (RUNS,)} if store else None
    outputs([*films, *(file for path in models for file in files_of(path))], [json_, plot, markdown], folders)
    if plot:
        check_plot(plot)
    if history is None:
        history = trained_history(models[0])
    config = configured(RetrievalConfig, clips=clips, history=history, steps=steps, seed=seed)
    if store:
        store.mkdir(exist_ok=True)
    try:
        with progress_bar() as tell:
            histories = choose_histories(models, config, video)
            result = evaluate_retrieval(models, histories, config, store, tell)
    except KeyboardInterrupt as stop:
        if not store:
            raise
        raise KeyboardInterrupt(f"results so far are kept in {store}; run the same command again to resume") from stop
    if json_:
        write_json(json_, result)
    if markdown:
        with replacing(markdown) as part:
            part.write_text(retrieval_markdown(result), encoding="utf-8")
    if plot:
        write_retrieval_plot(plot, result)
    if store and not table:
        remove_parts(store, (RUNS,))
    print_retrieval(result)
