"""The exact test of a bound, and the exponential of the logarithmic domain: FORMAT.md, 6 and 7."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.arguments import checked_array
from lowtide.core.errors import CodecError

_LN2 = 0.6931471805599453
_TERMS = 14
_SPLIT = 134217729.0  # 2**27 + 1: halves the 53 bits of a double
# Within these, no part of a product of two doubles over- or underflows.
_SMALLEST, _LARGEST = 1e-270, 1e290
_EXPONENT_LIMIT = 5000.0  # past all doubles, and still an int


def outside(
    original: NDArray[Any], restored: NDArray[Any], limit: float, is_relative: bool
) -> NDArray[np.int64]:
    """Return where `restored` breaks the bound, decided in exact arithmetic.

    Inside are pairs of finite numbers with |restored - original| <= limit, times |original|
    where the limit is relative. Rounding to nearest keeps order: where the rounded sides differ,
    so do the exact ones, in the same direction. Only where they are equal the rounding errors
    decide, which can be computed without error but for extreme exponents; those few pairs are
    compared as fractions of integers.

    Args:
        original: float32 or float64, shape (n,).
        restored: Dtype and shape of `original`.
        limit: Finite, 0 and more; for a relative bound without unit.
        is_relative: Whether the limit is relative to each value.

    Returns:
        int64, shape (k,): positions in rising order.

    Raises:
        CodecError: An argument is not as above.

    Source: Dekker, A floating-point technique for extending the available precision (1971): the
    errors of a sum (ordered by magnitude) and of a product (with Veltkamp's split).
    """
    if not 0 <= limit < math.inf:
        raise CodecError(f"limit: got {limit}, allowed are finite numbers of 0 and more")
    shape = (original.size,)
    checked_array("original", original, shape, (np.float32, np.float64))
    checked_array("restored", restored, shape, (original.dtype.type,))
    x, r, limit = original.astype(np.float64), restored.astype(np.float64), float(limit)
    with np.errstate(all="ignore"):
        is_finite = np.isfinite(x) & np.isfinite(r)
        distance = np.abs(r - x)
        allowed = limit * np.abs(x) if is_relative else np.full_like(x, limit)
        is_outside = ~is_finite | (distance > allowed)
        doubtful = np.flatnonzero(is_finite & (distance == allowed) & (r != x))
        if doubtful.size:
            x, r, allowed = x[doubtful], r[doubtful], allowed[doubtful]
            excess = _error_of_distance(x, r)
            if is_relative:
                excess = excess - _error_of_product(limit, np.abs(x), allowed)
            is_outside[doubtful] = excess > 0
            is_extreme = ~((allowed > _SMALLEST) & (allowed < _LARGEST))
            if is_relative:
                is_extreme |= ~((np.abs(x) > _SMALLEST) & (np.abs(x) < _LARGEST))
                is_extreme |= not _SMALLEST < limit < _LARGEST
            for i in np.flatnonzero(is_extreme):
                is_outside[doubtful[i]] = _is_outside_exactly(x[i], r[i], limit, is_relative)
    return np.flatnonzero(is_outside).astype(np.int64)


def _error_of_distance(x: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return |r - x| less its rounded value, exactly."""
    big, small = np.where(np.abs(r) >= np.abs(x), (r, -x), (-x, r))
    total = big + small
    error = small - (total - big)
    return np.where(total < 0, -error, error)


def _error_of_product(
    a: float, b: NDArray[np.float64], product: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return a * b less its rounded value, exactly unless an exponent is extreme."""
    a_high, a_low = _split(np.full_like(b, a))
    b_high, b_low = _split(b)
    return (((a_high * b_high - product) + a_high * b_low) + a_low * b_high) + a_low * b_low


def _split(a: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scaled = _SPLIT * a
    high = scaled - (scaled - a)
    return high, a - high


def _is_outside_exactly(x: float, r: float, limit: float, is_relative: bool) -> bool:
    allowed = Fraction(limit) * (abs(Fraction(float(x))) if is_relative else 1)
    return abs(Fraction(float(r)) - Fraction(float(x))) > allowed


def exp2(y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2 to the power of `y`, with the same bits on every machine.

    Args:
        y: float64, shape (n,).

    Returns:
        float64, shape (n,): right to about one part in 2**52; NaN where `y` is not finite.

    Raises:
        CodecError: `y` is not as above.
    """
    checked_array("y", y, (y.size,), (np.float64,))
    with np.errstate(all="ignore"):
        n = np.floor(y + 0.5)
        g = (y - n) * _LN2
        total = np.full_like(y, 1.0 / math.factorial(_TERMS - 1))
        for k in range(_TERMS - 2, -1, -1):
            total = total * g + 1.0 / math.factorial(k)
        exponent = np.clip(np.nan_to_num(n), -_EXPONENT_LIMIT, _EXPONENT_LIMIT)
        return np.ldexp(total, exponent.astype(np.int32))
