"""How the distribution of values changes, whatever their places."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.quality.metrics.pair import Pair
from lowtide.quality.metrics.registry import ERROR, SQUARE, Metric, Score

Values = NDArray[np.floating[Any]]

MERGED = 1 << 18  # elements of both that are put in order at once
KL_BINS = 256
KL_SMOOTHING = 0.5  # added to the count of every bin of both


def ks_statistic(pair: Pair, _: float) -> Score:
    """Kolmogorov-Smirnov: the largest gap between the two empirical distribution functions."""
    if pair.extremes.is_exact:
        return Score(0.0)
    x, y = _sorted(pair)
    count, largest = len(x), 0
    begin_x = begin_y = 0
    while begin_x < count or begin_y < count:
        # Up to the next edge, all equal values together: both functions jump there at once.
        edges = [
            float(values[min(begin + MERGED, count) - 1])
            for values, begin in ((x, begin_x), (y, begin_y))
            if begin < count
        ]
        edge = min(edges)
        end_x = int(np.searchsorted(x, edge, side="right"))
        end_y = int(np.searchsorted(y, edge, side="right"))
        gap = _largest_gap(x[begin_x:end_x], y[begin_y:end_y], begin_x - begin_y)
        largest, begin_x, begin_y = max(largest, gap), end_x, end_y
    return Score(largest / count)


def _largest_gap(x: Values, y: Values, before: int) -> int:
    """Return the largest abs(count of x - count of y) in a stretch that starts at `before`."""
    both = np.concatenate([x, y])
    order = np.argsort(both, kind="stable")  # two sorted runs: merged in linear time
    steps = np.where(order < len(x), 1, -1)
    is_last = np.ones(len(both), bool)
    ordered = both[order]
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return int(np.abs(before + np.cumsum(steps)[is_last]).max())


def _sorted(pair: Pair) -> tuple[Values, Values]:
    parts = list(pair.values(narrow=True))
    x, y = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
    x.sort()
    y.sort()
    return x, y


def kl_divergence(pair: Pair, _: float) -> Score:
    """Kullback-Leibler divergence of x from y in nats, on bins over the joint range."""
    found = pair.extremes
    low, high = min(found.low, found.low_after), max(found.high, found.high_after)
    if low == high:
        return Score(0.0, {"degenerate": "all values are equal"})
    p, q = _histograms(pair, low, high)
    p, q = p + KL_SMOOTHING, q + KL_SMOOTHING
    p, q = p / p.sum(), q / q.sum()
    # Not below 0 but for rounding.
    return Score(max(0.0, float(np.sum(p * np.log(p / q)))))


def _histograms(
    pair: Pair, low: float, high: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    totals = np.zeros((2, KL_BINS))
    half_width = high / 2 - low / 2
    for both in pair.values():
        for row, values in zip(totals, both, strict=True):
            places = (values / 2 - low / 2) / half_width * KL_BINS
            bins = np.minimum(places.astype(np.int64), KL_BINS - 1)
            row += np.bincount(bins, minlength=KL_BINS)
    return totals[0], totals[1]


METRICS = (
    Metric(
        "ks_statistic", "largest gap of the empirical distribution functions", "lower",
        ks_statistic, ERROR,
    ),
    Metric(
        "kl_divergence", f"of x from y, nats, {KL_BINS} equal bins over the joint range, "
        f"{KL_SMOOTHING} added to every count", "lower", kl_divergence, SQUARE,
    ),
)  # fmt: skip
