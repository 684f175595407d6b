"""``lowtide eval report``: figures with intervals, and rows for other tools."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide.cli.output import plain, print_json, print_table, table_of, whole_file
from lowtide.core.errors import LowtideError


class Export(str, enum.Enum):
    """Formats of other tools."""

    LM_EVAL = "lm-eval"
    INSPECT = "inspect"


def report(
    rows: Annotated[list[Path], typer.Argument(help="Files that `run` wrote.")],
    resamples: Annotated[
        int, typer.Option("--resamples", help="Of the intervals; 100 or more.")
    ] = 10_000,
    export: Annotated[
        Export | None, typer.Option("--export", help="Also write the rows for another tool.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to: a file, or for inspect a folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every metric with its interval of 95 %, and what tasks have to say beside them."""
    from lowtide.evaluation.aggregate import FEW_CLUSTERS, figures, summaries
    from lowtide.evaluation.rows import read_rows

    if (export is None) != (out is None):
        raise LowtideError("--export and --out: give both, or none")
    found = read_rows(*rows)
    table = figures(found, resamples=resamples)
    said = summaries(found)
    written = _export(export, found, out, force) if export is not None and out is not None else []
    if as_json:
        print_json(
            {
                "figures": [each.as_dict() for each in table], "summaries": said,
                "written": [str(path) for path in written],
            }
        )  # fmt: skip
        return
    shown = table_of("model", "task", "metric", "value", "95 % interval", "items", "clusters", "")
    for each in table:
        low, high = each.interval.low, each.interval.high
        interval = "none: one cluster" if low != low else f"{low:.4f} to {high:.4f}"
        notes = [f"{each.failed} failed"] if each.failed else []
        if each.interval.n_clusters < FEW_CLUSTERS:
            notes.append("few clusters: the interval is too narrow")
        shown.add_row(
            plain(each.model), plain(each.task), each.metric, f"{each.interval.estimate:.4f}",
            interval, str(each.interval.n_items), str(each.interval.n_clusters), "; ".join(notes),
        )  # fmt: skip
    print_table(shown)
    for path in written:
        typer.echo(str(path))


def _export(export: Export, rows: list[Any], out: Path, force: bool) -> list[Path]:
    from lowtide.evaluation.exports import to_inspect, to_lm_eval

    if export is Export.LM_EVAL:
        contents = {out: to_lm_eval(rows)}
    else:
        out.mkdir(parents=True, exist_ok=True)
        contents = {out / f"{task}.json": log for task, log in to_inspect(rows).items()}
    for path, content in contents.items():
        with whole_file(path, may_replace=force) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())
    return list(contents)
