"""The rows of runs: one JSON object per item, with all that says where it comes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowtide.core.errors import DataError

SCHEMA = "evaluation.row/1"
Key = tuple[str, str, str, str, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of one item under one seed.

    Attributes:
        task: Its name.
        kind: Of the task.
        settings_hash: Of what decides how items are asked and graded.
        item: Id.
        item_hash: Of what the item says.
        cluster: What the item shares with others.
        model: Name.
        model_hash: Of what decides its answers.
        seed: Of the run.
        scores: Figures; empty where people have to rate, or the row failed.
        error: Why it failed; empty else.
        output: What the model said.
        target: What was wanted.
        prompt: What was asked.
        detail: For the task's summary.
        provenance: Versions, commit.
        time_s: Unix time at which it was done.
        duration_s: What it took; rows done together share it.
    """

    task: str
    kind: str
    settings_hash: str
    item: str
    item_hash: str
    cluster: str
    model: str
    model_hash: str
    seed: int
    scores: Mapping[str, float]
    error: str = ""
    output: str = ""
    target: str = ""
    prompt: str = ""
    detail: Mapping[str, Any]
    provenance: Mapping[str, Any]
    time_s: float
    duration_s: float

    @property
    def key(self) -> Key:
        """What makes a row the same one: it is not done again."""
        return (
            self.model_hash, self.task, self.settings_hash, self.item, self.item_hash, self.seed
        )  # fmt: skip

    def to_json(self) -> str:
        """Return the row as one line of strict JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({"schema": SCHEMA, **values}, ensure_ascii=False, allow_nan=False)


def row_from(values: Mapping[str, Any]) -> Row:
    """Return a row from its JSON.

    Raises:
        DataError: not a row of this schema.
    """
    if values.get("schema") != SCHEMA:
        raise DataError(f'"schema": got {values.get("schema")!r}, allowed is "{SCHEMA}"')
    try:
        row = Row(**{name: value for name, value in values.items() if name != "schema"})
    except TypeError as error:
        raise DataError(f"not a row: {error}") from None
    if not isinstance(row.scores, dict) or not all(
        isinstance(value, (int, float)) for value in row.scores.values()
    ):
        raise DataError('"scores": allowed is an object of numbers')
    return row


def read_rows(*paths: str | Path) -> list[Row]:
    """Return the rows of one or more files; a last line that a crash cut short is left out.

    Raises:
        DataError: a file cannot be read, or a line is no row.
    """
    rows: list[Row] = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith("\n"):
                        break
                    if line.strip():
                        rows.append(_row(line, f"{path}:{number}"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return rows


def _row(line: str, where: str) -> Row:
    try:
        return row_from(json.loads(line))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where}: {error}") from None


class RowFile:
    """A file that rows are added to, by one process at a time; survives a kill at any moment.

    Raises:
        DataError: another process writes to it, it cannot be written, or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        try:
            _lock(self._file, self.path)
            self._drop_half_a_line()
            self.keys: set[Key] = {row.key for row in read_rows(self.path)}
        except BaseException:
            self._file.close()
            raise

    def _drop_half_a_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        at = size
        while at > 0:
            begin = max(0, at - 65536)
            self._file.seek(begin)
            end = self._file.read(at - begin).rfind(b"\n")
            if end >= 0:
                at = begin + end + 1
                break
            at = begin
        if at < size:
            self._file.truncate(at)

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows; they are with the system when this returns."""
        for row in rows:
            self._file.write(row.to_json().encode() + b"\n")
            self.keys.add(row.key)
        self._file.flush()

    def close(self) -> None:
        """Put everything on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: IO[bytes], path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(
            f"{path}: another process is writing rows there; name another file"
        ) from error
