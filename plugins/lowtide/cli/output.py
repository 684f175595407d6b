"""What verbs write: JSON for machines on stdout, tables for people, whole files or none."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from lowtide.core.errors import LowtideError

if TYPE_CHECKING:
    from rich.table import Table

_LOG_WIDTH = 400


def print_json(value: Any) -> None:
    """Write `value` as indented JSON to stdout.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON lacks.
    """
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


@contextlib.contextmanager
def others_on_stderr() -> Iterator[None]:
    """Send what libraries say to stderr, so that a verb's answer is alone on stdout.

    DeepSpeed, which unpickling a checkpoint may import, logs to stdout.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield


def table_of(*columns: str) -> Table:
    """Return an empty table with these columns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table; where no terminal is, its rows stay whole for grep and for logs."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    console.print(table)


def plain(text: str) -> str:
    """Return text of a stranger for a table cell: no markup, nothing that steers a terminal."""
    from rich.markup import escape

    return escape(
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def size_text(size_bytes: float) -> str:
    """Return a number of bytes for people, such as "12.3 MB"."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@contextlib.contextmanager
def whole_file(path: Path, *, may_replace: bool) -> Iterator[IO[bytes]]:
    """Give a file to write that gets its name when all of it is on disk, or never.

    Raises:
        LowtideError: `path` exists and must not be replaced, or cannot be written.
    """
    if path.exists() and not path.is_file():
        raise LowtideError(f"{path}: is not a file; name another one")
    if path.exists() and not may_replace:
        raise LowtideError(f"{path}: exists; remove it, name another file, or pass --force")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise LowtideError(
            f"{path}: cannot be written ({error.strerror or error}); free space or name a folder "
            "that is there and yours"
        ) from error
    finally:
        part.unlink(missing_ok=True)
