"""What was decided in a run, added up by kind of tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class KindTotals:
    """Decisions about one kind of tensor."""

    raw_bytes: int = 0
    stored_bytes: int = 0
    measurements: int = 0
    elapsed_s: float = 0.0
    lowest_ratio: float | None = None
    highest_ratio: float | None = None
    decisions: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    bounds: list[float] = field(default_factory=list)
    newest_step: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take up one decision."""
        ratio = float(record["compression_ratio"])
        self.raw_bytes += record["raw_bytes"]
        self.stored_bytes += record["stored_bytes"]
        self.measurements += record["measurements"]
        self.elapsed_s += record["elapsed_s"]
        self.lowest_ratio = ratio if self.lowest_ratio is None else min(self.lowest_ratio, ratio)
        self.highest_ratio = max(self.highest_ratio or ratio, ratio)
        self.decisions[record["decision"]] += 1
        codec = record["codec"] or {"id": "none"}
        self.codecs[codec["id"]] += 1
        if codec.get("bound") is not None:
            self.bounds.append(codec["bound"])
        self.newest_step = record["step"]

    @property
    def ratio(self) -> float | None:
        """Sum of raw bytes over the sum of stored ones."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        bounds = sorted(self.bounds)
        return {
            "tensors": sum(self.decisions.values()),
            "compression_ratio": self.ratio,
            "lowest_ratio": self.lowest_ratio,
            "highest_ratio": self.highest_ratio,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "measurements": self.measurements,
            "elapsed_s": self.elapsed_s,
            "decisions": dict(self.decisions),
            "codecs": dict(self.codecs),
            "median_bound": bounds[len(bounds) // 2] if bounds else None,
            "newest_step": self.newest_step,
        }


class Ledger:
    """Decisions of a run. Bounded: totals by kind, and the newest decision of each role."""

    def __init__(self) -> None:
        self._kinds: dict[str, KindTotals] = {}
        self._newest: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> KindTotals:
        """Take up one decision; returns the totals of its kind."""
        totals = self._kinds.setdefault(record["tensor_kind"], KindTotals())
        totals.add(record)
        self._newest[record["tensor_kind"], record["role"]] = record
        return totals

    def newest(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the newest decision about each role of a kind."""
        return {role: record for (of, role), record in self._newest.items() if of == kind}

    def as_dict(self) -> dict[str, Any]:
        """Return the totals of each kind."""
        return {kind: totals.as_dict() for kind, totals in self._kinds.items()}
