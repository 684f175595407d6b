"""Metrics of single elements: largest and mean errors, PSNR, order statistics.

x is the original, y the reconstruction, e = y - x, N the number of compared elements, R = max(x) -
min(x). Everything is accumulated in float64, in units that keep squares in range.
"""

from __future__ import annotations

import math

import numpy as np

from lowtide.core.errors import DataError
from lowtide.quality.metrics.pair import Pair
from lowtide.quality.metrics.registry import (
    DECIBELS,
    ERROR,
    SQUARE,
    Metric,
    Score,
)


def max_abs_error(pair: Pair, _: float) -> Score:
    """Largest abs(e)."""
    return Score(pair.extremes.max_abs_error)


def max_rel_error(pair: Pair, _: float) -> Score:
    """Largest abs(e), relative to R."""
    return _over_range(pair, pair.extremes.max_abs_error)


def mse(pair: Pair, _: float) -> Score:
    """Mean of e^2; inf where float64 cannot hold it."""
    root = _rmse(pair)
    return Score(root * root)


def rmse(pair: Pair, _: float) -> Score:
    """Square root of the mean of e^2."""
    return Score(_rmse(pair))


def nrmse(pair: Pair, _: float) -> Score:
    """Root mean square error relative to R; 0 or inf where R is 0."""
    return _over_range(pair, _rmse(pair))


def psnr(pair: Pair, _: float) -> Score:
    """20 log10(R) - 10 log10(MSE), in dB: R is the value range, not the peak."""
    root = _rmse(pair)
    if not root:
        return Score(math.inf)
    if not pair.value_range:
        return Score(-math.inf, _CONSTANT)
    found = pair.extremes
    spread = math.log10(pair.value_range) if pair.value_range < math.inf else (
        math.log10(found.high / 2 - found.low / 2) + math.log10(2)
    )  # fmt: skip
    return Score(20 * (spread - math.log10(root)) if root < math.inf else -math.inf)


def max_pw_rel_error(pair: Pair, _: float) -> Score:
    """Largest abs(e) / abs(x) where x is not 0; zeros are left out and counted."""
    largest, zeros, changed = 0.0, 0, 0
    for x, e in pair.pieces():
        is_zero = x == 0
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            ratios = np.abs(e) / np.abs(x)
        largest = max(largest, float(np.max(ratios, initial=0.0, where=~is_zero)))
        zeros += int(np.count_nonzero(is_zero))
        changed += int(np.count_nonzero(is_zero & (e != 0)))
    notes = {"zeros_excluded": zeros, "zeros_changed": changed}
    if zeros == pair.extremes.count:
        return Score(None, notes | {"degenerate": "all values are 0"})
    return Score(largest, notes)


def error_quantile(pair: Pair, share: float) -> Score:
    """The smallest abs(e) that at least `share` of the elements do not exceed; no interpolation.

    Found by its bits, 16 at a time, so that nothing has to be sorted or held.
    """
    if not 0 < share <= 1:
        raise DataError(f"error_quantile:{share:g}: allowed are shares above 0 and up to 1")
    rank = max(1, math.ceil(share * pair.extremes.count))  # counted from 1
    prefix = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for _, e in pair.pieces():
            bits = np.abs(e).view(np.uint64)
            if shift < 48:
                bits = bits[bits >> np.uint64(shift + 16) == prefix]
            digits = (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        digit = int(np.searchsorted(np.cumsum(counts), rank))
        rank -= int(counts[:digit].sum())
        prefix = prefix << 16 | digit
    return Score(float(np.array([prefix], np.uint64).view(np.float64)[0]))


def relative_l2(pair: Pair, _: float) -> Score:
    """Norm of e over the norm of x: the relative error of a gradient."""
    below = math.sqrt(raw_square(pair))
    if not below:
        return Score(0.0 if pair.extremes.is_exact else math.inf, {"degenerate": "x is 0"})
    return Score(math.sqrt(pair.sums["ee"]) * pair.error_unit / pair.unit / below)


def raw_square(pair: Pair) -> float:
    """Return the mean of x^2 in units of ``pair.unit``, from the moments about the center."""
    center, sums = pair.center / pair.unit, pair.sums
    return sums["xx"] + 2 * center * sums["x"] + center * center


def _rmse(pair: Pair) -> float:
    return math.sqrt(pair.sums["ee"]) * pair.error_unit


_CONSTANT = {"degenerate": "the original is constant"}


def _over_range(pair: Pair, error: float) -> Score:
    if pair.value_range:
        return Score(error / pair.value_range)
    return Score(math.inf if error else 0.0, _CONSTANT)


METRICS = (
    Metric("max_abs_error", "max abs(e)", "lower", max_abs_error, ERROR),
    Metric("max_rel_error", "max abs(e) / (max(x) - min(x))", "lower", max_rel_error, ERROR),
    Metric("mse", "mean(e^2)", "lower", mse, SQUARE),
    Metric("rmse", "sqrt(mean(e^2))", "lower", rmse, ERROR),
    Metric("nrmse", "sqrt(mean(e^2)) / (max(x) - min(x))", "lower", nrmse, ERROR),
    Metric("psnr_db", "value range max(x) - min(x), not the peak", "higher", psnr, DECIBELS),
    Metric(
        "max_pw_rel_error", "max abs(e) / abs(x) over x != 0", "lower", max_pw_rel_error, ERROR
    ),
    Metric(
        "error_quantile", "of abs(e), an element's own value (inverted CDF), not interpolated",
        "lower", error_quantile, ERROR, parameter=0.99,
    ),
    Metric("relative_l2_error", "norm(e) / norm(x)", "lower", relative_l2, ERROR),
)  # fmt: skip
