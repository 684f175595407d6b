"""Does a stated probability mean what it says?

Source: Naeini et al., expected calibration error (AAAI 2015); Brier (Monthly Weather Review 1950).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Answers of similar confidence.

    Attributes:
        low: Lowest confidence, inclusive, or exclusive where the one before ends there.
        high: Highest confidence, inclusive.
        count: Answers.
        confidence: Their mean confidence; NaN for none.
        accuracy: Share of them that is right; NaN for none.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability_bins(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 10,
    by: Literal["width", "mass"] = "width",
) -> list[ReliabilityBin]:
    """Group answers by confidence.

    Args:
        confidence: float in [0, 1], shape (N,): the probability of the chosen answer.
        correct: bool, shape (N,).
        bins: How many.
        by: Bins of equal width, or of (nearly) equal numbers of answers.

    Raises:
        DataError: shapes do not fit, a confidence outside [0, 1], or no bins.
    """
    stated, right = _answers(confidence, correct)
    if bins < 1 or by not in ("width", "mass"):
        raise DataError(f'bins, by: got {bins}, "{by}"; allowed is 1 or more, "width" or "mass"')
    if by == "width":
        edges = np.linspace(0, 1, bins + 1)
    else:
        edges = np.unique(np.quantile(stated, np.linspace(0, 1, bins + 1)))
        edges = edges if len(edges) > 1 else np.repeat(edges, 2)
    place = np.clip(np.searchsorted(edges, stated, side="left") - 1, 0, len(edges) - 2)
    found = []
    for index in range(len(edges) - 1):
        inside = place == index
        count = int(inside.sum())
        means = (float(stated[inside].mean()), float(right[inside].mean())) if count else None
        found.append(
            ReliabilityBin(
                low=float(edges[index]), high=float(edges[index + 1]), count=count,
                confidence=means[0] if means else float("nan"),
                accuracy=means[1] if means else float("nan"),
            )
        )  # fmt: skip
    return found


def expected_calibration_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    bins: int = 10,
    by: Literal["width", "mass"] = "width",
) -> float:
    """Return the mean distance between confidence and accuracy, over bins weighted by answers.

    It depends on the bins and is biased upwards for few answers: compare only equal settings.

    Raises:
        DataError: as `reliability_bins`.
    """
    table = reliability_bins(confidence, correct, bins=bins, by=by)
    total = sum(each.count for each in table)
    gaps = (each.count * abs(each.confidence - each.accuracy) for each in table if each.count)
    return sum(gaps) / total


def brier_score(probability: ArrayLike, outcome: ArrayLike) -> float:
    """Return the mean squared error of probabilities; 0 is best.

    Args:
        probability: float in [0, 1]: shape (N,) for one event, or (N, K) for K options.
        outcome: For (N,) whether it happened; for (N, K) the number of the right option.

    Returns:
        From 0 to 1 for one event, from 0 to 2, summed over options, for several.

    Raises:
        DataError: shapes do not fit, or a probability outside [0, 1].
    """
    stated = np.asarray(probability, dtype=np.float64)
    if stated.ndim == 1:
        stated, right = _answers(stated, outcome)
        return float(((stated - right) ** 2).mean())
    chosen = np.asarray(outcome)
    if stated.ndim != 2 or chosen.shape != stated.shape[:1] or chosen.dtype.kind not in "iu":
        raise DataError(
            f"probability, outcome: got shapes {stated.shape} and {chosen.shape}, allowed are "
            "(n, options) and the numbers of the right options, (n,)"
        )
    _in_unit_interval(stated)
    right = np.zeros_like(stated)
    right[np.arange(len(stated)), chosen] = 1.0
    return float(((stated - right) ** 2).sum(axis=1).mean())


def abstention_curve(confidence: ArrayLike, correct: ArrayLike) -> list[tuple[float, float]]:
    """Return (share answered, accuracy of it), if only the most confident ones were answered.

    Answers of equal confidence are taken together.

    Raises:
        DataError: as `reliability_bins`.
    """
    stated, right = _answers(confidence, correct)
    order = np.argsort(-stated, kind="stable")
    ordered = stated[order]
    is_last = np.append(ordered[1:] != ordered[:-1], True)
    taken = np.arange(1, len(ordered) + 1)
    accuracy = np.cumsum(right[order]) / taken
    return [
        (float(n / len(ordered)), float(a))
        for n, a in zip(taken[is_last], accuracy[is_last], strict=True)
    ]


def _answers(
    confidence: ArrayLike, correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    stated = np.asarray(confidence, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if stated.ndim != 1 or stated.shape != right.shape or stated.size == 0:
        raise DataError(
            f"confidence, correct: got shapes {stated.shape} and {right.shape}, allowed is twice "
            "(n,) with n of 1 or more"
        )
    _in_unit_interval(stated)
    if not np.isin(right, (0.0, 1.0)).all():
        raise DataError("correct: allowed are true and false, one for each answer")
    return stated, right


def _in_unit_interval(stated: NDArray[np.float64]) -> None:
    if not ((stated >= 0) & (stated <= 1)).all():
        raise DataError("confidence: allowed are probabilities from 0 to 1")
