"""Whether decoded numbers are within the bound that a codec promised, in exact arithmetic."""

from __future__ import annotations

import sys
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.codec import Bound
from lowtide.core.stream import numpy_dtype

_ROUNDING = 2.0**-50  # more than three roundings to float64 change a number by, relatively
_SMALLEST = 2.0**-1000  # below, roundings are no longer relative


def exact_values(raw: bytes, dtype: str) -> NDArray[Any]:
    """Return elements of a floating type as float64, which holds all of them."""
    values: NDArray[Any] = np.frombuffer(raw, numpy_dtype(dtype))
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return values.astype(np.float64)


def keeps_bound(before: bytes, after: bytes, dtype: str, bound: Bound) -> bool:
    """Tell whether finite elements `before` and what they became keep `bound`.

    In float64 almost all elements are far enough from the bound for roundings not to matter; the
    others are compared as fractions.

    Args:
        before: The elements.
        after: As many, decoded.
        dtype: Their type, a floating one.
        bound: What was promised; of kind "rel" for these elements by themselves.
    """
    if bound.kind not in ("abs", "rel", "pw_rel"):
        return before == after
    x, y = exact_values(before, dtype), exact_values(after, dtype)
    if len(x) != len(y) or not np.isfinite(y).all():
        return False
    limit = Fraction(bound.value)
    if bound.kind == "rel" and len(x):
        limit *= Fraction(float(x.max())) - Fraction(float(x.min()))
    is_each = bound.kind == "pw_rel"
    with np.errstate(over="ignore", under="ignore"):
        error = np.abs(y - x)
        near = float(min(limit, Fraction(sys.float_info.max))) * (np.abs(x) if is_each else 1.0)
        is_sure = (error <= near * (1 - _ROUNDING)) & (near > _SMALLEST)
        is_beyond = error > near * (1 + _ROUNDING)
    # Of two different numbers the difference is never rounded to 0.
    is_sure |= error == 0
    if (is_beyond & ~is_sure).any():
        return False
    for a, b in zip(x[~is_sure].tolist(), y[~is_sure].tolist(), strict=True):
        if abs(Fraction(b) - Fraction(a)) > limit * (abs(Fraction(a)) if is_each else 1):
            return False
    return True
