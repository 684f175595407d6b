"""Intervals by resampling whole clusters, seeded and in bounded memory.

Clusters with equal sums are exchangeable, so how often each distinct one is drawn is multinomial:
for scores of few values (right or wrong) a resample costs a handful of numbers and not N of them,
with exactly the distribution of drawing one by one.

Source: Efron, "Better bootstrap confidence intervals" (JASA 1987), for BCa; Davison and Hinkley,
"Bootstrap Methods and their Application" (1997), section 3.8, for whole clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.core.errors import DataError
from lowtide.evaluation.statistics.clusters import (
    ClusterSums,
    Floats,
    Statistic,
    cluster_sums,
    mean,
)

Method = Literal["percentile", "bca"]
_DISTINCT = 256  # at most so many distinct clusters are drawn by their multiplicities
_BLOCK = 1_000_000  # numbers drawn at once: bounds the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with its confidence interval.

    Attributes:
        estimate: The statistic of all items.
        low: Lower end; NaN where the interval cannot be had, as with one cluster.
        high: Upper end.
        level: Nominal coverage.
        method: "percentile", "bca" or what else gave it.
        n_items: Items behind it.
        n_clusters: Clusters that they form.
    """

    estimate: float
    low: float
    high: float
    level: float
    method: str
    n_items: int
    n_clusters: int


def check_level(level: float) -> None:
    """Refuse what is no confidence level.

    Raises:
        DataError: not inside (0, 1).
    """
    if not 0 < level < 1:
        raise DataError(f"level: got {level}, allowed is between 0 and 1, such as 0.95")


def resampled_means(sums: ClusterSums, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield blocks of means over resampled clusters, shape (block, K), `resamples` rows in all."""
    random = np.random.Generator(np.random.SFC64(seed))  # three times as fast as PCG64 here
    table = np.column_stack([sums.sums, sums.counts])
    clusters = len(table)
    distinct, multiplicity = _distinct(table)
    if distinct is not None:
        width = len(distinct)
        shares = multiplicity / clusters
    else:
        width = clusters
    block = max(1, min(resamples, _BLOCK // width))
    for begin in range(0, resamples, block):
        size = min(block, resamples - begin)
        if distinct is not None:
            totals = random.multinomial(clusters, shares, size=size) @ distinct
        else:
            drawn = random.integers(0, clusters, size=(size, clusters), dtype=np.uint32)
            # One column at a time: gathering whole rows would take K times the memory.
            totals = np.stack([_totals(column, drawn) for column in table.T.copy()], axis=1)
        yield totals[:, :-1] / totals[:, -1:]


def _totals(column: Floats, drawn: NDArray[np.uint32]) -> Floats:
    if (column == column[0]).all():  # counts of single items: no need to look them up
        return np.full(len(drawn), column[0] * drawn.shape[1])
    totals: Floats = column.take(drawn, mode="clip").sum(axis=1)
    return totals


def _distinct(table: Floats) -> tuple[Floats | None, NDArray[np.intp]]:
    """Return the distinct rows and how often each is there, or None where they are many."""
    sample = table[: 4 * _DISTINCT]
    if len(np.unique(sample, axis=0)) <= _DISTINCT:
        rows, multiplicity = np.unique(table, axis=0, return_counts=True)
        if len(rows) <= _DISTINCT:
            return rows, multiplicity
    return None, np.empty(0, dtype=np.intp)


def bootstrap(
    values: ArrayLike,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    *,
    statistic: Statistic = mean,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return a figure and its interval from resampled clusters.

    Args:
        values: float, shape (N,) or (N, K): the columns that `statistic` reads.
        clusters: N labels of what is drawn as a whole; None draws single items.
        statistic: From means of columns, shape (..., K), to the figure, shape (...).
        method: "percentile", or "bca", which corrects for bias and skewness.
        level: Nominal coverage.
        resamples: How many.
        seed: The same seed gives the same interval.

    Raises:
        DataError: shapes do not fit, a value is not finite, or a parameter is out of range.
    """
    check_level(level)
    if method not in ("percentile", "bca"):
        raise DataError(f'method: got "{method}", allowed is "percentile" or "bca"')
    if resamples < 100:
        raise DataError(f"resamples: got {resamples}, allowed is 100 or more")
    sums = cluster_sums(values, clusters)
    estimate = float(statistic(sums.means))
    figures = np.concatenate([statistic(m) for m in resampled_means(sums, resamples, seed)])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca_tails(tails, figures, estimate, _jackknife(sums, statistic))
    if len(sums.counts) < 2 or np.isnan(figures).any():
        low = high = float("nan")
    else:
        low, high = (float(x) for x in np.quantile(figures, tails))
    return Interval(
        estimate=estimate, low=low, high=high, level=level, method=method,
        n_items=int(sums.counts.sum()), n_clusters=len(sums.counts),
    )  # fmt: skip


def _jackknife(sums: ClusterSums, statistic: Statistic) -> Floats:
    """Return the statistic without each cluster, shape (C,)."""
    counts = sums.counts.sum() - sums.counts
    if not counts.all():  # a single cluster
        return np.zeros(len(counts))
    return statistic((sums.sums.sum(axis=0) - sums.sums) / counts[:, None])


def _bca_tails(tails: Floats, figures: Floats, estimate: float, without: Floats) -> Floats:
    """Return the quantiles to read in place of `tails` (Efron 1987, equations 2.3 and 6.6)."""
    normal = NormalDist()
    # Half of the ties: scores of few values hit the estimate often.
    below = ((figures < estimate).sum() + 0.5 * (figures == estimate).sum()) / len(figures)
    if not 0 < below < 1 or np.isnan(without).any():
        return tails
    bias = normal.inv_cdf(float(below))
    spread = without.mean() - without
    square = (spread**2).sum()
    acceleration = float((spread**3).sum() / (6 * square**1.5)) if square > 0 else 0.0
    shifted = []
    for tail in tails:
        z = bias + normal.inv_cdf(float(tail))
        shifted.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return np.array(shifted)
