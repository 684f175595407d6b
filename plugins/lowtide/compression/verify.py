"""Whether what a stream gives is what its codec promised, in exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowtide.compression.bounds import extremes, fill_of, limits_of, ordinary
from lowtide.compression.elements import Array, ElementType, element_type
from lowtide.compression.primitives import primitives
from lowtide.core.codec import ArrayData, Bound
from lowtide.core.errors import CodecError

_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Errors:
    """How far decoded elements are from what they were.

    Attributes:
        outside: How many are not what was promised: finite ones outside the bound, others that do
            not have the same bits.
        max_abs: The largest difference of finite elements, rounded to float64; None if lossless.
        limit: What "abs" or "rel" allows it to be; None for other bounds.
    """

    outside: int
    max_abs: float | None = None
    limit: float | None = None


def measure(
    original: ArrayData, decoded: ArrayData, bound: Bound, *, fill_value: float | None = None
) -> Errors:
    """Compare elements with what they became.

    Args:
        original: Of any type for a lossless bound, else of one that "lowtide.sz" takes.
        decoded: As many elements of the same type.
        bound: What was promised.
        fill_value: Has to come back exactly, and is not part of the range of a "rel" bound.

    Raises:
        CodecError: the two do not fit together, or a bound of this type cannot be checked.
    """
    x, y = original.values.reshape(-1), decoded.values.reshape(-1)
    if original.dtype != decoded.dtype or len(x) != len(y):
        raise CodecError(
            f"{len(x)} elements of {original.dtype} cannot be compared with {len(y)} of "
            f"{decoded.dtype}"
        )
    pieces = [slice(begin, begin + _PIECE_ELEMENTS) for begin in range(0, len(x), _PIECE_ELEMENTS)]
    if bound.kind == "lossless":
        return Errors(sum(_differing(x[piece], y[piece]) for piece in pieces))
    element = element_type(original.dtype)
    fill = fill_of(fill_value, element)
    limit = None
    if bound.kind in ("abs", "rel"):
        found = (extremes(element.widen(x[piece]), fill) for piece in pieces)
        limit = limits_of(bound.kind, bound.value, element, found).limit
    outside, largest = 0, 0.0
    for piece in pieces:
        wrong, error = _compare(x[piece], y[piece], element, fill, bound, limit)
        outside, largest = outside + wrong, max(largest, error)
    return Errors(outside, largest, limit)


def _compare(
    x: Array, y: Array, element: ElementType, fill: np.floating | None, bound: Bound,
    limit: float | None,
) -> tuple[int, float]:  # fmt: skip
    """Return how many elements are not as promised, and the largest difference."""
    before, after = element.widen(x), element.widen(y)
    mask = ordinary(before, fill)
    outside = 0
    if mask is not None:
        outside = _differing(x[~mask], y[~mask])
        before, after = before[mask], after[mask]
    if not len(before):
        return outside, 0.0
    if bound.kind != "none":
        is_each = bound.kind == "pw_rel"
        allowed = bound.value if limit is None else limit
        outside += len(primitives().outside(before, after, allowed, is_each))
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(after.astype(np.float64) - before.astype(np.float64))
    return outside, float(np.max(error, initial=0.0, where=~np.isnan(error)))


def _differing(x: Array, y: Array) -> int:
    """Return how many elements do not have the same bits."""
    width = x.itemsize
    same = x.reshape(-1, 1).view(np.uint8) == y.reshape(-1, 1).view(np.uint8)
    return int(np.count_nonzero(~same.reshape(-1, width).all(axis=1)))
