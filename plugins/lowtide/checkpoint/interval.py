"""When to save: every so many steps, or as often as loses least time.

With a cost c per checkpoint and failures every M seconds, saving every T seconds costs c / T of the
time for checkpoints and T / (2 M) for work done again. The sum is least at T = sqrt(2 c M) (Young
1974; Daly 2006 adds terms that vanish where c is much smaller than M, as it is here).

Each slower level of storage has a T of its own: its c is what bringing a checkpoint down to it adds
to the steps meanwhile, its M is that of the failures that only it survives. It gets no checkpoint
before it has the last one, so T is at least as long as that takes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.costs import Costs

FIRST_STEP = 10  # the costs are not known before a first checkpoint


def best_interval_s(cost_s: float, between_failures_s: float) -> float:
    """Return the time between two checkpoints that loses least (Young's formula)."""
    return math.sqrt(2.0 * cost_s * between_failures_s)


def level_interval_s(costs: Costs, level: int, between_failures_s: float) -> float:
    """Return the time between two checkpoints of a slower level; 0 while nothing is measured."""
    best_s = best_interval_s(costs.stretch_s(level), between_failures_s)
    return max(best_s, costs.took_s(level))


class Interval:
    """Says at which steps Lowtide saves by itself; the same on all ranks.

    Args:
        board: Where rank 0 tells the others.
        every_n_steps: A fixed interval, or "auto".
        between_failures_s: Mean time between two failures of the job.
        costs: What is measured.
        shares: By level: which share of the checkpoints goes there. Without those levels that have
            an interval of their own.
    """

    def __init__(
        self,
        board: Board,
        *,
        every_n_steps: int | str,
        between_failures_s: float,
        costs: Costs,
        shares: Mapping[int, float],
    ) -> None:
        self._board = board
        self._fixed = every_n_steps if isinstance(every_n_steps, int) else None
        self._between_failures_s = between_failures_s
        self._costs = costs
        self._shares = dict(shares)
        self._next_step: int | None = None
        self._planned = 0

    def is_due(self, step: int) -> bool:
        """Tell whether to save after `step` optimizer steps."""
        if self._fixed is not None:
            return step % self._fixed == 0
        if self._next_step is None:  # at the start, or after a resume
            self._next_step = step + FIRST_STEP - 1
        return step >= self._next_step

    def plan_next(self, step: int, blocked_s: Sequence[float]) -> None:
        """Decide when the next one is due. Collective where the interval is "auto".

        Args:
            step: The step that has just been saved.
            blocked_s: What ended checkpoints have cost the training thread.
        """
        if self._fixed is None:
            self._planned += 1
            name = f"interval/{self._planned}"
            steps = self._board.share(name, lambda: self.best_steps(blocked_s))
            self._next_step = step + int(steps)

    def best_steps(self, blocked_s: Sequence[float]) -> int:
        """Return the interval in steps that the measurements so far suggest."""
        step_s = self._costs.step_s()
        if step_s is None or not blocked_s:
            return FIRST_STEP
        stretches_s = [self._costs.stretch_s(n) * share for n, share in self._shares.items()]
        cost_s = statistics.median(blocked_s) + sum(stretches_s)
        return max(1, round(best_interval_s(cost_s, self._between_failures_s) / step_s))
