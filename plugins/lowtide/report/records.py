"""Telemetry files of a run, read into plain typed records.

A run may have been killed in the middle of a line and started again: unreadable lines are counted
instead of raised, and steps that a resumed run repeated replace the ones before them.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lowtide.core.errors import TelemetryError

FORMAT = 1
_RANK_FILE = re.compile(r"rank(\d+)\.jsonl$")
_TRACE_FILE = re.compile(r"trace\.rank(\d+)\.json$")
_GENERIC_FOLDERS = ("telemetry", "logs", "lowtide")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanTotal:
    """What one kind of span added up to during a step."""

    count: int
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of a scalar series; `value` may be NaN or infinite."""

    attempt: int
    step: int
    time_s: float
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step record of one rank: the `steps` optimizer steps that end with `step`.

    `counters` hold totals since the start of the attempt, `spans` those of this record only.
    """

    attempt: int
    step: int
    steps: int
    time_s: float
    duration_s: float
    spans: Mapping[str, SpanTotal]
    counters: Mapping[str, float]
    gauges: Mapping[str, float]

    @property
    def step_s(self) -> float:
        """Seconds per optimizer step."""
        return self.duration_s / self.steps


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One start of the program: everything between two "run" records of a rank's file."""

    index: int
    facts: Mapping[str, Any]
    begin_s: float
    last_s: float
    end_status: str | None = None
    first_step: int | None = None
    last_step: int | None = None

    @property
    def number(self) -> int:
        """The attempt's number as recorded, else its position in the file, counted from 1."""
        value = self.facts.get("attempt")
        return value if isinstance(value, int) else self.index + 1

    def saw(self, step: int) -> None:
        """Widen the range of steps this attempt covered."""
        self.first_step = step if self.first_step is None else min(step, self.first_step)
        self.last_step = step if self.last_step is None else max(step, self.last_step)


@dataclass(slots=True, kw_only=True)
class RankLog:
    """One rank's file."""

    rank: int
    path: Path
    attempts: list[Attempt] = field(default_factory=list)
    scalars: dict[str, list[Point]] = field(default_factory=dict)
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    bad_lines: int = 0
    newer_format: bool = False

    def kept_steps(self) -> list[Step]:
        """Return the step records without those that a later attempt did again."""
        return without_repeats(self.steps, self.attempts)

    def kept(self, name: str) -> list[Point]:
        """Return a scalar series without points that a later attempt did again."""
        return without_repeats(self.scalars.get(name, []), self.attempts)


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything found in a run's folder."""

    name: str
    folder: Path
    ranks: list[RankLog]
    traces: dict[int, Path]
    read_at_s: float

    @property
    def lead(self) -> RankLog:
        """The lowest rank: scripts record their scalars there."""
        return self.ranks[0]

    @property
    def facts(self) -> Mapping[str, Any]:
        """The newest "run" record of the lowest rank; empty when none could be read."""
        return self.lead.attempts[-1].facts if self.lead.attempts else {}

    @property
    def world_size(self) -> int:
        """Ranks that the run had, as recorded; at least the number of files."""
        value = self.facts.get("world_size")
        return max(value if isinstance(value, int) else 0, len(self.ranks))

    @property
    def bad_lines(self) -> int:
        """Lines that could not be read, over all files."""
        return sum(log.bad_lines for log in self.ranks)

    def series(self, name: str) -> list[Point]:
        """Return a scalar series from the lowest rank that recorded it; empty if none did."""
        return next((log.kept(name) for log in self.ranks if name in log.scalars), [])

    def scalar_names(self) -> list[str]:
        """Return the names of all scalar series, sorted."""
        return sorted({name for log in self.ranks for name in log.scalars})

    def references(self, series: str) -> dict[str, float]:
        """Return the yardsticks of a series by name, e.g. ``{"xz -9": 1.93}``."""
        found: dict[str, float] = {}
        for log in reversed(self.ranks):
            found.update(log.references.get(series, {}))
        return found

    def status(self) -> str:
        """Return how the run stands: what its "end" record says, else "running" or "killed".

        Without an "end" record a run counts as running while its newest record is younger than a
        minute or ten steps.
        """
        if not self.lead.attempts:
            return "empty"
        last = self.lead.attempts[-1]
        if last.end_status is not None:
            return last.end_status
        newest_s = max(log.attempts[-1].last_s for log in self.ranks if log.attempts)
        durations = sorted(step.step_s for step in self.lead.steps[-101:])
        typical_s = durations[len(durations) // 2] if durations else 0.0
        quiet_s = self.read_at_s - newest_s
        return "running" if quiet_s < max(60.0, 10.0 * typical_s) else "killed"

    def duration_s(self) -> float:
        """Return the seconds spent in all attempts of the lowest rank, pauses left out."""
        return sum(max(0.0, attempt.last_s - attempt.begin_s) for attempt in self.lead.attempts)


class _Stepped(Protocol):
    @property
    def attempt(self) -> int: ...
    @property
    def step(self) -> int: ...


S = TypeVar("S", bound=_Stepped)


def without_repeats(items: Sequence[S], attempts: Sequence[Attempt]) -> list[S]:
    """Drop items of steps that a later attempt did again, and order the rest by step."""
    horizon: dict[int, float] = {}
    lowest = math.inf
    for attempt in reversed(attempts):
        horizon[attempt.index] = lowest
        if attempt.first_step is not None:
            lowest = min(lowest, attempt.first_step)
    kept = [item for item in items if item.step < horizon[item.attempt]]
    return sorted(kept, key=lambda item: item.step)


def read_run(run_dir: Path, *, now_s: float | None = None) -> Run:
    """Read all telemetry below a run's folder.

    Args:
        run_dir: The folder that holds ``rank<R>.jsonl``, or one up to two levels above it.
        now_s: Unix time to judge "still running" by; None takes the clock.

    Raises:
        TelemetryError: no such folder, no telemetry in it, or the telemetry of several runs.
    """
    if not run_dir.is_dir():
        raise TelemetryError(f"{run_dir}: no such folder; pass the folder of a run, e.g. runs/demo")
    logs = _numbered(run_dir, "rank*.jsonl", _RANK_FILE)
    if not logs:
        raise TelemetryError(
            f"{run_dir}: found no rank<R>.jsonl here or up to two folders below; was "
            '"lowtide": {"telemetry": {"dir": ...}} set in the DeepSpeed JSON?'
        )
    return Run(
        name=_run_name(run_dir.resolve(), logs[min(logs)].resolve().parent),
        folder=run_dir,
        ranks=[read_rank(path, rank) for rank, path in sorted(logs.items())],
        traces=_numbered(run_dir, "trace.rank*.json", _TRACE_FILE),
        read_at_s=time.time() if now_s is None else now_s,
    )


def _numbered(run_dir: Path, pattern: str, name: re.Pattern[str]) -> dict[int, Path]:
    for prefix in ("", "*/", "*/*/"):
        found: dict[int, Path] = {}
        for path in sorted(run_dir.glob(prefix + pattern)):
            match = name.match(path.name)
            if match is None:
                continue
            rank = int(match.group(1))
            if rank in found:
                raise TelemetryError(
                    f"{run_dir}: rank {rank} has files of several runs ({found[rank].parent} and "
                    f"{path.parent}); pass the folder of one run"
                )
            found[rank] = path
        if found:
            return found
    return {}


def _run_name(run_dir: Path, files_dir: Path) -> str:
    """Prefer the name of the run over that of a folder which only holds its telemetry."""
    if run_dir == files_dir and run_dir.name in _GENERIC_FOLDERS:
        return run_dir.parent.name
    return run_dir.name


def read_rank(path: Path, rank: int) -> RankLog:
    """Read one rank's file; lines that are not records of this format are counted.

    Raises:
        TelemetryError: the file cannot be opened.
    """
    log = RankLog(rank=rank, path=path)
    try:
        with path.open("r", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip() and not _take(log, line):
                    log.bad_lines += 1
    except OSError as error:
        raise TelemetryError(f"{path}: cannot be read: {error.strerror or error}") from error
    return log


def _take(log: RankLog, line: str) -> bool:
    """Add one line to `log`; return False when it is damaged."""
    try:
        record = json.loads(line)
        kind, time_s = record["kind"], _number(record["time_s"])
        if kind == "run" or not log.attempts:
            facts = record if kind == "run" else {}
            log.attempts.append(
                Attempt(index=len(log.attempts), facts=facts, begin_s=time_s, last_s=time_s)
            )
        attempt = log.attempts[-1]
        _take_record(log, attempt, kind, record, time_s)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False
    attempt.last_s = max(attempt.last_s, time_s)
    return True


def _take_record(
    log: RankLog, attempt: Attempt, kind: str, record: Mapping[str, Any], time_s: float
) -> None:
    if kind == "run":
        log.newer_format |= int(record.get("format", FORMAT)) > FORMAT
    elif kind == "scalar":
        step = int(record["step"])
        value = _number(record.get("nonfinite", record["value"]))
        point = Point(attempt=attempt.index, step=step, time_s=time_s, value=value)
        log.scalars.setdefault(str(record["name"]), []).append(point)
        attempt.saw(step)
    elif kind == "reference":
        series = log.references.setdefault(str(record["series"]), {})
        series[str(record["name"])] = _number(record["value"])
    elif kind == "step":
        item = _step(attempt.index, record, time_s)
        log.steps.append(item)
        attempt.saw(item.step)
    elif kind == "end":
        attempt.end_status = str(record.get("status", "done"))


def _step(attempt: int, record: Mapping[str, Any], time_s: float) -> Step:
    spans = {
        str(name): SpanTotal(count=int(span["count"]), total_s=_number(span["total_s"]))
        for name, span in (record.get("spans") or {}).items()
    }
    duration_s = _number(record["duration_s"])
    if not math.isfinite(duration_s):
        raise ValueError("a step took no finite time")
    return Step(
        attempt=attempt,
        step=int(record["step"]),
        steps=max(1, int(record.get("steps", 1))),
        time_s=time_s,
        duration_s=duration_s,
        spans=spans,
        counters=_numbers(record.get("counters")),
        gauges=_numbers(record.get("gauges")),
    )


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    return {str(name): _number(value) for name, value in (values or {}).items()}


def _number(value: Any) -> float:
    """Read a JSON number; null and texts such as "nan" and "-inf" stand for what JSON lacks."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError(f"not a number: {value!r}")
    return float(value)


def finite(points: Iterable[Point]) -> list[Point]:
    """Return the points whose value is neither NaN nor infinite."""
    return [point for point in points if math.isfinite(point.value)]
