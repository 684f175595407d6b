"""Quality metrics by name, each with the variant it computes and which way is better."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from lowtide.core.errors import DataError, UnknownNameError, listed, near
from lowtide.quality.metrics.pair import Pair

Better = Literal["higher", "lower", "zero", "none"]


@dataclass(frozen=True)
class Score:
    """What a metric found.

    Attributes:
        value: May be infinite, never NaN; None where the metric is not defined.
        notes: Facts that one needs to read the value, JSON types: what was left out and counted,
            or "degenerate" with the reason.
    """

    value: float | None
    notes: Mapping[str, Any] = field(default_factory=dict)


def undefined(reason: str) -> Score:
    """Return a score without a value."""
    return Score(None, {"degenerate": reason})


@dataclass(frozen=True)
class Scale:
    """Values of a metric as tenfold steps (decades) of the error: larger is better.

    Searches, interpolation and the distance to a target work on it. A perfect value is infinitely
    far up.

    Attributes:
        decades: From a value.
        value: Back; signs of metrics that have both are lost.
    """

    decades: Callable[[float], float]
    value: Callable[[float], float]


def _down(value: float) -> float:
    return -math.log10(abs(value)) if value else math.inf


ERROR = Scale(_down, lambda decades: 10.0**-decades)
SQUARE = Scale(lambda value: _down(value) / 2, lambda decades: 10.0 ** (-2 * decades))
DEFICIT = Scale(  # of a value that is 1 without an error, and loses with its square
    lambda value: _down(1 - value) / 2 if value < 1 else math.inf,
    lambda decades: 1 - 10.0 ** (-2 * decades),
)
DECIBELS = Scale(lambda value: value / 20, lambda decades: 20 * decades)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As in reports and targets; its unit is at the end, if it has one.
        variant: What exactly is computed, where definitions differ.
        better: Which way is better; "zero" for values of both signs.
        compute: Gives the score of a pair and, for metrics that take one, a parameter.
        parameter: Default of the parameter, written as ``name:parameter``; None if there is none.
        scale: On which values are compared.
    """

    name: str
    variant: str
    better: Better
    compute: Callable[[Pair, float], Score]
    scale: Scale
    parameter: float | None = None


# Lazy: a metric's module is imported when one of its metrics is asked for.
_MODULES = ("pointwise", "correlation", "distribution", "gradient", "spectrum", "ssim")
_PACKAGE = __name__.rpartition(".")[0]


@functools.cache
def metrics() -> Mapping[str, Metric]:
    """Return all metrics by name."""
    found: dict[str, Metric] = {}
    for module in _MODULES:
        for metric in importlib.import_module(f"{_PACKAGE}.{module}").METRICS:
            found[metric.name] = metric
    return MappingProxyType(found)


def resolve(name: str) -> tuple[Metric, float]:
    """Return the metric and the parameter that `name` stands for, such as "error_quantile:0.9".

    Raises:
        UnknownNameError: no such metric.
        DataError: the metric takes no parameter, or it is not a number.
    """
    known = metrics()
    base, colon, text = name.partition(":")
    if base not in known:
        raise UnknownNameError(
            f'unknown metric "{name}".{near(base, known)} Known: {listed(known)}'
        )
    metric = known[base]
    if not colon:
        return metric, metric.parameter if metric.parameter is not None else math.nan
    if metric.parameter is None:
        raise DataError(f'metric "{name}": {base} takes no parameter; drop ":{text}"')
    try:
        return metric, float(text)
    except ValueError as error:
        raise DataError(
            f'metric "{name}": {text!r} is not a number; write {base}:{metric.parameter:g}'
        ) from error
