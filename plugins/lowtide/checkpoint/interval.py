"""When to save: every so many steps, or as often as loses least time.

With a cost c per checkpoint and failures every M seconds, saving every T seconds costs c / T of the
time for checkpoints and T / (2 M) for work done again. The sum is least at T = sqrt(2 c M) (Young
1974; Daly 2006 adds terms that vanish where c is much smaller than M, as it is here).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from lowtide.checkpoint.board import Board

FIRST_STEP = 10  # the costs are not known before a first checkpoint
_KEPT = 32


def best_interval_s(cost_s: float, between_failures_s: float) -> float:
    """Return the time between two checkpoints that loses least (Young's formula)."""
    return math.sqrt(2.0 * cost_s * between_failures_s)


class Interval:
    """Says at which steps Lowtide saves by itself; the same on all ranks.

    Args:
        board: Where rank 0 tells the others.
        every_n_steps: A fixed interval, or "auto".
        between_failures_s: Mean time between two failures of the job.
    """

    def __init__(
        self, board: Board, *, every_n_steps: int | str, between_failures_s: float
    ) -> None:
        self._board = board
        self._fixed = every_n_steps if isinstance(every_n_steps, int) else None
        self._between_failures_s = between_failures_s
        self._next_step: int | None = None
        self._planned = 0
        self._quiet_s: deque[float] = deque(maxlen=_KEPT)
        self._busy_s: deque[float] = deque(maxlen=_KEPT)
        self._busy_steps = 0
        self._saves = 0

    def add_step(self, duration_s: float, *, is_saving: bool) -> None:
        """Note how long a step took, and whether a checkpoint was on its way meanwhile."""
        (self._busy_s if is_saving else self._quiet_s).append(duration_s)
        self._busy_steps += is_saving

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
        self._saves += 1
        if self._fixed is None:
            self._planned += 1
            name = f"interval/{self._planned}"
            steps = self._board.share(name, lambda: self.best_steps(blocked_s))
            self._next_step = step + int(steps)

    def best_steps(self, blocked_s: Sequence[float]) -> int:
        """Return the interval in steps that the measurements so far suggest."""
        steps_s = [*self._quiet_s] or [*self._busy_s]
        if not steps_s or not blocked_s:
            return FIRST_STEP
        step_s = statistics.median(steps_s)
        stretch_s = 0.0
        if self._quiet_s and self._busy_s:
            per_save = self._busy_steps / max(self._saves, 1)
            stretch_s = max(0.0, statistics.median(self._busy_s) - step_s) * per_save
        cost_s = statistics.median(blocked_s) + stretch_s
        return max(1, round(best_interval_s(cost_s, self._between_failures_s) / step_s))
