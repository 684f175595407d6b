"""Counters, spans and scalars of one rank: in memory always, in files when a folder is given.

Files (see docs/telemetry.md for every field): ``rank<R>.jsonl``, append-only, one JSON object a
line, so a killed run keeps what it had; ``trace.rank<R>.json``, Chrome/Perfetto trace format.
Spans carry `time.perf_counter` seconds and are written as unix time.

Recording is cheap (about a microsecond) and thread-safe. A file that cannot be written any more is
reported once and never stops the training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import lowtide
from lowtide.core.config import TelemetryConfig
from lowtide.core.errors import TelemetryError

logger = logging.getLogger("lowtide")

FORMAT = 1
ScalarSink = Callable[[str, float, int], None]
_TRACE_INTERVAL_S = 30.0
_TRACE_SHARE = 0.002  # rewriting the trace may cost this share of the time between two rewrites
_MEMORY_INTERVAL_S = 1.0


class Span(NamedTuple):
    """One piece of work on one lane; times in `time.perf_counter` seconds."""

    name: str
    lane: str
    begin_s: float
    end_s: float
    args: dict[str, Any]


class Telemetry:
    """Records of one rank.

    Args:
        config: The ``telemetry`` block.
        rank: This process's rank.
        world_size: Number of ranks.
    """

    def __init__(self, config: TelemetryConfig, *, rank: int = 0, world_size: int = 1) -> None:
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.sinks: list[ScalarSink] = []
        self.is_closed = False
        self._dir = Path(config.dir) if config.dir is not None else None
        self._is_tracing = self._dir is not None and config.trace is not False
        self._lock = threading.Lock()
        self._spans: deque[Span] = deque(maxlen=config.trace_spans)
        self._step_spans: dict[str, list[float]] = {}  # name -> [count, total_s] since last record
        self._total_spans: dict[str, list[float]] = {}
        self._counters: dict[str, float] = {}
        self._gauges: dict[str, float] = {}
        self._scalars: dict[str, float] = {}
        self._pending: list[str] = []
        self._unix_offset_s = time.time() - time.perf_counter()
        self._last_record_s = time.perf_counter()
        self._last_record_step = 0
        self._last_flush_s = self._last_record_s
        self._next_trace_s = self._last_record_s + _TRACE_INTERVAL_S
        self._last_memory_s = -math.inf
        self._owner_pid = os.getpid()

    def begin_run(
        self,
        *,
        host: str,
        plugins: list[str],
        listeners: list[str],
        config: Mapping[str, Any],
        host_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files and write the run record.

        Raises:
            TelemetryError: the folder cannot be created or written.
        """
        attempt = 1
        if self._dir is not None:
            path = self._dir / f"rank{self.rank}.jsonl"
            try:
                self._dir.mkdir(parents=True, exist_ok=True)
                attempt += _end_last_line(path)
            except OSError as error:
                raise TelemetryError(
                    f"lowtide.telemetry.dir: {self._dir} cannot be written "
                    f"({error.strerror}); choose another folder or make it writable"
                ) from error
        self.record(
            "run",
            format=FORMAT,
            attempt=attempt,
            rank=self.rank,
            world_size=self.world_size,
            host=host,
            plugins=plugins,
            listeners=listeners,
            config=config,
            host_config=host_config,
            environment=environment() if self._dir is not None else {},
        )
        self.flush()

    def count(self, name: str, value: float = 1) -> None:
        """Add `value` to the counter ``lowtide.<plugin>.<noun>_<unit>``."""
        with self._lock:
            self._counters[name] = self._counters.get(name, 0) + value

    def gauge(self, name: str, value: float) -> None:
        """Set the gauge `name` to its present value."""
        with self._lock:
            self._gauges[name] = value

    @contextlib.contextmanager
    def span(self, name: str, *, lane: str = "host", **args: Any) -> Iterator[None]:
        """Record the duration of the ``with`` body on `lane`."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.add_span(name, lane, begin_s, time.perf_counter(), **args)

    def add_span(self, name: str, lane: str, begin_s: float, end_s: float, **args: Any) -> None:
        """Record work that was timed elsewhere; times in `time.perf_counter` seconds."""
        elapsed_s = end_s - begin_s
        with self._lock:
            for totals in (self._step_spans, self._total_spans):
                entry = totals.get(name)
                if entry is None:
                    totals[name] = [1, elapsed_s]
                else:
                    entry[0] += 1
                    entry[1] += elapsed_s
            if self._is_tracing:
                self._spans.append(Span(name, lane, begin_s, end_s, args))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Record one point of the series `name` ("train/loss") at optimizer step `step`."""
        value = float(value)
        with self._lock:
            self._scalars[name] = value
        self.record("scalar", name=name, step=step, **_number(value))
        for sink in self.sinks:
            sink(name, value, step)

    def reference(self, series: str, name: str, value: float) -> None:
        """Record a yardstick to draw beside `series`, e.g. ``"xz -9"`` in bits per byte."""
        self.record("reference", series=series, name=name, **_number(float(value)))

    def end_step(self, step: int) -> None:
        """Close the record of optimizer step `step`, and write files when it is time to."""
        now_s = time.perf_counter()
        if now_s - self._last_memory_s >= _MEMORY_INTERVAL_S:
            self._last_memory_s = now_s
            self.gauge("memory.rss_bytes", _resident_bytes())
        if self._dir is None:
            return
        if step % self.config.every_n_steps == 0:
            self._record_step(step, now_s)
        if now_s - self._last_flush_s >= self.config.flush_interval_s:
            self.flush()
        if self._is_tracing and now_s >= self._next_trace_s:
            self._write_trace()

    def _record_step(self, step: int, now_s: float) -> None:
        with self._lock:
            spans = {
                name: {"count": int(entry[0]), "total_s": round(entry[1], 6)}
                for name, entry in self._step_spans.items()
            }
            self._step_spans.clear()
            counters, gauges = dict(self._counters), dict(self._gauges)
        self.record(
            "step",
            step=step,
            steps=max(step - self._last_record_step, 1),
            duration_s=round(now_s - self._last_record_s, 6),
            spans=spans,
            counters=counters,
            gauges=gauges,
        )
        self._last_record_s = now_s
        self._last_record_step = step

    def start_from(self, step: int) -> None:
        """Continue counting after a resume: the next step record starts at `step`, now."""
        self._last_record_step = step
        self._last_record_s = time.perf_counter()

    def snapshot(self) -> dict[str, Any]:
        """Return counters, gauges, last scalars and total span times as plain JSON."""
        with self._lock:
            return {
                "counters": dict(self._counters),
                "gauges": dict(self._gauges),
                "scalars": dict(self._scalars),
                "spans": {
                    name: {"count": int(entry[0]), "total_s": entry[1]}
                    for name, entry in self._total_spans.items()
                },
            }

    def flush(self) -> None:
        """Append waiting records to the rank's file."""
        self._last_flush_s = time.perf_counter()
        with self._lock:
            lines, self._pending = self._pending, []
        if self._dir is None or not lines or os.getpid() != self._owner_pid:
            return
        try:
            with open(self._dir / f"rank{self.rank}.jsonl", "a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            self._give_up(error)

    def close(self, *, status: str = "done") -> None:
        """Write the end record and the trace. Idempotent; does nothing in a forked child."""
        if self.is_closed or os.getpid() != self._owner_pid:
            return
        self.is_closed = True
        self.record("end", status=status)
        self.flush()
        if self._is_tracing:
            self._write_trace()

    def record(self, kind: str, **fields: Any) -> None:
        """Append one record of `kind`, strict JSON fields, to the rank's file."""
        if self._dir is None:
            return
        line = json.dumps({"kind": kind, "time_s": round(time.time(), 6), **fields}) + "\n"
        with self._lock:
            self._pending.append(line)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "lowtide.telemetry.dir: %s can no longer be written (%s); training goes on, "
            "nothing more is recorded in files",
            self._dir,
            error.strerror,
        )
        self._dir = None
        self._is_tracing = False

    def _write_trace(self) -> None:
        if self._dir is None:
            return
        begin_s = time.perf_counter()
        with self._lock:
            spans = list(self._spans)
        path = self._dir / f"trace.rank{self.rank}.json"
        scratch = path.with_suffix(".json.part")
        try:
            scratch.write_text(
                json.dumps(chrome_trace(spans, rank=self.rank, unix_offset_s=self._unix_offset_s)),
                encoding="utf-8",
            )
            scratch.replace(path)
        except OSError as error:
            self._give_up(error)
            return
        end_s = time.perf_counter()
        pause_s = max(_TRACE_INTERVAL_S, (end_s - begin_s) / _TRACE_SHARE)
        self._next_trace_s = end_s + pause_s


def chrome_trace(spans: list[Span], *, rank: int, unix_offset_s: float = 0.0) -> dict[str, Any]:
    """Return spans as a Chrome/Perfetto trace object.

    One process per rank, one thread per lane, in order of first use; times in microseconds.
    """
    lanes: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        thread = lanes.setdefault(span.lane, len(lanes) + 1)
        event: dict[str, Any] = {
            "ph": "X",
            "name": span.name,
            "pid": rank,
            "tid": thread,
            "ts": round((span.begin_s + unix_offset_s) * 1e6, 1),
            "dur": round((span.end_s - span.begin_s) * 1e6, 1),
        }
        if span.args:
            event["args"] = span.args
        events.append(event)
    names = [_metadata("process_name", f"rank {rank}", rank, 0)]
    names += [_metadata("thread_name", lane, rank, thread) for lane, thread in lanes.items()]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def _metadata(kind: str, name: str, rank: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}


def _number(value: float) -> dict[str, Any]:
    # JSON has no NaN or infinity; a file that only Python can read would be of little use.
    if math.isfinite(value):
        return {"value": value}
    return {"value": None, "nonfinite": repr(value)}


def _end_last_line(path: Path) -> int:
    """Return how many run records `path` holds; completes a line that a kill cut short."""
    if not path.exists():
        path.touch()
        return 0
    attempts = 0
    last = "\n"
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            attempts += line.startswith('{"kind": "run"')
            last = line
    if not last.endswith("\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
    return attempts


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process().memory_info().rss)


def environment() -> dict[str, Any]:
    """Return versions and hardware of this process, as far as they can be had cheaply."""
    facts: dict[str, Any] = {"python": platform.python_version(), "lowtide": lowtide.__version__}
    for package in ("torch", "deepspeed", "megatron-core", "transformers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    facts["platform"] = platform.platform()
    facts["hostname"] = platform.node()
    facts["cpu"] = _cpu_name()
    has_affinity = hasattr(os, "sched_getaffinity")
    facts["cores"] = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    with contextlib.suppress(ValueError, OSError):
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["gpu"] = _gpu_name()
    facts["commit"] = _git_commit()
    facts["command"] = sys.argv
    return facts


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    # Through NVML, not torch: asking torch would open a context on device 0 from every rank.
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        try:
            name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
            return f"{pynvml.nvmlDeviceGetCount()} x {name}"
        finally:
            pynvml.nvmlShutdown()
    return None


def _git_commit() -> str | None:
    # Of the folder the user trains in: their code decides the result as much as ours.
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return done.stdout.strip() or None
    return None
