"""``lowtide eval compare``: two runs on the same items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.output import plain, print_json, print_table, table_of


def compare(
    first: Annotated[Path, typer.Argument(help="Rows of one model.")],
    second: Annotated[Path, typer.Argument(help="Rows of another, on the same items.")],
    every_metric: Annotated[
        bool, typer.Option("--every-metric", help="Not only each task's first one.")
    ] = False,
    resamples: Annotated[
        int, typer.Option("--resamples", help="Of intervals and tests; 100 or more.")
    ] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show paired differences, with p-values corrected for all rows of the table (Holm)."""
    from lowtide.evaluation.comparison import compare as compare_rows
    from lowtide.evaluation.rows import read_rows

    found = compare_rows(
        read_rows(first), read_rows(second), every_metric=every_metric, resamples=resamples
    )
    if as_json:
        print_json({"differences": [each.as_dict() for each in found]})
        return
    table = table_of(
        "task", "metric", "first", "second", "difference", "95 % interval", "p", "p (Holm)", ""
    )
    for each in found:
        notes = []
        if each.p_corrected > 0.05 and each.detectable == each.detectable:
            notes.append(f"80 % sure to be seen: {each.detectable:.4f}")
        if each.unpaired:
            notes.append(f"{each.unpaired} rows without a pair")
        low, high = each.interval.low, each.interval.high
        table.add_row(
            plain(each.task), each.metric, f"{each.first:.4f}", f"{each.second:.4f}",
            f"{each.interval.estimate:+.4f}",
            "none: one cluster" if low != low else f"{low:+.4f} to {high:+.4f}",
            f"{each.p_value:.4g}", f"{each.p_corrected:.4g}", "; ".join(notes),
        )  # fmt: skip
    print_table(table)
