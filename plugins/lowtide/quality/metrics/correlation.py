"""How errors hang together with each other and with the data."""

from __future__ import annotations

import math

import numpy as np

from lowtide.core.errors import DataError
from lowtide.quality.metrics.pair import PIECE, Floats, Pair
from lowtide.quality.metrics.pointwise import raw_square
from lowtide.quality.metrics.registry import DEFICIT, ERROR, Metric, Score, undefined


def pearson(pair: Pair, _: float) -> Score:
    """Correlation coefficient of x and y; None if one of them is constant."""
    covariance, x_variance, y_variance = _moments(pair)
    found = pair.extremes
    if found.low == found.high or found.low_after == found.high_after:
        return undefined("one of the two is constant")
    if not (x_variance > 0 and y_variance > 0):
        return undefined("no variance that float64 can hold")
    return Score(_within_one(covariance / math.sqrt(x_variance) / math.sqrt(y_variance)))


def cosine(pair: Pair, _: float) -> Score:
    """Cosine of the angle between x and y as vectors; None if one of them is 0."""
    sums, ratio, center = pair.sums, pair.error_unit / pair.unit, pair.center / pair.unit
    xx = raw_square(pair)
    xe = (sums["xe"] + center * sums["e"]) * ratio
    yy = xx + 2 * xe + sums["ee"] * ratio * ratio
    if not (xx > 0 and yy > 0):
        return undefined("one of the two is 0")
    return Score(_within_one((xx + xe) / math.sqrt(xx) / math.sqrt(yy)))


def error_autocorrelation(pair: Pair, lag: float) -> Score:
    """cov(e_i, e_i+lag) / var(e) over the flattened (row-major) error."""
    step, variance = _lag(lag), _error_variance(pair)
    if pair.extremes.is_exact or not variance > 0:
        return Score(0.0, {"degenerate": "the error is constant"})
    if pair.size <= step:
        return undefined(f"{pair.size} elements have no lag {step}")
    mean = pair.sums["e"]
    total, count = 0.0, 0
    for begin in range(0, pair.size - step, PIECE):
        _, e = pair.read(begin, min(begin + PIECE + step, pair.size))
        part, number = _products(e[:-step], e[step:], pair, mean)
        total, count = total + part, count + number
    return Score(_within_one(total / count / variance)) if count else undefined("no pair is left")


def error_autocorrelation_axes(pair: Pair, lag: float) -> Score:
    """The same along each axis; the one with the largest absolute value counts."""
    step, variance = _lag(lag), _error_variance(pair)
    if pair.extremes.is_exact or not variance > 0:
        return Score(0.0, {"degenerate": "the error is constant"})
    mean, found = pair.sums["e"], {}
    for axis, length in enumerate(pair.shape):
        if length <= step:
            continue
        total, count = 0.0, 0
        for _, e in pair.blocks(axis, step):
            part, number = _products(e[:, :-step], e[:, step:], pair, mean)
            total, count = total + part, count + number
        if count:
            found[axis] = _within_one(total / count / variance)
    if not found:
        return undefined(f"no axis of {pair.shape} has a lag {step}")
    worst = max(found, key=lambda axis: abs(found[axis]))
    return Score(found[worst], {"axes": {str(axis): value for axis, value in found.items()}})


def _products(a: Floats, b: Floats, pair: Pair, mean: float) -> tuple[float, int]:
    products = (a / pair.error_unit - mean) * (b / pair.error_unit - mean)
    if not pair.has_left_out:
        return float(products.sum()), products.size
    return float(np.nansum(products)), int(np.count_nonzero(~np.isnan(products)))


def _error_variance(pair: Pair) -> float:
    sums = pair.sums
    variance = sums["ee"] - sums["e"] ** 2
    # What rounding leaves of an error that is the same everywhere is no variance.
    return variance if variance > 1e-14 * sums["ee"] else 0.0


def _lag(lag: float) -> int:
    if not (lag >= 1 and lag == int(lag)):
        raise DataError(f"error_autocorr:{lag:g}: allowed lags are 1, 2 and more")
    return int(lag)


def _moments(pair: Pair) -> tuple[float, float, float]:
    """Return covariance of x and y and both variances, in units of ``pair.unit`` squared."""
    sums, ratio = pair.sums, pair.error_unit / pair.unit
    x_variance = sums["xx"] - sums["x"] ** 2
    cross = (sums["xe"] - sums["x"] * sums["e"]) * ratio
    e_variance = (sums["ee"] - sums["e"] ** 2) * ratio * ratio
    return x_variance + cross, x_variance, x_variance + 2 * cross + e_variance


def _within_one(value: float) -> float:
    return max(-1.0, min(1.0, value))


METRICS = (
    Metric("pearson_r", "of x and y", "higher", pearson, DEFICIT),
    Metric("cosine_similarity", "of x and y as vectors", "higher", cosine, DEFICIT),
    Metric(
        "error_autocorr", "flattened row-major, mean over the pairs / population variance; 0 where "
        "the error is constant", "zero", error_autocorrelation, ERROR, parameter=1,
    ),
    Metric(
        "error_autocorr_axes", "along each axis, the one that is largest without its sign; 0 where "
        "the error is constant", "zero", error_autocorrelation_axes, ERROR, parameter=1,
    ),
)  # fmt: skip
