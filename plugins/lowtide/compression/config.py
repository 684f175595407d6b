"""Settings of the ``compression`` key."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowtide.compression.activations.quantiser import SLACK, Quantiser
from lowtide.core.config import Auto, PluginConfig

AUTO_BITS = 8
_BITS: tuple[Literal[2, 4, 8], ...] = (2, 4, 8)


class ActivationsConfig(BaseModel):
    """Activations that autograd saves for the backward pass, in fewer bits."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    enabled: bool = True
    """``false`` is the same as leaving "activations" out."""

    bits: Literal[2, 4, 8] | Auto = "auto"
    """Of each value that is held; what attention saves has 8. Auto: as few as keep `bound`; 8
    without one."""

    bound: float | None = Field(default=None, gt=0, lt=1)
    """Highest error of a held value, all rounding included, relative to the range of its group.
    Groups that do not keep it are held as they are. Null: what `bits` give."""

    group_size: int = Field(default=256, ge=16, le=65536, multiple_of=8)
    """Consecutive values that share a minimum and a step (8 bytes)."""

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Stochastic: the mean of what a value becomes is the value, and the highest error one step.
    Nearest: half a step, but small gradients may be biased."""

    min_bytes: int = Field(default=65536, ge=0)
    """Tensors smaller than this are held as they are."""

    exclude: tuple[str, ...] = ()
    """Names of modules, with * and ?, whose saved tensors are held as they are, with all modules
    inside them."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of stochastic rounding, which never draws from torch's own random numbers."""

    @model_validator(mode="after")
    def _check(self) -> ActivationsConfig:
        if self.bound is None:
            return self
        if self.bits != "auto":
            raise ValueError('"bits" and "bound" exclude each other; drop one of them')
        if self.bound < self._error_of(_BITS[-1]):
            raise ValueError(
                f'"bound": {self.bound} is less than what {_BITS[-1]} bits keep with '
                f"{self.rounding} rounding, {self._error_of(_BITS[-1]):.5f}; raise it"
            )
        return self

    def _error_of(self, bits: int) -> float:
        """Return the highest error that `bits` give, relative to a group's range."""
        factor = 1.0 if self.rounding == "stochastic" else 0.5
        return float((factor + SLACK) / (2**bits - 2))  # one code may be for zeros alone

    def resolved_bits(self) -> int:
        """Return how many bits a value has."""
        if self.bits != "auto":
            return self.bits
        if self.bound is None:
            return AUTO_BITS
        return next(bits for bits in _BITS if self._error_of(bits) <= self.bound)

    def quantiser(self) -> Quantiser:
        """Return how values become codes under these settings."""
        return Quantiser(
            bits=self.resolved_bits(),
            group_size=self.group_size,
            is_stochastic=self.rounding == "stochastic",
            bound=self.bound,
        )


class CompressionConfig(PluginConfig):
    """Compression of what a training run holds."""

    activations: ActivationsConfig | None = None
    """What autograd saves for the backward pass. Null: as stock."""

    @model_validator(mode="after")
    def _check(self) -> CompressionConfig:
        if self.enabled and self.activations is None:
            raise ValueError(
                'nothing is named that is to be compressed; add "activations": {}, or leave the '
                "key out (the codecs of lowtide.compression need no key)"
            )
        return self
