"""What stage 2 predicts: each metric on a scale of its own, as the distance to what the probe says.

Ratios as logarithms, PSNR in decades, what is 1 less something as the logarithm of the something,
autocorrelations as their area tangent: errors on these scales are what a user feels as the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lowtide.quality.metrics.registry import Scale, resolve
from lowtide.quality.predictors import Interval
from lowtide.quality.surrogate.probe import NAMES as PROBED
from lowtide.quality.targets import SIZES, scale_of

Floats = NDArray[np.float64]

RATIO = "compression_ratio"
METRICS = (RATIO, "psnr_db", "dssim", "error_autocorr", "spectral_error")
_MOST_CORRELATED = 0.999
_AT = {name: place for place, name in enumerate(PROBED)}


def to_scale(metric: str, value: float | None) -> float:
    """Return a metric's value on its scale; NaN where it has none there."""
    if value is None or math.isnan(value):
        return math.nan
    if _has_both_signs(metric):
        return math.atanh(min(max(value, -_MOST_CORRELATED), _MOST_CORRELATED))
    try:
        found = _scale(metric).decades(value)
    except ValueError:
        return math.nan
    return found if math.isfinite(found) else math.nan


def from_scale(metric: str, place: float, half_width: float) -> Interval:
    """Return value and interval from a place on a metric's scale and half a width around it."""
    ends = [_value(metric, place + shift) for shift in (0.0, -half_width, half_width)]
    return Interval(ends[0], min(ends[1:]), max(ends[1:]))


def _value(metric: str, place: float) -> float:
    if _has_both_signs(metric):
        return math.tanh(place)
    value = _scale(metric).value(min(max(place, -30.0), 30.0))
    return max(1.0, value) if metric == RATIO else value


@functools.cache
def _scale(metric: str) -> Scale:
    return scale_of(metric)


@functools.cache
def _has_both_signs(metric: str) -> bool:
    return metric not in SIZES and resolve(metric)[0].better == "zero"


def probed_at(metric: str, rows: Floats, item_bits: int) -> Floats:
    """Return what the probe says of a metric, on its scale; 0 where it says nothing.

    Args:
        metric: Its name.
        rows: Rows of the probe at some bounds, shape (bounds, len(PROBED)).
        item_bits: Of one element.
    """
    if metric == RATIO:
        return np.asarray(
            (math.log2(item_bits) - rows[:, _AT["interpolation_bits"]]) * math.log10(2)
        )
    if metric == "psnr_db":
        return np.asarray(-rows[:, _AT["interpolation_mse"]] / 2)
    if metric in ("dssim", "ssim"):
        return np.asarray(-rows[:, _AT["interpolation_dssim"]] / 2)
    if metric == "error_autocorr":
        limit = _MOST_CORRELATED
        found = np.clip(rows[:, _AT["interpolation_autocorrelation"]], -limit, limit)
        return np.asarray(np.arctanh(found))
    return np.zeros(len(rows))


def with_derived(
    found: Mapping[str, Interval], *, relative: float, value_range: float, item_bits: int
) -> dict[str, Interval]:
    """Add what follows from what is predicted, and from the bound alone."""
    metrics = dict(found)
    if RATIO in found:
        value, lower, upper = found[RATIO]
        metrics["bit_rate"] = Interval(item_bits / value, item_bits / upper, item_bits / lower)
    if "dssim" in found:
        value, lower, upper = (1 - each for each in found["dssim"])
        metrics.setdefault("ssim", Interval(value, upper, lower))
    if "psnr_db" in found:
        value, lower, upper = (10 ** (-each / 20) for each in found["psnr_db"])
        nrmse = Interval(value, upper, lower)
        metrics["nrmse"] = nrmse
        metrics["rmse"] = Interval(*(each * value_range for each in nrmse))
        metrics["mse"] = Interval(*((each * value_range) ** 2 for each in nrmse))
    metrics["max_rel_error"] = Interval(relative, 0.0, relative)
    metrics["max_abs_error"] = Interval(*(each * value_range for each in metrics["max_rel_error"]))
    return metrics


def scaled(metrics: Sequence[str], values: Mapping[str, float | None]) -> Floats:
    """Return the metrics of one measurement on their scales, NaN for what was not measured."""
    return np.array([to_scale(name, values.get(name)) for name in metrics], np.float64)
