"""Two systems on the same items: is the difference more than chance?

Source: Miller, "Adding Error Bars to Evals" (arXiv 2411.00640), section on paired differences;
McNemar (Psychometrika 1947), exact and mid-p forms after Fagerland et al. (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.core.errors import DataError
from lowtide.evaluation.statistics.clusters import (
    Floats,
    Statistic,
    cluster_sums,
    columns_of,
    mean,
)
from lowtide.evaluation.statistics.resampling import Interval, Method, bootstrap

_EXACT = 16  # up to so many clusters that differ, all signs are tried
_DISTINCT = 256
_BLOCK = 4_000_000


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    statistic: Statistic = mean,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return statistic(second) - statistic(first) with its interval; both see the same resamples.

    Args:
        first: float, shape (N,) or (N, K).
        second: The same items in the same order.
        clusters: N labels; None for single items.
        statistic: As in `bootstrap`.
        method: As in `bootstrap`.
        level: As in `bootstrap`.
        resamples: As in `bootstrap`.
        seed: As in `bootstrap`.

    Raises:
        DataError: as `bootstrap`, or the two have not the same shape.
    """
    one, other = _pair(first, second)
    width = one.shape[1]

    def difference(means: Floats) -> Floats:
        return statistic(means[..., width:]) - statistic(means[..., :width])

    return bootstrap(
        np.hstack([one, other]), clusters, statistic=difference, method=method, level=level,
        resamples=resamples, seed=seed,
    )  # fmt: skip


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    one, other = columns_of(first), columns_of(second)
    if one.shape != other.shape:
        raise DataError(
            f"second: got shape {other.shape}, allowed is {one.shape}, that of first: a paired "
            "comparison needs the same items in the same order"
        )
    return one, other


def sign_flip_test(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    statistic: Statistic = mean,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of no difference, by exchanging the two in whole clusters.

    For means that is flipping the signs of differences: all signs are tried where at most 16
    clusters differ. Else `resamples` random ones, and the p-value is at least 1 / (resamples + 1).

    Args:
        first: float, shape (N,) or (N, K).
        second: The same items in the same order.
        clusters: N labels of what is exchanged as a whole; None for single items.
        statistic: As in `bootstrap`.
        resamples: Random exchanges.
        seed: Of those.

    Raises:
        DataError: shapes do not fit, or a value is not finite.
    """
    one, other = _pair(first, second)
    if statistic is not mean:
        return _exchange_test(one, other, clusters, statistic, resamples, seed)
    differences = cluster_sums(other - one, clusters).sums[:, 0]
    differences = differences[differences != 0]  # a flip does nothing to them
    if differences.size == 0:
        return 1.0
    # Sums in another order may differ in the last bits, and equal ones count as extreme.
    observed = abs(differences.sum()) * (1 - 1e-12) - 1e-300
    if differences.size <= _EXACT:
        choices = np.arange(2**differences.size)[:, None] >> np.arange(differences.size)
        totals = np.where(choices & 1, 1.0, -1.0) @ differences
        return float((np.abs(totals) >= observed).mean())
    extreme = _extreme_flips(np.abs(differences), observed, resamples, seed)
    return (extreme + 1) / (resamples + 1)


def _exchange_test(
    one: Floats, other: Floats, clusters: Any, statistic: Statistic, resamples: int, seed: int
) -> float:
    random = np.random.Generator(np.random.SFC64(seed))
    sums = cluster_sums(np.hstack([one, other]), clusters)
    width, items = one.shape[1], len(one)
    first, second = sums.sums[:, :width], sums.sums[:, width:]
    gain = second - first
    observed = abs(
        float(statistic(second.sum(axis=0) / items) - statistic(first.sum(axis=0) / items))
    )
    block = max(1, _BLOCK // len(gain))
    extreme = 0
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        moved = random.integers(0, 2, size=(size, len(gain)), dtype=np.uint8) @ gain
        exchanged = statistic((second.sum(axis=0) - moved) / items)
        exchanged = exchanged - statistic((first.sum(axis=0) + moved) / items)
        extreme += int((np.abs(exchanged) >= observed * (1 - 1e-9)).sum())
    return (extreme + 1) / (resamples + 1)


def _extreme_flips(sizes: Floats, observed: float, resamples: int, seed: int) -> int:
    """Return how many of `resamples` random signs give a sum of at least `observed`."""
    random = np.random.default_rng(seed)
    distinct, multiplicity = np.unique(sizes, return_counts=True)
    are_few = len(distinct) <= _DISTINCT
    width = len(distinct) if are_few else len(sizes)
    block = max(1, _BLOCK // width)
    extreme = 0
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        if are_few:  # signs of equal sizes sum to a binomial
            positive = random.binomial(multiplicity, 0.5, size=(size, width))
            totals = (2 * positive - multiplicity) @ distinct
        else:
            positive = random.integers(0, 2, size=(size, width), dtype=np.uint8)
            totals = 2 * (positive @ sizes) - sizes.sum()
        extreme += int((np.abs(totals) >= observed).sum())
    return extreme


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Discordant items and what they say.

    Attributes:
        only_first: Items that only the first got right.
        only_second: Items that only the second got right.
        p_value: Two-sided.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(
    first: ArrayLike, second: ArrayLike, *, form: Literal["exact", "mid_p"] = "exact"
) -> McNemar:
    """Compare right-or-wrong scores of independent items.

    Args:
        first: bool or 0/1, shape (N,).
        second: The same items in the same order.
        form: "exact" is never anti-conservative, "mid_p" is less conservative.

    Raises:
        DataError: a value other than 0 and 1, or shapes do not fit.
    """
    one, other = _pair(first, second)
    for name, values in (("first", one), ("second", other)):
        if not np.isin(values, (0.0, 1.0)).all():
            raise DataError(f"{name}: allowed are 0 and 1, right or wrong, one per item")
    only_first = int(((one == 1) & (other == 0)).sum())
    only_second = int(((one == 0) & (other == 1)).sum())
    total, few = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return McNemar(only_first=0, only_second=0, p_value=1.0)
    # Binomial(total, 1/2) in logarithms: total may be 100000.
    k = np.arange(few + 1)
    factorials = np.array([math.lgamma(i + 1) for i in range(total + 1)])
    logs = factorials[total] - factorials[k] - factorials[total - k] - total * math.log(2)
    masses = np.exp(logs)
    tail = float(masses.sum())
    p_value = 2 * tail - (float(masses[-1]) if form == "mid_p" else 0.0)
    return McNemar(only_first=only_first, only_second=only_second, p_value=min(1.0, p_value))
