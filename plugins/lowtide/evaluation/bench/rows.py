"""Rows of a study in a JSONL file that grows, survives a crash, and is gone on with.

Kinds of rows: "run" (versions and hardware), "cell" (bytes and facts of a stack on a task), "item"
(the grade of one answer), "time" (one measurement of speed), "refused" (what could not be run).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowtide.core.errors import DataError


class RowFile:
    """A JSONL file of rows, each with a key that is there once.

    Opening it cuts off a last line that a crash left unfinished.

    Raises:
        DataError: A line before the last is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raw = path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            self.rows = parsed(raw[:whole], path)
            if whole != len(raw):
                with path.open("r+b") as file:
                    file.truncate(whole)
        self.keys = {row["key"] for row in self.rows}

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows whose keys are new, all of them in one piece, and wait for the disk."""
        new = {row["key"]: row for row in rows if row["key"] not in self.keys}
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in new.values())
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += new.values()
        self.keys |= new.keys()


def parsed(raw: bytes, path: Path) -> list[dict[str, Any]]:
    """Return the rows of whole lines.

    Raises:
        DataError: A line is no row.
    """
    found = []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: no JSON: {error}; repair it or delete it") from error
        if not isinstance(row, dict) or not {"key", "kind"} <= row.keys():
            raise DataError(f'{path}:{number}: no row of a study; needed are "key" and "kind"')
        found.append(row)
    return found
