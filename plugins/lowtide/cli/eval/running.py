"""``lowtide eval run``: a model on a suite, row by row."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.cli.output import others_on_stderr, print_json

if TYPE_CHECKING:
    from lowtide.evaluation.runner import Progress

MODEL_HELP = (
    "hf:FOLDER, openai:NAME or chat:NAME (with --url), or python:MODULE:FUNCTION, which returns "
    "a model."
)


def run(
    suite: Annotated[Path, typer.Argument(help="A suite: JSON that names tasks.")],
    model: Annotated[str, typer.Option("--model", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option("--out", help="JSONL file of rows; a run goes on with it.")],
    url: Annotated[
        str | None, typer.Option("--url", help="Such as http://127.0.0.1:8000/v1.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this one; may be given again.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="May be given again. [default: 0]")
    ] = None,
    max_items: Annotated[
        int | None, typer.Option("--max-items", help="Of each task, spread evenly over it.")
    ] = None,
    items_at_once: Annotated[
        int, typer.Option("--items-at-once", help="What a crash may lose, and a batch may hold.")
    ] = 1,
    device: Annotated[str, typer.Option("--device", help="Of a model from a folder.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a model everything in a suite that the file of rows does not have yet."""
    from lowtide.evaluation.models.opening import open_model
    from lowtide.evaluation.rows import RowFile
    from lowtide.evaluation.runner import run as run_suite
    from lowtide.evaluation.suite.loading import load_suite

    chosen = load_suite(suite)
    if task:
        chosen = chosen.only(task)
    with others_on_stderr():
        asked = open_model(model, url=url, device=device, batch_size=max(8, items_at_once))
        with RowFile(out) as rows, _progress(is_wanted=not as_json) as progress:
            summary = run_suite(
                chosen, asked, rows, seeds=tuple(seed or [0]), max_items=max_items,
                items_at_once=items_at_once, progress=progress,
            )  # fmt: skip
    found = {
        "rows": str(out), "done": summary.done, "kept": summary.kept, "failed": summary.failed
    }  # fmt: skip
    if as_json:
        print_json(found)
    else:
        kept = f", {summary.kept} were there" if summary.kept else ""
        failed = f", {summary.failed} failed" if summary.failed else ""
        typer.echo(f"{summary.done} rows added to {out}{kept}{failed}")
    if summary.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _progress(*, is_wanted: bool) -> Iterator[Progress | None]:
    """Show a bar for each task on a terminal."""
    if not is_wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True)) as bars:
        lines: dict[str, Callable[[int, int], None]] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in lines:
                line = bars.add_task(task, total=total)
                lines[task] = lambda n, of: bars.update(line, completed=n, total=of)
            lines[task](done, total)

        yield show
