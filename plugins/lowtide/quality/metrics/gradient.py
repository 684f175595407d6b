"""Errors of finite differences: what derivatives computed from the reconstruction are off by."""

from __future__ import annotations

import math

import numpy as np

from lowtide.quality.metrics.pair import Floats, Pair
from lowtide.quality.metrics.pointwise import raw_square
from lowtide.quality.metrics.registry import ERROR, Metric, Score, undefined


def gradient_error(pair: Pair, _: float) -> Score:
    """Norm of the differences of e over that of the differences of x, along all axes together."""
    if all(length == 1 for length in pair.shape):
        return undefined(f"shape {pair.shape} has no neighbours")
    x_total, e_total = _squares(pair)
    return _ratio(e_total, x_total, pair)


def sobolev_error(pair: Pair, _: float) -> Score:
    """The same in the H1 norm: squares of values and of differences, added up."""
    count = pair.extremes.count
    x_total, e_total = _squares(pair)
    return _ratio(e_total + count * pair.sums["ee"], x_total + count * raw_square(pair), pair)


def _squares(pair: Pair) -> tuple[float, float]:
    """Return the sums of squared differences of x and e, in units of theirs."""
    return pair.cached("difference squares", lambda: _summed(pair))


def _summed(pair: Pair) -> tuple[float, float]:
    x_total = e_total = 0.0
    for axis, length in enumerate(pair.shape):
        if length == 1:
            continue
        for x, e in pair.blocks(axis, 1):
            x_total += _square(np.diff(x, axis=1) / pair.unit)
            e_total += _square(np.diff(e, axis=1) / pair.error_unit)
    return x_total, e_total


def _square(differences: Floats) -> float:
    flat = differences.reshape(-1)
    total = float(flat @ flat)
    # Only what is left out is NaN; most arrays have none of it.
    return total if not math.isnan(total) else float(np.nansum(flat * flat))


def _ratio(e_total: float, x_total: float, pair: Pair) -> Score:
    if not x_total:
        return Score(math.inf if e_total else 0.0, {"degenerate": "the original does not vary"})
    return Score(math.sqrt(e_total / x_total) * pair.error_unit / pair.unit)


METRICS = (
    Metric(
        "gradient_error", "relative L2 of first differences along all axes, those of length 1 "
        "skipped", "lower", gradient_error, ERROR,
    ),
    Metric(
        "sobolev_error", "relative H1 norm: values and first differences, spacing 1", "lower",
        sobolev_error, ERROR,
    ),
)  # fmt: skip
