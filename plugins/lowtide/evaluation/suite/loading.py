"""Suites: a JSON file that names tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowtide.core.errors import ConfigError, UnknownNameError, listed, near, problems_text
from lowtide.evaluation.suite.task import Task, task_kinds

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """Tasks, in the order of the file."""

    name: str
    tasks: tuple[Task[Any], ...]

    def only(self, names: list[str]) -> Suite:
        """Return the suite with these tasks alone.

        Raises:
            ConfigError: a name that no task has.
        """
        known = [task.name for task in self.tasks]
        for name in names:
            if name not in known:
                raise ConfigError(
                    f'{self.name}: no task "{name}".{near(name, known)} Known: {listed(known)}'
                )
        kept = tuple(task for task in self.tasks if task.name in names)
        return Suite(name=self.name, tasks=kept)


def load_suite(source: str | Path | Mapping[str, Any], *, folder: Path | None = None) -> Suite:
    """Return a suite from a JSON file, or from its content.

    Args:
        source: ``{"format": 1, "tasks": [{"name", "kind", "file", ...}]}``.
        folder: From where files are seen; that of the suite, if it is a file.

    Raises:
        ConfigError: the suite cannot be used; the message has the path inside it.
    """
    if isinstance(source, Mapping):
        name, content, folder = "suite", dict(source), folder or Path()
    else:
        path = Path(source)
        name, content, folder = path.name, _read(path), folder or path.parent
    for key in content:
        if key not in ("format", "tasks"):
            raise ConfigError(f'{name}.{key}: unknown key. Known: "format", "tasks"')
    if content.get("format") != FORMAT:
        raise ConfigError(f"{name}.format: got {content.get('format')!r}, allowed is {FORMAT}")
    entries = content.get("tasks")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{name}.tasks: allowed is a list of one or more tasks")
    tasks = tuple(_task(entry, f"{name}.tasks[{n}]", folder) for n, entry in enumerate(entries))
    names = [task.name for task in tasks]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice is not None:
        raise ConfigError(f'{name}.tasks: two are named "{twice}"; names are unique')
    return Suite(name=name, tasks=tasks)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{path}: YAML is not read, as it would need one more package; use JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a suite") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: allowed is an object with "format" and "tasks"')
    return content


def _task(entry: Any, where: str, folder: Path) -> Task[Any]:
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise ConfigError(f'{where}: allowed is an object with "name", "kind" and "file"')
    try:
        task_class = task_kinds.get(kind)
    except UnknownNameError as error:
        raise ConfigError(f"{where}.kind: {error}") from None
    try:
        settings = task_class.Settings.model_validate_json(json.dumps(entry))
    except ValidationError as error:
        raise ConfigError(problems_text(task_class.Settings, error.errors(), where)) from None
    return task_class(settings, folder)
