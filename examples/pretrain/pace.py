"""How long the run is: a number of steps, agreed once by all ranks and kept when it resumes.

A budget in minutes cannot be repeated exactly, a number of steps can. So the first steps are timed,
the budget is turned into steps, and from then on only steps count: the learning rate, the
validations and the checkpoints follow them, and a resumed run keeps the plan of the killed one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

SKIPPED_STEPS = 5
TIMED_STEPS = 10
SAVE_EVERY_S = 30.0
VALIDATIONS = 8
CLOSING_S = 8.0
"""Time for the last checkpoint, the report and the end of the processes."""
MARGIN = 0.95
"""Share of the budget that is planned: other programs may slow down what was timed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The length of the run and what happens when.

    Attributes:
        total_steps: optimizer steps of the whole run.
        validate_every: steps between two validations.
        save_every: steps between two checkpoints.
        minutes: the budget it was made from, or None when steps were given.
    """

    total_steps: int
    validate_every: int
    save_every: int
    minutes: float | None = None


def plan_from_steps(steps: int) -> Plan:
    """Plan a run of a given number of steps."""
    every = max(1, steps // VALIDATIONS)
    return Plan(total_steps=steps, validate_every=every, save_every=every)


def plan_from_budget(
    *,
    minutes: float,
    done_steps: int,
    left_s: float,
    step_s: float,
    validation_s: float,
    final_validation_s: float,
) -> Plan:
    """Turn what is left of a time budget into steps.

    Args:
        minutes: the whole budget, kept in the plan.
        done_steps: steps finished already.
        left_s: what is left of it.
        step_s: measured time of one step.
        validation_s: measured time of one validation while training.
        final_validation_s: expected time of the one at the end.
    """
    training_s = (left_s - final_validation_s - CLOSING_S - VALIDATIONS * validation_s) * MARGIN
    # A few steps even when nothing is left, so that the learning rate comes down.
    total = done_steps + max(TIMED_STEPS, int(training_s / step_s))
    return Plan(
        total_steps=total,
        validate_every=max(1, total // VALIDATIONS),
        save_every=max(1, round(SAVE_EVERY_S / step_s)),
        minutes=minutes,
    )


class StepTimer:
    """Mean duration of some steps after the first ones, which are slower."""

    def __init__(self) -> None:
        self._seen = 0
        self._total_s = 0.0

    def add(self, duration_s: float) -> None:
        """Count one step."""
        self._seen += 1
        if SKIPPED_STEPS < self._seen <= SKIPPED_STEPS + TIMED_STEPS:
            self._total_s += duration_s

    @property
    def is_complete(self) -> bool:
        """Whether enough steps were timed."""
        return self._seen >= SKIPPED_STEPS + TIMED_STEPS

    @property
    def step_s(self) -> float:
        """Mean duration of the timed steps."""
        return self._total_s / TIMED_STEPS


def launch_time_s() -> float:
    """Unix time at which the user pressed return: that of the launcher, if one started us."""
    try:
        import psutil

        is_launched = "TORCHELASTIC_RUN_ID" in os.environ
        pid = os.getppid() if is_launched else os.getpid()
        return min(time.time(), psutil.Process(pid).create_time())
    except (ImportError, OSError, psutil.Error):
        return time.time()
