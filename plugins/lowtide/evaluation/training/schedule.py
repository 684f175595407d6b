"""When a training run stops for an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable


class Schedule:
    """Every so many steps, as long as evaluations take no more than their share of the time.

    Args:
        every_n_steps: Due at multiples of this.
        budget_fraction: Largest share of the time since the start; None is no limit. Before there
            is one to go by, the first evaluation is taken to cost nothing.
        clock: Seconds.
    """

    def __init__(
        self,
        every_n_steps: int,
        budget_fraction: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.every_n_steps, self.budget_fraction = every_n_steps, budget_fraction
        self._clock = clock
        self._begin_s = clock()
        self._spent_s = self._last_s = 0.0

    def is_due(self, step: int) -> bool:
        """Tell whether one is due after `step`, time aside: all ranks know by themselves."""
        return step > 0 and step % self.every_n_steps == 0

    def has_time(self) -> bool:
        """Tell whether one more keeps the budget; rank 0's clock decides for all."""
        if self.budget_fraction is None:
            return True
        elapsed_s = self._clock() - self._begin_s + self._last_s
        return self._spent_s + self._last_s <= self.budget_fraction * elapsed_s

    def took(self, duration_s: float) -> None:
        """Note what an evaluation took."""
        self._last_s = duration_s
        self._spent_s += duration_s

    @property
    def spent_s(self) -> float:
        """What evaluations took so far."""
        return self._spent_s
