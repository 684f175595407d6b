"""JSONL files of items: every row is right, or named with file, line, field and reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lowtide.core.errors import DataError, UnknownNameError, listed, near
from lowtide.evaluation.tasks.items import Item, schemas

SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with one row, or with one item among others.

    Attributes:
        file: As it was named.
        line: From 1.
        field: Path inside the row ("choices[2]"); empty for the row as such.
        reason: What was found and what is allowed.
    """

    file: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        return where + (f'"{self.field}": {self.reason}' if self.field else self.reason)


class _RowError(Exception):
    """A row that cannot be an item: (field, reason) pairs."""

    def __init__(self, *pairs: tuple[str, str]) -> None:
        super().__init__()
        self.pairs = pairs


def read_items(path: str | Path, *, schema: str | None = None) -> list[Item]:
    """Return all items of a file.

    Args:
        path: JSONL in UTF-8; empty lines are skipped.
        schema: The one that all rows must have; None takes what each row says.

    Raises:
        DataError: the file cannot be read, is empty, or has a row that is not right; the message
            names the first of those rows, and how many there are.
    """
    items, problems = check_file(path, schema=schema)
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = "; ".join(str(each) for each in problems[:SHOWN_PROBLEMS])
        raise DataError(shown + (f"; and {more} more problems" if more > 0 else ""))
    if not items:
        raise DataError(f"{path}: holds no items; allowed is one JSON object per line")
    return items


def check_file(path: str | Path, *, schema: str | None = None) -> tuple[list[Item], list[Problem]]:
    """Return the items of a file that are right, and what is wrong with the others.

    Raises:
        DataError: the file cannot be read.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            item = _parse_row(line, schema=schema)
            if item.id in lines:
                raise _RowError(("id", f'"{item.id}" stands in line {lines[item.id]} already'))
        except _RowError as error:
            problems += [
                Problem(file=str(path), line=number, field=field, reason=reason)
                for field, reason in error.pairs
            ]
            continue
        lines[item.id] = number
        items.append(item)
    return items, problems


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name a JSONL file that is there"
        ) from error


def _parse_row(line: str | bytes, *, schema: str | None = None) -> Item:
    row = _parsed(line)
    name = row.pop("schema", None)
    if not isinstance(name, str):
        raise _RowError(("schema", f"got {_shown(name)}, allowed is {listed(schemas.names())}"))
    if schema is not None and name != schema:
        raise _RowError(("schema", f'got "{name}", allowed here is "{schema}"'))
    try:
        kind = schemas.get(name)
    except UnknownNameError as error:
        raise _RowError(("schema", str(error))) from None
    try:
        # Through JSON text: strict JSON rules, under which lists may become tuples.
        return kind.model_validate_json(json.dumps(row))
    except ValidationError as error:
        raise _RowError(*(_pair(kind, each) for each in error.errors())) from None


def _parsed(line: str | bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _RowError((twice, "stands twice in one object; keep one"))
        return found

    def constant(name: str) -> Any:
        raise _RowError(("", f"holds {name}, which JSON lacks; leave the field out"))

    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        row = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise _RowError(
            ("", f"is not UTF-8 at byte {error.start}; save the file as UTF-8")
        ) from None
    except (ValueError, RecursionError) as error:
        column = getattr(error, "colno", None)
        where = f" at column {column}" if column else ""
        reason = f"is not JSON{where}: {getattr(error, 'msg', error)}; one object per line"
        raise _RowError(("", reason)) from None
    if not isinstance(row, dict):
        raise _RowError(("", f"holds {_shown(row)}, allowed is one JSON object per line"))
    _refuse_lone_surrogates(row)
    return row


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _RowError(("", "holds half of a UTF-16 pair (\\ud800 ... \\udfff)")) from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _pair(kind: type[Item], problem: Any) -> tuple[str, str]:
    """Return field and reason of one of pydantic's problems."""
    location = list(problem["loc"])
    if problem["type"] == "extra_forbidden":
        models: list[type[BaseModel]] = [kind]
        for _, _, below in _walk(kind, location[:-1]):
            models = below
        names = sorted({name for model in models for name in model.model_fields})
        path = f"{_path(kind, location[:-1])}.{location[-1]}".removeprefix(".")
        return path, f"unknown key.{near(str(location[-1]), names)} Known: {listed(names)}"
    field = _path(kind, location)
    if problem["type"] == "missing":
        return field, "is missing; it has no default, so give it a value"
    message = str(problem["msg"])
    if problem["type"] == "value_error":
        return field, message.removeprefix("Value error, ")
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"{field}.type", f"{message[0].lower()}{message[1:]}"
    allowed = message.removeprefix("Input should be ")
    return field, f"got {_shown(problem.get('input'))}, allowed is {allowed}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tag(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("type")
    return get_args(field.annotation) if field is not None else ()


def _walk(kind: type[BaseModel], location: list[Any]) -> Iterator[tuple[Any, bool, list[Any]]]:
    """Yield each part of a location, whether it is a field or index, and the models below it."""
    models: list[type[BaseModel]] = [kind]
    for part in location:
        owner = next((m for m in models if part in m.model_fields), None)
        if isinstance(part, int):
            yield part, True, models
        elif owner is not None:
            models = _models(owner.model_fields[part].annotation)
            yield part, True, models
        else:  # pydantic names the branch of a union
            models = [m for m in models if part in _tag(m)] or models
            yield part, False, models


def _path(kind: type[Item], location: list[Any]) -> str:
    """Return the JSON path of a location, without the branches of unions."""
    path = ""
    for part, is_field, _ in _walk(kind, location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif is_field:
            path += f".{part}" if path else str(part)
    return path
