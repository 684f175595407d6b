"""What fault tolerance a clustering has, and what it found.

Silent errors in compute units are the fault model (FT K-Means, section II.A): a bit of a value
flips while it is computed. Memory is taken to be protected, crashes are a checkpoint's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from lowtide.core.errors import ConfigError, listed, near

Mode = Literal["off", "detect", "correct", "recompute"]


@dataclass(frozen=True)
class Protection:
    """How a fit answers to silent errors.

    Attributes:
        mode: "off" checks nothing. "detect" counts what the checksums find and raises when the fit
            ends with any. "correct" rebuilds a wrong distance from the checksum and the others of
            its row, checks it again and recomputes the row in float64 where that does not agree.
            "recompute" always recomputes.
        kappa: Threshold of the checksums, in units of ``u * |x| * |C|`` (u the unit roundoff of
            the dtype); None is the calibrated one of the backend.
        max_uncorrected: Errors that may remain (each is counted) before the fit raises.
    """

    mode: Mode = "off"
    kappa: float | None = None
    max_uncorrected: int = 0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(
                f'fault_tolerance: mode "{self.mode}" is unknown.{near(self.mode, get_args(Mode))} '
                f"Allowed: {listed(get_args(Mode))}"
            )
        if self.kappa is not None and not 0 < self.kappa < float("inf"):
            raise ConfigError(
                f"fault_tolerance: kappa {self.kappa}, allowed are positive numbers, or None for "
                f"the calibrated one"
            )
        if self.max_uncorrected < 0:
            raise ConfigError(
                f"fault_tolerance: max_uncorrected {self.max_uncorrected}, allowed are 0 and more"
            )

    @classmethod
    def of(cls, value: Protection | str | bool | Mapping[str, Any] | None) -> Protection:
        """Return the protection that a mode's name, True ("correct"), None or options describe."""
        if isinstance(value, Protection):
            return value
        if value is None or isinstance(value, bool):
            return cls("correct" if value else "off")
        if isinstance(value, str):
            return cls(value)  # type: ignore[arg-type]  # checked there
        known = [each.name for each in fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(
                    f'fault_tolerance: option "{name}" is unknown.{near(str(name), known)} '
                    f"Known: {listed(known)}"
                )
        return cls(**value)

    @property
    def is_on(self) -> bool:
        """Whether anything is checked."""
        return self.mode != "off"


@dataclass
class FaultReport:
    """Counts of one call or, added up, of a fit.

    Attributes:
        checks: Checksums compared.
        detected: Comparisons that did not hold, each counted once.
        corrected: Of those, values rebuilt from the checksum.
        recomputed: Rows or sums done again by another code path.
        uncorrected: Errors known to remain.
        injected: Faults that a test put in.
        max_residual: Largest residual of a check that held, in units of its threshold.
    """

    checks: int = 0
    detected: int = 0
    corrected: int = 0
    recomputed: int = 0
    uncorrected: int = 0
    injected: int = 0
    max_residual: float = 0.0

    def add(self, other: FaultReport) -> None:
        """Add the counts of another call."""
        for each in fields(self):
            mine, others = getattr(self, each.name), getattr(other, each.name)
            largest = each.name == "max_residual"
            setattr(self, each.name, max(mine, others) if largest else mine + others)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts by name, as JSON types."""
        return {**asdict(self), "max_residual": float(self.max_residual)}  # numpy's too
