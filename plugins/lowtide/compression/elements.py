"""Element types that ``lowtide.sz`` takes, and the working types it computes in (FORMAT, 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import CodecError, listed
from lowtide.core.stream import numpy_dtype

Array = NDArray[Any]


@dataclass(frozen=True)
class ElementType:
    """A binary floating-point type.

    Attributes:
        name: As in stream headers.
        precision: Bits of the significand, with the implicit one.
        min_exponent: Exponent of the smallest normal number.
    """

    name: str
    precision: int
    min_exponent: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Numpy's type for the elements, or for their bits."""
        return numpy_dtype(self.name)

    @property
    def working(self) -> np.dtype[Any]:
        """float32 or float64, whichever holds every element."""
        return np.dtype(np.float64 if self.name == "float64" else np.float32)

    def widen(self, elements: Array) -> Array:
        """Return elements in the working type, exactly; the same memory if that is their own."""
        if self.name == "bfloat16":
            return (elements.astype(np.uint32) << 16).view(np.float32)
        return elements.astype(self.working, copy=False)

    def narrow(self, values: Array) -> Array:
        """Return float32 or float64 values as elements, rounded once, to nearest even."""
        if self.name == "bfloat16":
            return _bfloat16_bits(values)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(self.dtype, copy=False)

    def half_ulp(self, largest: float) -> float:
        """Return half the distance from `largest`, finite and not negative, to its neighbour."""
        exponent = math.frexp(largest)[1] - 1 if largest else self.min_exponent
        return math.ldexp(1.0, max(exponent, self.min_exponent) - self.precision)

    @property
    def half_spacing(self) -> float:
        """Half the relative distance between neighbours, at most."""
        return math.ldexp(1.0, -self.precision)


_TYPES = {
    each.name: each
    for each in (
        ElementType("float16", 11, -14),
        ElementType("bfloat16", 8, -126),
        ElementType("float32", 24, -126),
        ElementType("float64", 53, -1022),
    )
}


def element_type(name: str) -> ElementType:
    """Return the element type called `name`, or raise CodecError."""
    if name not in _TYPES:
        raise CodecError(
            f'codec "lowtide.sz": elements are {name}, allowed are {listed(_TYPES)}; use codec '
            '"lowtide.zstd" for others, which is lossless'
        )
    return _TYPES[name]


def _bfloat16_bits(values: Array) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    if values.dtype == np.float64:
        # Rounding twice would not be to nearest: inexact float32 are made odd instead, so that
        # the second rounding sees on which side of a tie they are.
        with np.errstate(invalid="ignore"):
            is_inexact = single.astype(np.float64) != values
            is_above = np.abs(single) > np.abs(values)
        bits = np.where(is_inexact, (bits - is_above) | 1, bits).astype(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # only forged streams give any
    return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16)
