"""Measuring candidates, and finding the best bound of a family by few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowtide.core.errors import ConfigError, listed, near
from lowtide.core.stream import ArrayData
from lowtide.quality.candidates import Candidate
from lowtide.quality.measurement import QualityReport, measure
from lowtide.quality.targets import Target

OBJECTIVES = ("compression_ratio", "psnr_db")
# A family whose target is met with less than this left is not searched on: decades of the error
# (less than what neighbouring open bounds differ by), and of the size.
ENOUGH = {True: 0.02, False: 0.005}
MOST_PER_FAMILY = 10


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        targets: All have to be met.
        objective: One of OBJECTIVES: the smallest stream at a quality, or the best quality at a
            size.
    """

    targets: tuple[Target, ...]
    objective: str = "compression_ratio"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f'objective: got "{self.objective}", allowed are {listed(OBJECTIVES)}.'
                f"{near(self.objective, OBJECTIVES)}"
            )
        if not self.driving:
            kind = "quality, such as psnr_db" if self.wants_size else "size: compression_ratio"
            raise ConfigError(
                f'objective: "{self.objective}" needs a target for the {kind}; without it the '
                f"{'loosest' if self.wants_size else 'tightest'} bound would always win"
            )

    @property
    def wants_size(self) -> bool:
        """Whether the bound should be as loose as the targets allow, and not as tight."""
        return self.objective == "compression_ratio"

    @property
    def driving(self) -> tuple[Target, ...]:
        """The targets that stop the bound on its way."""
        return tuple(target for target in self.targets if target.is_size != self.wants_size)

    @property
    def metrics(self) -> list[str]:
        """What has to be measured."""
        asked = [target.metric for target in self.targets if not target.is_size]
        return list(dict.fromkeys([*asked, "psnr_db", "max_abs_error"]))


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        report: What was measured.
        is_met: Whether all targets are, and the codec kept its bound.
        margin: Decades left to the nearest driving target; negative if it is missed.
        worth: Value of the objective.
    """

    report: QualityReport
    is_met: bool
    margin: float
    worth: float


class Trials:
    """Measurements of one array, each made once.

    Args:
        data: The array.
        goal: What is asked for.
        heard: Called with each report, if given.
    """

    def __init__(
        self, data: ArrayData, goal: Goal, heard: Callable[[QualityReport], None] | None = None
    ) -> None:
        self.goal = goal
        self._data = data
        self._heard = heard
        self._found: dict[str, Trial] = {}

    def run(self, candidate: Candidate) -> Trial:
        """Return the measurement of a candidate."""
        if candidate.key not in self._found:
            report = measure(self._data, candidate, self.goal.metrics)
            if self._heard is not None:
                self._heard(report)
            self._found[candidate.key] = self._judged(report)
        return self._found[candidate.key]

    def all(self) -> list[Trial]:
        """Return all measurements in their order."""
        return list(self._found.values())

    def best(self) -> Trial | None:
        """Return the one that is best among those that meet all targets; the first of equals."""
        met = [trial for trial in self.all() if trial.is_met]
        return max(met, key=lambda trial: trial.worth) if met else None

    def _judged(self, report: QualityReport) -> Trial:
        goal = self.goal
        is_met = all(target.is_met(report.value(target.metric)) for target in goal.targets)
        margin = min(target.margin(report.value(target.metric)) for target in goal.driving)
        worth = report.value(goal.objective)
        is_met = is_met and report.is_within_bound is not False
        return Trial(report, is_met, margin, worth if worth is not None else -math.inf)


def search(trials: Trials, grid: Sequence[Candidate], start: float | None) -> None:
    """Measure candidates of a family until the best is among them, or none can be.

    Quality falls and the ratio grows with the bound; where it does not, the best of those that
    were measured is still one that meets the targets.

    Args:
        trials: Take up the measurements.
        grid: The family, tightest first.
        start: The bound to begin with; None is the middle.
    """
    if len(grid) == 1:
        trials.run(grid[0])
        return
    # Positions run from where the targets are met to where they are missed.
    ordered = list(grid) if trials.goal.wants_size else list(reversed(grid))
    places = [_log(candidate) for candidate in ordered]
    incumbent = trials.best()
    at = _nearest(places, math.log10(start)) if start else len(ordered) // 2
    bracket = _Bracket(places, ENOUGH[trials.goal.wants_size])
    for _ in range(MOST_PER_FAMILY):
        trial = trials.run(ordered[at])
        bracket.note(at, trial.margin)
        if trial.margin < 0 and incumbent is not None and trial.worth <= incumbent.worth:
            return  # what meets the targets here is worth even less
        proposal = bracket.next()
        if proposal is None:
            return
        at = proposal


class _Bracket:
    """Between the last position that is known to meet the targets and the first that does not."""

    def __init__(self, places: Sequence[float], enough: float) -> None:
        self._places, self._enough = places, enough
        self._met, self._missed = -1, len(places)
        self._margins: dict[int, float] = {}
        self._order: list[int] = []

    def note(self, at: int, margin: float) -> None:
        """Take up a measurement."""
        self._margins[at] = margin
        self._order.append(at)
        if margin >= 0:
            self._met = max(self._met, at)
        else:
            self._missed = min(self._missed, at)

    def next(self) -> int | None:
        """Return the position to measure next; None when there is nothing to gain."""
        low, high = self._met + 1, self._missed - 1
        if low > high:
            return None
        if self._met >= 0 and self._margins[self._met] <= self._enough:
            return None
        place = self._crossing()
        if place is None:
            return (low + high) // 2
        return min(max(_nearest(self._places, place), low), high)

    def _crossing(self) -> float | None:
        """Return about where the margin becomes 0; None to halve what is left."""
        is_one_sided = self._met < 0 or self._missed >= len(self._places)
        last = self._order[-1]
        margin = self._margins[last]
        if not math.isfinite(margin):
            return None
        if is_one_sided and len(self._order) == 1:
            slope = -1.0  # decades of the error for each decade of the bound
        else:
            other = self._order[-2] if is_one_sided else self._opposite(last)
            distance = abs(self._places[last] - self._places[other])
            rise = self._margins[last] - self._margins[other]
            if not math.isfinite(rise) or not distance:
                return None
            slope = rise / distance * (1 if last > other else -1)
            if not slope < -0.02 or (not is_one_sided and len(self._order) > 4):
                return None  # halving cannot be misled
        # Positions run upwards in tightness or in looseness: signs come from the order.
        direction = 1.0 if self._places[-1] > self._places[0] else -1.0
        return self._places[last] + direction * (margin - self._enough / 2) / -slope

    def _opposite(self, last: int) -> int:
        return self._missed if self._margins[last] >= 0 else self._met


def _log(candidate: Candidate) -> float:
    return math.log10(candidate.bound) if candidate.bound else -math.inf


def _nearest(places: Sequence[float], place: float) -> int:
    return min(range(len(places)), key=lambda at: abs(places[at] - place))


def first_guess(targets: Sequence[Target], mode: str | None, value_range: float) -> float | None:
    """Return a bound at which errors spread evenly within it would just meet the targets."""
    guesses: list[Any] = []
    for target in targets:
        relative = {
            "psnr_db": lambda value: math.sqrt(3) * 10 ** (-value / 20),
            "nrmse": lambda value: math.sqrt(3) * value,
            "max_rel_error": lambda value: value,
            "rmse": lambda value: math.sqrt(3) * value / value_range,
            "mse": lambda value: math.sqrt(3 * value) / value_range,
            "max_abs_error": lambda value: value / value_range,
        }.get(target.metric)
        if mode == "pw_rel":
            if target.metric == "max_pw_rel_error":
                guesses.append(target.value)
        elif relative is not None:
            guesses.append(relative(target.value) * (value_range if mode == "abs" else 1.0))
    positive = [guess for guess in guesses if 0 < guess < math.inf]
    return min(positive) if positive else None
