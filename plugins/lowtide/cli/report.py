"""``lowtide report``: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.output import print_json


def report(
    run_dir: Annotated[
        Path, typer.Argument(help="Folder of the run; its telemetry may lie up to two below.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. [default: RUN_DIR/report.html]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the key figures as JSON as well as the path.")
    ] = False,
) -> None:
    """Write one self-contained HTML page about a run, also while it is still going."""
    from lowtide.report import REPORT_NAME, key_figures, read_run, write_page

    run = read_run(run_dir)
    path = write_page(run, out or run_dir / REPORT_NAME)
    if as_json:
        print_json({"report": str(path), "figures": key_figures(run).as_dict()})
    else:
        typer.echo(str(path))
