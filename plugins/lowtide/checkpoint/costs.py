"""What bringing checkpoints to each level of storage costs the training, as measured so far."""

from __future__ import annotations

import statistics
import threading
from collections import Counter, defaultdict, deque

_KEPT = 32  # newest measurements of each kind


def _recent() -> deque[float]:
    return deque(maxlen=_KEPT)


class Costs:
    """Step times with and without work for a level, and how long that work takes. Thread-safe.

    A step during which several levels were worked for counts for the slowest of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working: Counter[int] = Counter()  # by level: checkpoints that are on their way there
        self._seen: set[int] = set()  # levels that were worked for since the last step
        self._quiet_s = _recent()
        self._busy_s: defaultdict[int, deque[float]] = defaultdict(_recent)
        self._took_s: defaultdict[int, deque[float]] = defaultdict(_recent)
        self._busy_steps: Counter[int] = Counter()
        self._saves: Counter[int] = Counter()

    def begin(self, level: int) -> None:
        """Note that a checkpoint is on its way to `level`."""
        with self._lock:
            self._working[level] += 1
            self._seen.add(level)
            self._saves[level] += 1

    def end(self, level: int, took_s: float | None = None) -> None:
        """Note that it is there, after `took_s` seconds of work, or (None) that it did not come."""
        with self._lock:
            self._working[level] -= 1
            if took_s is not None:
                self._took_s[level].append(took_s)

    def add_step(self, duration_s: float) -> None:
        """Note how long a step of the training took, which has just ended."""
        with self._lock:
            level = max(self._seen, default=None)
            (self._quiet_s if level is None else self._busy_s[level]).append(duration_s)
            if level is not None:
                self._busy_steps[level] += 1
            self._seen = {level for level, count in self._working.items() if count > 0}

    def step_s(self) -> float | None:
        """Return how long a step takes, or None before the first."""
        with self._lock:
            steps_s = self._quiet_s or [each for busy_s in self._busy_s.values() for each in busy_s]
            return statistics.median(steps_s) if steps_s else None

    def stretch_s(self, level: int) -> float:
        """Return by how much one checkpoint on its way to `level` makes steps longer, in all."""
        with self._lock:
            busy_s = self._busy_s[level]
            if not (busy_s and self._quiet_s):
                return 0.0
            longer_s = statistics.median(busy_s) - statistics.median(self._quiet_s)
            per_save = self._busy_steps[level] / max(self._saves[level], 1)
            return max(0.0, longer_s) * per_save

    def took_s(self, level: int) -> float:
        """Return how long a checkpoint is on its way to `level`; 0 before the first."""
        with self._lock:
            return statistics.median(self._took_s[level]) if self._took_s[level] else 0.0
