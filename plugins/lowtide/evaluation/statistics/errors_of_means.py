"""Standard errors, rates, families of tests, and what a comparison could have seen.

Source: Miller, "Adding Error Bars to Evals" (arXiv 2411.00640): clustered errors, power;
Wilson (JASA 1927); Holm (Scandinavian Journal of Statistics 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.core.errors import DataError
from lowtide.evaluation.statistics.clusters import cluster_codes, columns_of
from lowtide.evaluation.statistics.resampling import Interval, check_level


def standard_error(
    values: ArrayLike, clusters: Sequence[Any] | NDArray[Any] | None = None
) -> float:
    """Return the standard error of a mean whose items are independent between clusters only.

    sqrt(C / (C - 1)) / N * sqrt(sum over clusters of the squared sum of deviations): Miller's
    clustered error with the usual correction for few clusters. Without clusters this is the
    textbook s / sqrt(N).

    Args:
        values: float, shape (N,).
        clusters: N labels; None makes each item its own cluster.

    Returns:
        NaN with a single cluster, which says nothing of how clusters vary.

    Raises:
        DataError: shapes do not fit, or a value is not finite.
    """
    columns = columns_of(values)
    if columns.shape[1] != 1:
        raise DataError(f"values: got shape {columns.shape}, allowed is (items,)")
    deviations = columns[:, 0] - columns[:, 0].mean()
    sums = np.bincount(cluster_codes(clusters, len(deviations)), deviations)
    count = len(sums)
    if count < 2:
        return math.nan
    total = float((sums**2).sum())
    return math.sqrt(count / (count - 1) * total) / len(deviations)


def normal_interval(
    values: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """Return mean +- z * standard error, for many clusters.

    Raises:
        DataError: as `standard_error`, or `level` is not inside (0, 1).
    """
    check_level(level)
    error = standard_error(values, clusters)
    columns = columns_of(values)
    middle = float(columns.mean())
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return Interval(
        estimate=middle, low=middle - reach, high=middle + reach, level=level, method="normal",
        n_items=len(columns), n_clusters=int(cluster_codes(clusters, len(columns)).max()) + 1,
    )  # fmt: skip


def wilson(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a rate of independent trials.

    Raises:
        DataError: not 0 <= successes <= trials with trials >= 1, or `level` is not inside (0, 1).
    """
    check_level(level)
    if not 0 <= successes <= trials or trials < 1:
        raise DataError(
            f"successes, trials: got {successes}, {trials}, allowed is 0 <= successes <= trials "
            "with at least one trial"
        )
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    rate = successes / trials
    middle = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * trials)) / trials) / (1 + z2 / trials)
    return Interval(
        # At the ends the exact limits are 0 and 1; rounding may leave them.
        estimate=rate, low=0.0 if successes == 0 else middle - reach,
        high=1.0 if successes == trials else middle + reach, level=level, method="wilson",
        n_items=trials, n_clusters=trials,
    )  # fmt: skip


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values corrected for being one family, in the order given.

    Compare each with the level of the whole family.

    Raises:
        DataError: not one-dimensional, or a value outside [0, 1].
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise DataError("p_values: allowed is a list of numbers from 0 to 1")
    order = np.argsort(given, kind="stable")
    factors = np.arange(len(given), 0, -1)
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(given[order] * factors))
    return corrected


def minimal_detectable_effect(
    standard_error_of_difference: float, *, level: float = 0.95, power: float = 0.8
) -> float:
    """Return the smallest true difference that a two-sided test finds with this power.

    (z of the level + z of the power) * standard error (Miller, power analysis).

    Raises:
        DataError: a negative error, or `level` or `power` is not inside (0, 1).
    """
    return _zs(level, power) * _not_negative(standard_error_of_difference)


def items_needed(effect: float, variance: float, *, level: float = 0.95, power: float = 0.8) -> int:
    """Return how many independent items show a difference of `effect`.

    Args:
        effect: The true difference.
        variance: Of the paired difference of one item. For conditional means of two models that
            Miller takes as an example it is 1/9, which gives about 1,000 items for 3 points.
        level: 1 - the rate of false alarms.
        power: The rate at which a true difference is found.

    Raises:
        DataError: `effect` is 0 or not a number, `variance` negative, or a rate out of range.
    """
    if not abs(effect) > 0:
        raise DataError(f"effect: got {effect}, allowed is any difference but 0")
    return math.ceil(_zs(level, power) ** 2 * _not_negative(variance) / effect**2)


def _zs(level: float, power: float) -> float:
    check_level(level)
    if not 0 < power < 1:
        raise DataError(f"power: got {power}, allowed is between 0 and 1, such as 0.8")
    return NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)


def _not_negative(value: float) -> float:
    if not value >= 0:
        raise DataError(f"got {value}, allowed is 0 or more: an error or a variance")
    return value
