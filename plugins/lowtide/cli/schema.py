"""``lowtide schema``: which keys the "lowtide" block has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lowtide.cli.output import print_json

if TYPE_CHECKING:
    from lowtide.core.schema import KeyRow


def schema(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON Schema, for editors and checks.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the keys as a Markdown table.")
    ] = False,
) -> None:
    """Show every key of the "lowtide" block: type, default, meaning."""
    from lowtide.core.schema import json_schema, key_table

    if as_json and as_markdown:
        raise typer.BadParameter("choose --json or --markdown, not both")
    if as_json:
        print_json(json_schema())
    elif as_markdown:
        typer.echo(markdown(key_table()))
    else:
        _print_table(key_table())


def markdown(rows: list[KeyRow]) -> str:
    """Return the table of keys as Markdown."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.path}`", row.type, f"`{row.default}`", row.description)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _print_table(rows: list[KeyRow]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        meaning = Text(f"{row.type}, default {row.default}", style="cyan")
        meaning.append(f"\n{row.description}", style="default")
        table.add_row(Text(row.path, style="bold"), meaning)
    Console().print(table)
