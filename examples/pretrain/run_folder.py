"""The run folder: what the run was started with, and how far it is.

<run>/run.json       settings and progress, rewritten atomically by rank 0
<run>/data/          prepared tokens
<run>/checkpoints/   DeepSpeed checkpoints, the last two
<run>/telemetry/     records of each rank
<run>/report.html    the page written at the end
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import UsageError
from pace import Plan

FORMAT = 1
_OPTIONS = ("data", "max_mib", "vocabulary", "layers", "width", "heads", "sequence", "seed")


@dataclass(kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        status: "running", "stopped" or "finished".
        step: optimizer steps behind the newest checkpoint.
        used_s: seconds spent, over all starts.
        plan: the agreed length, or None while the first steps are timed.
    """

    status: str = "running"
    step: int = 0
    used_s: float = 0.0
    plan: Plan | None = None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Progress:
        """Read what ``asdict`` made."""
        plan = record["plan"]
        return cls(**{**record, "plan": None if plan is None else Plan(**plan)})


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; need not exist yet.
        settings: what must stay the same from start to start.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.telemetry = path / "telemetry"
        self.progress = self._load()

    @property
    def _file(self) -> Path:
        return self.path / "run.json"

    def _load(self) -> Progress:
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Progress()
        except (OSError, ValueError) as error:
            raise UsageError(f"{self._file}: cannot be read ({error}); {self._remedy}") from error
        if record.get("format") != FORMAT:
            raise UsageError(
                f"{self._file}: format {record.get('format')}, this code reads {FORMAT}; "
                f"{self._remedy}"
            )
        for key, value in self.settings.items():
            if record["settings"].get(key) != value:
                raise UsageError(
                    f"{self.path}: this run was started with {_option(key)} "
                    f"{record['settings'].get(key)}, now it is {value}; {self._remedy}"
                )
        return Progress.from_dict(record["progress"])

    @property
    def _remedy(self) -> str:
        return f"choose another --run-dir, or remove {self.path} to start fresh"

    def save(self, progress: Progress) -> None:
        """Write ``run.json``; only rank 0 calls it."""
        self.progress = progress
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"format": FORMAT, "settings": self.settings, "progress": asdict(progress)}
        work = self._file.with_suffix(f".tmp-{os.getpid()}")
        work.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        work.replace(self._file)

    def is_finished(self, *, minutes: float | None, steps: int | None) -> bool:
        """Say whether nothing is left to do for this budget."""
        done = self.progress
        if done.status != "finished" or done.plan is None:
            return False
        if steps is not None:
            return steps <= done.step
        if minutes is not None:
            return minutes <= max(done.plan.minutes or 0.0, done.used_s / 60)
        return True


def settings_of(options: Any, *, source: str, world_size: int) -> dict[str, Any]:
    """Collect what may not change between two starts of a run."""
    settings = {name: getattr(options, name) for name in _OPTIONS}
    return {**settings, "data": source, "world_size": world_size}


def _option(key: str) -> str:
    return "--nproc-per-node" if key == "world_size" else f"--{key.replace('_', '-')}"
