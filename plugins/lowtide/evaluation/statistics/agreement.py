"""How far raters agree beyond chance.

Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011); Cohen, weighted kappa
(Psychological Bulletin 1968).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.core.errors import DataError

Scale = Literal["nominal", "ordinal", "interval", "ratio"]
Weights = Literal["none", "linear", "quadratic"]


def krippendorff_alpha(ratings: ArrayLike, *, scale: Scale = "nominal") -> float:
    """Return 1 - observed disagreement / disagreement expected by chance.

    Args:
        ratings: float, shape (raters, units); NaN where a rater gave none.
        scale: What differences between values mean. "ratio" needs values of 0 or more.

    Returns:
        1 for perfect agreement, 0 for chance, less for contradiction; NaN where fewer than two
        units were rated twice, or where all ratings are equal, so that chance is perfect too.

    Raises:
        DataError: another shape, infinite values, an unknown scale.
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2 or np.isinf(table).any():
        raise DataError(
            f"ratings: got shape {table.shape}, allowed are finite numbers or NaN of shape "
            "(raters, units)"
        )
    pairable = table[:, (~np.isnan(table)).sum(axis=0) >= 2]
    if pairable.shape[1] < 2:
        return float("nan")
    values, codes = np.unique(pairable, return_inverse=True)
    is_value = ~np.isnan(values)
    values = values[is_value]
    unit = np.broadcast_to(np.arange(pairable.shape[1]), pairable.shape).reshape(-1)
    code = codes.reshape(-1)
    given = code < len(values)  # NaN sorts last
    counts = np.zeros((pairable.shape[1], len(values)))  # ratings of each unit by value
    np.add.at(counts, (unit[given], code[given]), 1)
    raters = counts.sum(axis=1, keepdims=True)
    coincidences = (counts / (raters - 1)).T @ counts - np.diag((counts / (raters - 1)).sum(axis=0))
    totals = coincidences.sum(axis=0)
    distance = _distances(values, totals, scale)
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    if expected == 0:
        return float("nan")
    return float(1 - (coincidences * distance).sum() / expected)


def _distances(values: NDArray, totals: NDArray, scale: Scale) -> NDArray:
    """Return squared distances between values, shape (V, V)."""
    if scale == "nominal":
        return 1.0 - np.eye(len(values))
    if scale == "ordinal":  # in ranks: ratings that lie between the two, and half of those on them
        middle = np.cumsum(totals) - totals / 2
        return (middle[:, None] - middle) ** 2
    difference = values[:, None] - values
    if scale == "interval":
        return difference**2
    if scale != "ratio":
        raise DataError(
            f'scale: got "{scale}", allowed is "nominal", "ordinal", "interval" or "ratio"'
        )
    if (values < 0).any():
        raise DataError('ratings: negative values have no ratio; use scale="interval"')
    total = values[:, None] + values
    return np.where(total > 0, difference / np.where(total > 0, total, 1), 0.0) ** 2


def weighted_kappa(
    first: ArrayLike, second: ArrayLike, *, categories: int, weights: Weights = "quadratic"
) -> float:
    """Return Cohen's kappa of two raters who both rated all units.

    Args:
        first: int, shape (units,), values 0 ... categories - 1.
        second: The same units in the same order.
        categories: How many values the scale has, used or not.
        weights: How a disagreement counts: all alike ("none"), by distance, or by its square.

    Returns:
        1 for perfect agreement, 0 for chance; NaN where chance is perfect too.

    Raises:
        DataError: shapes do not fit, a rating is outside the scale, unknown weights.
    """
    one, other = np.asarray(first), np.asarray(second)
    if one.shape != other.shape or one.ndim != 1 or one.size == 0:
        raise DataError(f"ratings: got shapes {one.shape} and {other.shape}, allowed is twice (n,)")
    for name, ratings in (("first", one), ("second", other)):
        if ratings.dtype.kind not in "iu" or ratings.min() < 0 or ratings.max() >= categories:
            raise DataError(f"{name}: allowed are whole numbers from 0 to {categories - 1}")
    steps = np.abs(np.arange(categories)[:, None] - np.arange(categories)).astype(float)
    powers = {"none": (steps > 0).astype(float), "linear": steps, "quadratic": steps**2}
    if weights not in powers:
        raise DataError(f'weights: got "{weights}", allowed is "none", "linear" or "quadratic"')
    table = np.zeros((categories, categories))
    np.add.at(table, (one, other), 1 / one.size)
    expected = (powers[weights] * np.outer(table.sum(axis=1), table.sum(axis=0))).sum()
    if expected == 0:
        return float("nan")
    return float(1 - (powers[weights] * table).sum() / expected)
