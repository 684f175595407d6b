"""From what a user asks for to what the quantizer does (FORMAT section 7), exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from lowtide.compression.elements import Array, ElementType
from lowtide.compression.payload import LINEAR, LOGARITHMIC

_LARGEST_STEP = 1e300
_SAMPLE = 4096  # elements that rule out a lattice, in nearly every array
_CODES = 1 << 30  # larger ones are not coded
_FINEST = 256.0  # steps of coarse levels and of samples are at most so much finer


@dataclass(frozen=True)
class Limits:
    """What one array may lose.

    Attributes:
        domain: LINEAR or LOGARITHMIC.
        step: Of the quantizer; decides on the size only.
        limit: An element may differ by so much from what it was, in exact arithmetic; in domain
            LOGARITHMIC times its own size.
        is_lattice: Whether all elements are multiples of the step, so that nothing is lost if
            every code says how many.
    """

    domain: int
    step: float
    limit: float
    is_lattice: bool = False

    @property
    def is_lossless(self) -> bool:
        """Whether no element may differ at all, or the quantizer cannot work."""
        return not (self.limit > 0 and self.step > 0 and math.isfinite(_FINEST / self.step))


def fill_of(fill_value: float | None, element: ElementType) -> np.floating | None:
    """Return the fill value as an element, in the working type."""
    if fill_value is None:
        return None
    value: np.floating = element.widen(element.narrow(np.array([fill_value], np.float64)))[0]
    return value


def ordinary(original: Array, fill: np.floating | None) -> Array | None:
    """Return which values are finite and not the fill value, as a mask; None if all are."""
    mask = np.isfinite(original)
    if fill is not None:
        mask &= original != fill
    return None if mask.all() else mask


def extremes(original: Array, fill: np.floating | None) -> tuple[float, float] | None:
    """Return the smallest and the largest of the ordinary values, or None if there are none."""
    mask = ordinary(original, fill)
    values = original if mask is None else original[mask]
    return (float(values.min()), float(values.max())) if len(values) else None


def limits_of(
    mode: str,
    bound: float,
    element: ElementType,
    found: Iterable[tuple[float, float] | None],
) -> Limits:
    """Return what an array may lose.

    Args:
        mode: "abs", "rel" or "pw_rel".
        bound: Not negative.
        element: Of the array.
        found: `extremes` of its chunks; not looked at for "pw_rel".
    """
    if mode == "pw_rel":
        error = math.log1p(bound) / math.log(2)
        return Limits(LOGARITHMIC, _step(error, 1.4427 * element.half_spacing), bound)
    pairs = [pair for pair in found if pair is not None] or [(0.0, 0.0)]
    low, high = min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    limit = bound
    if mode == "rel":
        limit = rounded_down(Fraction(bound) * (Fraction(high) - Fraction(low)))
    return Limits(LINEAR, _step(limit, element.half_ulp(max(abs(low), abs(high)))), limit)


def on_lattice(limits: Limits, flat: Array, wide: Callable[[Array], Array]) -> Limits:
    """Return limits with the largest step of which all ordinary elements are multiples.

    Integers and counts are such data. Where that step is larger than the one that the bound asks
    for, it makes smaller codes, and no error. Without such a step the limits stay as they are.

    Args:
        limits: In domain LINEAR, not lossless.
        flat: All elements.
        wide: Gives the ordinary ones of some elements, in the working type.
    """
    sample = wide(flat[:: max(1, len(flat) // _SAMPLE)])
    step = _unit(sample)
    if not step > limits.step:
        return limits
    for begin in range(0, len(flat), 1 << 20):
        with np.errstate(over="ignore"):
            values = wide(flat[begin : begin + (1 << 20)]) / step  # a power of two: exact
        if not (np.abs(values) < _CODES).all():
            return limits
        if not (values == np.rint(values)).all():
            step = min(step, step * _unit(values))
            if not step > limits.step:
                return limits
    return replace(limits, step=step, is_lattice=True)


def _unit(values: Array) -> float:
    """Return the largest power of two of which all values are multiples; 0 if all are 0."""
    fraction, exponent = np.frexp(values[values != 0].astype(np.float64))
    whole = np.ldexp(fraction, 53).astype(np.int64)
    _, lowest = np.frexp((whole & -whole).astype(np.float64))
    exponents = exponent + lowest - 54
    return math.ldexp(1.0, int(exponents.min())) if len(exponents) else 0.0


def rounded_down(value: Fraction) -> float:
    """Return the largest float that is not above `value`, which is not negative."""
    try:
        nearest = float(value)
    except OverflowError:
        return math.nextafter(math.inf, 0)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, 0)


def _step(error: float, rounding: float) -> float:
    # Rounding to the element type adds to the error, so a smaller step saves exceptions.
    step = 2 * (error - rounding) if rounding <= error / 2 else 2 * error
    return min(step, _LARGEST_STEP)
