"""``lowtide doctor``: what this machine has, what is missing, what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lowtide
from lowtide.cli.output import print_json

if TYPE_CHECKING:
    from lowtide.cli.probes import Row

FORMAT = 1
_MARKS = {
    "ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("–", "cyan"), "fail": ("✗", "red"),
}  # fmt: skip


def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Remove stale build locks (never one that is in use).")
    ] = False,
    build_ops: Annotated[
        bool, typer.Option("--build-ops", help="Build DeepSpeed's CPU operators now (minutes).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check versions, compilers, native parts, devices and limits.

    Exit code 1 if something required is broken, 0 if at most optional parts are missing.
    """
    from lowtide.cli.probes import all_probes, run_probes

    removed = _remove_stale_locks() if fix else []
    built = _build_ops() if build_ops else []
    rows = run_probes(all_probes())
    is_healthy = all(row.status != "fail" for row in rows)
    is_healthy &= all(result["status"] != "failed" for result in built)
    if as_json:
        print_json(
            {
                "format": FORMAT,
                "lowtide": lowtide.__version__,
                "ok": is_healthy,
                "checks": [row.as_dict() for row in rows],
                "removed_locks": removed,
                "built": built,
            }
        )
    else:
        _print_table(rows, removed, built)
    if not is_healthy:
        raise typer.Exit(1)


def _remove_stale_locks() -> list[str]:
    from lowtide.cli.probes.machine import extension_roots
    from lowtide.hosts.deepspeed_ops import remove_stale_locks

    _, roots = extension_roots()
    return [str(path) for root in roots for path in remove_stale_locks(root)]


def _build_ops() -> list[dict[str, Any]]:
    from rich.console import Console

    from lowtide.hosts.deepspeed_ops import BUILDERS, prebuild

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    return [asdict(result) for result in prebuild(tuple(BUILDERS), console.print)]


def _print_table(rows: Sequence[Row], removed: Sequence[str], built: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        mark, colour = _MARKS[row.status]
        text = Text(row.found)
        if row.status != "ok":
            for line in (row.cost, row.action):
                if line:
                    text.append(f"\n{line}", style="dim" if line is row.cost else "")
        table.add_row(Text(mark, style=f"bold {colour}"), Text(row.check, style="bold"), text)
    console.print(table)
    for path in removed:
        console.print(Text(f"Removed stale lock {path}", style="green"))
    for result in built:
        console.print(Text(f"{result['name']}: {result['status']}, {result['detail']}"))
    counts = {status: sum(row.status == status for row in rows) for status in _MARKS}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    console.print(Text(f"\n{summary}", style="bold"))
