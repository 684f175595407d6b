"""Settings of the ``evaluation`` key."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lowtide.core.config import PluginConfig


class EvaluationConfig(PluginConfig):
    """Evaluation of the model that trains."""

    suite: str
    """JSON file that names tasks; their files are seen from its folder."""

    every_n_steps: int = Field(default=200, ge=1)
    """Evaluate after every this many optimizer steps."""

    max_items: int | None = Field(default=64, ge=1)
    """Items of each task, spread evenly over it; the same ones each time. Null: all."""

    budget_fraction: float | None = Field(default=None, gt=0, le=1)
    """Largest share of the run's time for evaluations; one that would take more is left out. Null:
    no limit."""

    best_metric: str | None = Field(default=None, pattern=r"^[^/]+/[^/]+$")
    """`"task/metric"` whose best value, and its step, are remembered."""

    batch_size: int = Field(default=8, ge=1)
    """Rows of one forward pass on each rank."""

    max_length: int | None = Field(default=None, ge=2)
    """Most tokens that the model reads; longer contexts lose their beginning. Null: no limit."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the orders of options and of drawn answers; training's random numbers are not touched."""

    on_error: Literal["warn", "raise"] = "warn"
    """What a task that cannot be evaluated does. A forward pass that raises always ends the run
    where there is more than one rank, as others may wait inside theirs."""
