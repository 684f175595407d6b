"""How far off predictions are: split conformal intervals, and which arrays are like known ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

# log10 of relative bounds where the difficulty is known.
KNOTS: Floats = np.arange(0.0, -6.5, -0.5, dtype=np.float64)
LEVELS = 200  # quantiles that are kept
_KERNEL = 0.35  # decades
_LEAST = 0.05  # of the mean residual: a bound where all were lucky is not certain
_REFERENCES = 256
_SLACK = 1.5


@dataclass(frozen=True)
class Calibration:
    """Of one head: from residuals on arrays that it did not learn.

    Residuals are divided by what is usual at the bound, so that intervals are wide where
    predictions are bad. Source: Papadopoulos et al., Inductive confidence machines for
    regression (2002).

    Attributes:
        difficulty: Usual absolute residual, shape (len(KNOTS), metrics).
        scores: Sorted residuals in units of that, shape (LEVELS or fewer, metrics).
        count: How many there were of each metric, shape (metrics,); 0 gives infinite intervals.
    """

    difficulty: Singles
    scores: Singles
    count: NDArray[np.int64]

    def half_widths(self, log10_bounds: Floats, confidence: float) -> Floats:
        """Return half of the width of intervals, shape (bounds, metrics)."""
        usual = np.stack(
            [np.interp(log10_bounds, KNOTS[::-1], column[::-1]) for column in self.difficulty.T],
            axis=1,
        )
        factors = []
        for number, column in zip(self.count, self.scores.T, strict=True):
            # The quantile that makes coverage hold for exchangeable arrays: one more counts.
            level = math.ceil((number + 1) * confidence) / max(number, 1)
            at = math.ceil(level * (len(column) - 1))
            factors.append(float(column[at]) if number and level <= 1 else math.inf)
        return np.asarray(usual * np.array(factors))


def calibrated(residuals: Floats, log10_bounds: Floats) -> Calibration:
    """Return the calibration of one head.

    Args:
        residuals: On the scales of metrics, NaN where unknown, shape (rows, metrics).
        log10_bounds: Of relative bounds, shape (rows,).
    """
    sizes = np.abs(residuals)
    is_known = np.isfinite(sizes)
    filled = np.where(is_known, sizes, 0.0)
    overall = filled.sum(axis=0) / np.maximum(is_known.sum(axis=0), 1)
    distances = (KNOTS[:, None] - log10_bounds[None]) / _KERNEL
    weights = np.exp(-0.5 * distances**2) + 1e-12  # (knots, rows)
    local = (weights @ filled) / np.maximum(weights @ is_known, 1e-12)
    difficulty = np.maximum(local, _LEAST * overall) + 1e-9
    scores = np.full((LEVELS, residuals.shape[1]), np.inf)
    for metric in range(residuals.shape[1]):
        known = is_known[:, metric]
        if known.any():
            usual = np.interp(log10_bounds[known], KNOTS[::-1], difficulty[::-1, metric])
            # Higher quantiles only: between kept ones, intervals err on the wide side.
            scores[:, metric] = np.quantile(
                sizes[known, metric] / usual, np.linspace(0, 1, LEVELS), method="higher"
            )
    return Calibration(
        difficulty.astype(np.float32), scores.astype(np.float32), is_known.sum(axis=0)
    )


@dataclass(frozen=True)
class Familiarity:
    """Which arrays are like those of the training set.

    Attributes:
        references: Standardised descriptions of arrays, shape (arrays, numbers).
        limit: Largest distance to the nearest that is still familiar.
    """

    references: Singles
    limit: float

    def distance(self, description: Floats) -> float:
        """Return the root mean square distance to the nearest known array."""
        gaps = self.references - description.astype(np.float32)
        return math.sqrt(float(np.square(gaps).mean(axis=1).min()))

    def knows(self, description: Floats) -> bool:
        """Return whether an array is within the limit."""
        return self.distance(description) <= self.limit


def familiar(early: Floats, late: Floats) -> Familiarity:
    """Return what is familiar, from how far late arrays are from early ones of the training set."""
    before = Familiarity(early.astype(np.float32), 0.0)
    distances = [before.distance(each) for each in late]
    limit = _SLACK * float(np.quantile(distances, 0.95)) if distances else 0.0
    every = np.concatenate([early, late])
    kept = np.linspace(0, len(every) - 1, min(_REFERENCES, len(every))).round().astype(int)
    return Familiarity(every[kept].astype(np.float32), limit)
