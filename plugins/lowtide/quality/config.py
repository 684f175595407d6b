"""Settings of the ``quality`` key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowtide.core.config import Auto, PluginConfig
from lowtide.quality.candidates import families_of
from lowtide.quality.search import Goal
from lowtide.quality.targets import targets_of

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

Kind = Literal["parameters", "gradients", "moments", "activations"]
KINDS: tuple[Kind, ...] = ("parameters", "gradients", "moments", "activations")


class TargetConfig(BaseModel):
    """One limit on a metric."""

    model_config = _STRICT

    metric: str
    """A quality metric, "compression_ratio" or "bit_rate"."""

    op: Literal[">=", "<="] | None = None
    """Null: whichever asks for a better result."""

    value: float
    """The limit."""


class CandidateConfig(BaseModel):
    """Codecs that differ in their bound."""

    model_config = _STRICT

    codec: str | dict[str, Any]
    """Name or configuration of a codec."""

    mode: Literal["abs", "rel", "pw_rel"] | None = None
    """What the bound limits; null for codecs that take none."""

    bounds: tuple[float, ...] | Auto = "auto"
    """Auto: 48 in each decade, from half of the range down to 1e-7 of it."""


class SampleConfig(BaseModel):
    """What is looked at, and how often."""

    model_config = _STRICT

    every_n_steps: int = Field(default=100, ge=1)
    """Look at some tensors at every this many optimizer steps."""

    max_tensors_per_step: int = Field(default=4, ge=1)
    """How many, shared between the kinds of `applies_to`."""

    min_bytes: int = Field(default=4096, ge=1)
    """Smaller tensors are not looked at."""

    max_bytes: int = Field(default=4 << 20, ge=4096)
    """Of a larger tensor, rows from its middle that have about this size are looked at."""


class QualityConfig(PluginConfig):
    """How far tensors of the run could be compressed while a target is met."""

    target: dict[str, float] | tuple[TargetConfig, ...]
    """What has to be kept: `{"psnr_db": 60}`, or a list of objects with metric, op and value."""

    objective: Literal["compression_ratio", "psnr_db"] = "compression_ratio"
    """The smallest result that meets the target, or the best that meets a target for the size."""

    candidates: tuple[CandidateConfig, ...] | Auto = "auto"
    """Codecs and bounds to choose from. Auto: lossless, and `lowtide.sz` at any bound."""

    applies_to: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    """Kinds of tensors that are looked at."""

    sample: SampleConfig = SampleConfig()
    """What is looked at, and how often."""

    predictor: Literal["persistence", "closed_form", "block_sampling"] | None = "persistence"
    """Saves measurements; what is chosen is measured all the same. Null: measure only."""

    max_bound_tightenings: int = Field(default=3, ge=0)
    """How often a predicted bound that misses the target is tightened before all is searched."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the choice of tensors."""

    @model_validator(mode="after")
    def _check(self) -> QualityConfig:
        if self.enabled:
            goal = self.goal()
            families_of(self.candidate_list(), targets=goal.targets)
        return self

    def goal(self) -> Goal:
        """Return targets and objective.

        Raises:
            ConfigError: they contradict each other, or make no sense.
        """
        if isinstance(self.target, dict):
            return Goal(targets_of(self.target), self.objective)
        entries = [target.model_dump(exclude_none=True) for target in self.target]
        return Goal(targets_of(entries), self.objective)

    def candidate_list(self) -> Any:
        """Return the candidates as `families_of` takes them."""
        if self.candidates == "auto":
            return "auto"
        return [candidate.model_dump() for candidate in self.candidates]
