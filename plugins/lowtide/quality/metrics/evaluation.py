"""All metrics of a pair in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowtide.quality.metrics.pair import Pair
from lowtide.quality.metrics.registry import Score, resolve, undefined

# What most people ask for; all of it takes a few passes.
DEFAULT = ("max_abs_error", "max_rel_error", "rmse", "nrmse", "psnr_db", "ssim", "dssim",
           "error_autocorr", "pearson_r")  # fmt: skip


@dataclass(frozen=True)
class Evaluation(Mapping[str, "float | None"]):
    """Metrics by name, with what is needed to read them.

    A value is None where the metric is not defined; it may be infinite and is never NaN.

    Attributes:
        scores: By the names that were asked for.
        is_exact: Whether all elements came back with equal values, NaNs as NaNs.
        count: Elements that were compared.
        nonfinite: NaNs and infinities that came back as such, and are left out.
        mismatched: Elements that became, or ceased to be, NaN or an infinity. With any, errors are
            infinite and everything else is None: nothing is within a bound.
        notes: By metric: what was excluded and counted, or why it is "degenerate".
    """

    scores: dict[str, float | None]
    is_exact: bool
    count: int
    nonfinite: int
    mismatched: int
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float | None:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types; an infinite value is null, and "infinite" has its sign."""
        return {
            "metrics": {name: _finite(value) for name, value in self.scores.items()},
            "infinite": {
                name: "inf" if value > 0 else "-inf"
                for name, value in self.scores.items()
                if value is not None and math.isinf(value)
            },
            "exact": self.is_exact,
            "compared": self.count,
            "nonfinite_excluded": self.nonfinite,
            "nonfinite_mismatched": self.mismatched,
            "notes": self.notes,
        }


def evaluate(
    original: Any,
    reconstructed: Any,
    metrics: Sequence[str] | None = None,
    *,
    value_range: float | None = None,
) -> Evaluation:
    """Return what `reconstructed` lost.

    Args:
        original: Numpy array or torch tensor of real numbers, any layout, also on a device.
        reconstructed: The same shape; the type may differ.
        metrics: Names, see `lowtide.quality.metrics.registry.metrics`; some take a parameter,
            "error_autocorr:5". None: `DEFAULT`.
        value_range: max - min to use instead of the original's, for parts of a larger array.

    Raises:
        DataError: the shapes differ, an array does not hold real numbers, or a parameter is not
            allowed.
        UnknownNameError: no such metric.
    """
    asked = {name: resolve(name) for name in (DEFAULT if metrics is None else metrics)}
    pair = Pair(original, reconstructed, value_range=value_range)
    found = pair.extremes
    found_scores = {name: _score(pair, name, *metric) for name, metric in asked.items()}
    return Evaluation(
        scores={name: score.value for name, score in found_scores.items()},
        is_exact=found.is_exact,
        count=found.count,
        nonfinite=found.nonfinite,
        mismatched=found.mismatched,
        notes={name: dict(score.notes) for name, score in found_scores.items() if score.notes},
    )


def _score(pair: Pair, name: str, metric: Any, parameter: float) -> Score:
    if pair.extremes.mismatched:
        worst = {"max_abs_error", "max_rel_error", "max_pw_rel_error", "mse", "rmse", "nrmse",
                 "relative_l2_error"}  # fmt: skip
        if metric.name in worst:
            return Score(math.inf)
        if metric.name == "psnr_db":
            return Score(-math.inf)
        return undefined("values became, or ceased to be, NaN or infinite")
    if not pair.extremes.count:
        return undefined("no finite values")
    score: Score = metric.compute(pair, parameter)
    if score.value is not None and math.isnan(score.value):
        return Score(None, {**score.notes, "degenerate": f"{name} is not a number here"})
    return score


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
