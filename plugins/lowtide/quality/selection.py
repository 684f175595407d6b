"""Choosing codec and bound: the smallest result that meets the targets, as measured.

With a predictor: drop what is predicted to miss, take the cheapest of the rest, measure it on the
real array, tighten its bound a few times if it misses, else search by measuring, else store the
array as it is. A prediction alone never decides that a target is met.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from lowtide.core.stream import BIT_TYPES, ArrayData
from lowtide.quality.candidates import LOSSLESS, Candidate, Family, families_of
from lowtide.quality.measurement import QualityReport, host_array
from lowtide.quality.metrics.pair import Pair
from lowtide.quality.predictors import Estimate, Predictor, interpolated
from lowtide.quality.search import Goal, Trial, Trials, first_guess, search
from lowtide.quality.targets import Target, targets_of

LEAST_BYTES = 4096  # smaller arrays are measured sooner than predicted
MAX_TIGHTENINGS = 3
DECISIONS = ("predicted", "tightened", "searched", "exact", "uncompressed")


@dataclass(frozen=True)
class Selection:
    """What was chosen for one array.

    Attributes:
        candidate: None where the array is stored as it is.
        estimate: What was predicted of it, if it was.
        measured: What was measured of it on the whole array; None where it is stored as it is.
        decision: "predicted": the cheapest that was predicted to meet the targets does;
            "tightened": it does with a tighter bound; "searched": found by measuring; "exact": a
            lossless codec, as there is nothing to lose; "uncompressed".
        fallback_reason: Why it is not "predicted".
        measurements: How many candidates were measured.
        elapsed_s: Wall-clock seconds of all of it.
        targets: What it meets; an array that is stored as it is has no error, but misses a size.
        raw_bytes: Of the elements.
    """

    candidate: Candidate | None
    estimate: Estimate | None
    measured: QualityReport | None
    decision: str
    fallback_reason: str | None
    measurements: int
    elapsed_s: float
    targets: tuple[Target, ...]
    raw_bytes: int

    @property
    def stored_bytes(self) -> int:
        """What is to be stored."""
        return self.raw_bytes if self.measured is None else self.measured.stored_bytes

    @property
    def ratio(self) -> float:
        """Compression ratio; 1 where nothing is compressed."""
        return (self.measured.ratio or 1.0) if self.measured is not None else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "decision": self.decision,
            "codec": None if self.candidate is None else self.candidate.config(),
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
            "compression_ratio": self.ratio,
            "targets": [
                {"metric": each.metric, "op": each.op, "value": each.value} for each in self.targets
            ],
            "fallback_reason": self.fallback_reason,
            "measurements": self.measurements,
            "elapsed_s": self.elapsed_s,
            "predicted": None if self.estimate is None else self.estimate.as_dict(),
            "measured": None if self.measured is None else self.measured.as_dict(),
        }


def select(
    tensor: Any,
    targets: Mapping[str, float] | Sequence[Target | Mapping[str, Any]] | Target,
    candidates: Any = "auto",
    objective: str = "compression_ratio",
    predictor: Predictor | None = None,
    *,
    max_tightenings: int = MAX_TIGHTENINGS,
) -> Selection:
    """Return the best codec and bound for an array; the same arguments give the same choice.

    Args:
        tensor: Numpy array or torch tensor; from a device it is copied once.
        targets: ``{"psnr_db": 60}``; see `targets_of`.
        candidates: See `families_of`.
        objective: "compression_ratio": the smallest that meets the targets; "psnr_db": the best
            that meets those for the size.
        predictor: Saves measurements; it hears of all that are made. None measures only.
        max_tightenings: How often a bound that was predicted to suffice is tightened.

    Raises:
        ConfigError: targets, candidates or objective cannot be used.
        CodecError: the type of the array is not supported.
    """
    begin_s = time.perf_counter()
    goal = Goal(targets_of(targets), objective)
    families = families_of(candidates, targets=goal.targets)
    data = host_array(tensor)
    choice = _Choice(data, goal, families, predictor, max_tightenings)
    candidate, estimate, trial, decision, reason = choice.made()
    report = None if trial is None else trial.report
    if report is not None and report.stream_bytes >= report.raw_bytes:
        candidate, estimate, report, decision = None, None, None, "uncompressed"
        reason = f"{reason}; " if reason else ""
        reason += "nothing makes it smaller"
    return Selection(
        candidate, estimate, report, decision, reason,
        len(choice.trials.all()), time.perf_counter() - begin_s, goal.targets, data.values.nbytes,
    )  # fmt: skip


_Made = tuple[Candidate | None, Estimate | None, Trial | None, str, str | None]


class _Choice:
    """One call of `select`."""

    def __init__(
        self,
        data: ArrayData,
        goal: Goal,
        families: Sequence[Family],
        predictor: Predictor | None,
        max_tightenings: int,
    ) -> None:
        self._data, self._goal, self._families = data, goal, families
        self._predictor, self._max_tightenings = predictor, max_tightenings
        self.trials = Trials(data, goal, None if predictor is None else predictor.observe)

    def made(self) -> _Made:
        """Return candidate, estimate, trial, decision and reason."""
        data = self._data
        if not data.values.size:
            return None, None, None, "uncompressed", "the array is empty"
        if data.values.dtype.kind != "f" and data.dtype not in BIT_TYPES:
            return self._exact(f"{data.dtype} is not floating-point")
        pair = Pair(data, data)
        self._range = pair.value_range
        if not pair.extremes.count:
            return self._exact("no value is finite")
        if pair.extremes.low == pair.extremes.high and not pair.has_left_out:
            return self._exact("all values are equal")
        reason = None
        if self._predictor is not None:
            if pair.has_left_out:
                reason = "holds NaN or infinity"
            elif data.values.nbytes < LEAST_BYTES:
                reason = f"{data.values.nbytes} bytes are measured sooner than predicted"
            else:
                made = self._predicted(self._predictor)
                if not isinstance(made, str):
                    return made
                reason = made
        return self._searched(reason)

    def _exact(self, reason: str) -> _Made:
        candidate = Candidate(LOSSLESS)
        trial = self.trials.run(candidate)
        if not all(
            target.is_met(trial.report.value(target.metric))
            for target in self._goal.targets
            if target.is_size
        ):
            return None, None, None, "uncompressed", f"{reason}, and its exact size is missed"
        return candidate, None, trial, "exact", reason

    # -- with a predictor ---------------------------------------------------------------------

    def _predicted(self, predictor: Predictor) -> _Made | str:
        """Return the choice, or why the prediction is of no use."""
        found = self._estimates(predictor)
        if isinstance(found, str):
            return found
        if not found:
            return "nothing is predicted to meet the targets"
        cheapest = max(found, key=self._worth)
        grid = self._grid_of(cheapest.candidate)
        at = grid.index(cheapest.candidate)
        estimate: Estimate | None = cheapest
        for number in range(self._max_tightenings + 1):
            trial = self.trials.run(grid[at])
            if trial.is_met:
                decision = "predicted" if number == 0 else "tightened"
                reason = None if number == 0 else "the predicted bound missed a target"
                return grid[at], estimate, trial, decision, reason
            at, estimate = self._tighter(grid, at, trial), None
            if at < 0 or at >= len(grid):
                break
        return f"{cheapest.candidate} missed a target, and tighter bounds too"

    def _estimates(self, predictor: Predictor) -> list[Estimate] | str:
        """Return those that are predicted to meet all targets, or why nothing can be said."""
        kept: list[Estimate] = []
        is_any_predicted = False
        names = {target.metric for target in self._goal.targets} | {self._goal.objective}
        coarse = [family.coarse(self._range) for family in self._families]
        # All in one call: most of what a predictor does is the same for all candidates.
        found = iter(predictor.predict(self._data, [each for some in coarse for each in some]))
        for family, some in zip(self._families, coarse, strict=True):
            all_of, estimates = family.grid(self._range), list(islice(found, len(some)))
            if not all(estimate.is_familiar for estimate in estimates):
                return f"{predictor.name}: the array is unlike those it knows"
            for estimate in interpolated(estimates, all_of, names):
                if any(target.metric in estimate.metrics for target in self._goal.driving):
                    is_any_predicted = True
                    if self._is_promising(estimate):
                        kept.append(estimate)
        if not is_any_predicted:
            wanted = ", ".join(target.metric for target in self._goal.driving)
            return f"{predictor.name} predicts no {wanted} here"
        return kept

    def _is_promising(self, estimate: Estimate) -> bool:
        for target in self._goal.targets:
            interval = estimate.metrics.get(target.metric)
            if interval is None:
                continue
            if not target.is_met(interval.lower if target.op == ">=" else interval.upper):
                return False
        return True

    def _worth(self, estimate: Estimate) -> tuple[float, float]:
        """Order by the predicted objective; where it is not predicted, by the bound."""
        found = estimate.metrics.get(self._goal.objective)
        bound = estimate.candidate.bound or 0.0
        return (
            found.value if found is not None else 0.0,
            bound if self._goal.wants_size else -bound,
        )

    def _grid_of(self, candidate: Candidate) -> list[Candidate]:
        for family in self._families:
            grid = family.grid(self._range)
            if candidate in grid:
                return grid
        return [candidate]

    def _tighter(self, grid: Sequence[Candidate], at: int, trial: Trial) -> int:
        """Return the place of the next bound to try, by how much was missing."""
        step = -1 if self._goal.wants_size else 1
        bound = grid[at].bound
        if bound is None or not np.isfinite(trial.margin):
            return at + step
        wanted = bound * 10 ** (step * max(0.0, -trial.margin))
        at += step
        while 0 <= at + step < len(grid) and step * (wanted - (grid[at].bound or 0.0)) > 0:
            at += step
        return at

    # -- without ------------------------------------------------------------------------------

    def _searched(self, reason: str | None) -> _Made:
        guesses: dict[str | None, float | None] = {}
        for family in self._families:
            if family.mode not in guesses:
                guesses[family.mode] = first_guess(self._goal.targets, family.mode, self._range)
            search(self.trials, family.grid(self._range), guesses[family.mode])
            best = self.trials.best()
            if best is not None and best.report.candidate.mode == family.mode:
                guesses[family.mode] = best.report.candidate.bound
        best = self.trials.best()
        if best is not None:
            return best.report.candidate, None, best, "searched", reason
        missed = f"no candidate meets {', '.join(map(str, self._goal.targets))}"
        return None, None, None, "uncompressed", f"{reason}; {missed}" if reason else missed
