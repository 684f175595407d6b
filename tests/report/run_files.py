"""Telemetry files written by hand, so that the report is tested against the format on paper."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "python": "3.11.7", "lowtide": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8",
    "cpu": "Example CPU <64-core> & friends", "cores": 2, "memory_bytes": 24 * 2**30,
    "gpu": None, "commit": "0123abc", "command": ["train.py", "--name", "<demo>"],
}  # fmt: skip


class RankWriter:
    """Writes one rank's JSONL file and trace; times advance by what the steps take."""

    def __init__(self, folder: Path, rank: int = 0, *, begin_s: float = 1_700_000_000.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rank = rank
        self.path = folder / f"rank{rank}.jsonl"
        self.now_s = begin_s
        self.lines: list[str] = []
        self.events: list[dict[str, Any]] = []

    def record(self, kind: str, **fields: Any) -> None:
        """Append one record."""
        self.lines.append(json.dumps({"kind": kind, "time_s": self.now_s, **fields}))

    def run(self, attempt: int = 1, **fields: Any) -> None:
        """Append a "run" record."""
        facts: dict[str, Any] = {
            "format": 1, "attempt": attempt, "rank": self.rank, "world_size": 1,
            "host": "deepspeed", "plugins": [], "listeners": [],
            "config": {"telemetry": {"dir": "runs/x/telemetry", "every_n_steps": 1}},
            "host_config": {"train_batch_size": 4, "lowtide": {}}, "environment": ENVIRONMENT,
        }  # fmt: skip
        self.record("run", **{**facts, **fields})

    def scalar(self, name: str, step: int, value: float) -> None:
        """Append a "scalar" record the way `Telemetry` spells values that JSON lacks."""
        if math.isfinite(value):
            self.record("scalar", name=name, step=step, value=value)
        else:
            self.record("scalar", name=name, step=step, value=None, nonfinite=repr(value))

    def step(self, step: int, phases: dict[str, float], other_s: float, **fields: Any) -> None:
        """Append a "step" record and its spans in the trace, one after the other."""
        begin_s = self.now_s
        for name, seconds in phases.items():
            self.span(name, "host", self.now_s, self.now_s + seconds)
            self.now_s += seconds
        self.now_s += other_s
        spans = {name: {"count": 1, "total_s": seconds} for name, seconds in phases.items()}
        spans.update(fields.pop("spans", {}))
        default: dict[str, Any] = {"steps": 1, "counters": {}, "gauges": {}}
        self.record(
            "step", step=step, duration_s=self.now_s - begin_s, spans=spans, **{**default, **fields}
        )

    def span(self, name: str, lane: str, begin_s: float, end_s: float, **args: Any) -> None:
        """Add a span to the trace; times are unix seconds."""
        threads = {"host": 1}
        event = {
            "ph": "X", "name": name, "pid": self.rank,
            "tid": threads.get(lane, 2 + sum(map(ord, lane)) % 97),
            "ts": begin_s * 1e6, "dur": (end_s - begin_s) * 1e6, "lane": lane,
        }  # fmt: skip
        if args:
            event["args"] = args
        self.events.append(event)

    def write(self, tail: str = "") -> None:
        """Write both files; `tail` goes behind the last whole line, as a kill would leave it."""
        self.path.write_text("\n".join(self.lines) + "\n" + tail, encoding="utf-8")
        if not self.events:
            return
        lanes = {event["tid"]: event.pop("lane") for event in self.events}
        names = [
            {"ph": "M", "name": "thread_name", "pid": self.rank, "tid": tid, "args": {"name": lane}}
            for tid, lane in lanes.items()
        ]
        trace = self.folder / f"trace.rank{self.rank}.json"
        trace.write_text(json.dumps({"traceEvents": names + self.events}), encoding="utf-8")


def write_demo(folder: Path, *, steps: int = 240, ranks: int = 2, is_done: bool = True) -> None:
    """Write a run as a small training job leaves it: two ranks, a plugin, resumed once."""
    for rank in range(ranks):
        noise = random.Random(rank)
        writer = RankWriter(folder, rank)
        resumed_at = steps // 2
        for attempt, (first, last) in enumerate([(1, resumed_at + 15), (resumed_at + 1, steps)], 1):
            writer.run(attempt, world_size=ranks, plugins=["offload"],
                       listeners=["before_update: offload (order 0)"])  # fmt: skip
            if rank == 0:
                writer.record(
                    "reference", series="validation/bits_per_byte", name="xz -9", value=1.93
                )
                writer.record(
                    "reference", series="validation/bits_per_byte", name="gzip -9", value=2.41
                )
            moved = 0
            for step in range(first, last + 1):
                moved += 3 * 2**20
                phases = {
                    "forward": 0.11 + 0.01 * noise.random(),
                    "backward": 0.21 + 0.02 * noise.random() + 0.015 * rank,
                    "update": 0.07 + 0.01 * noise.random(),
                }
                begin_s = writer.now_s
                if step % 60 == 0:
                    phases["save"] = 0.5
                writer.step(
                    step, phases, 0.02 if step > first else 3.0,
                    spans={"lowtide.offload.copy": {"count": 2, "total_s": 0.06}},
                    counters={"lowtide.offload.moved_bytes": moved},
                    gauges={"memory.rss_bytes": 1.1e9 + 1e6 * min(step, 60) + 5e7 * rank},
                )  # fmt: skip
                for lane, at in (("to device", 0.12), ("to host", 0.2)):
                    writer.span("lowtide.offload.copy", lane, begin_s + at, begin_s + at + 0.05,
                                subgroup=3, bytes=1 << 20)  # fmt: skip
                if rank == 0:
                    loss = 3.1 + 6.0 * math.exp(-step / 45) + noise.gauss(0, 0.12)
                    writer.scalar("train/loss", step, loss)
                    writer.scalar("train/tokens_per_s", step, 5000 + noise.gauss(0, 150))
                    writer.scalar("train/learning_rate", step, 3e-4 * min(1, step / 40))
                    if step % 20 == 0:
                        writer.scalar("validation/loss", step, 3.2 + 6.0 * math.exp(-step / 45))
                        writer.scalar(
                            "validation/bits_per_byte", step, 1.85 + 3 * math.exp(-step / 45)
                        )
            writer.now_s += 90.0
        if is_done:
            writer.record("end", status="done")
        writer.write("" if is_done else '{"kind": "step", "ti')
