"""An original and what became of it, read in pieces as float64.

All metrics get their numbers from a `Pair`: one pass finds extremes and what has to be left out, so
that later passes know their units, and no metric ever holds the whole array in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError
from lowtide.core.stream import BIT_TYPES, ArrayData, as_array

Floats = NDArray[np.float64]

T = TypeVar("T")
_NARROW = {"float16", "bfloat16", "float32"}
# Elements. In float64 a few of them fit into a core's cache, and stay below the size from which
# malloc gives memory back to the system after each use.
PIECE = 1 << 15


@dataclass(frozen=True)
class Extremes:
    """What one pass over both arrays finds.

    Attributes:
        count: Elements that are compared: finite in both arrays.
        nonfinite: NaNs and infinities that came back as such, and are left out.
        mismatched: Elements that are finite in one array only, or another kind of non-finite.
        low: Smallest compared element of the original; nan without one.
        high: The largest.
        low_after: Smallest compared element of the reconstruction.
        high_after: The largest.
        max_abs_error: Largest absolute difference, rounded to float64.
        is_exact: Whether all elements have equal values (0.0 and -0.0 do).
    """

    count: int
    nonfinite: int
    mismatched: int
    low: float
    high: float
    low_after: float
    high_after: float
    max_abs_error: float
    is_exact: bool


class Pair:
    """Two arrays of one shape.

    Args:
        original: Numpy array, torch tensor or `ArrayData` of real numbers, any layout; tensors
            may lie on a device, and are copied to the host.
        reconstructed: The same shape; the type may differ.
        value_range: max - min to use instead of the original's own, for parts of larger arrays.

    Raises:
        DataError: the shapes differ, or an array does not hold real numbers.
    """

    def __init__(
        self, original: Any, reconstructed: Any, *, value_range: float | None = None
    ) -> None:
        before, after = _checked("original", original), _checked("reconstructed", reconstructed)
        if before.values.shape != after.values.shape:
            raise DataError(
                f"original has shape {before.values.shape}, reconstructed "
                f"{after.values.shape}; both must be the same, so reshape one of them"
            )
        self.shape: tuple[int, ...] = before.values.shape
        self.size = before.values.size
        self._before, self._after = before, after
        self._x, self._y = before.values.reshape(-1), after.values.reshape(-1)
        self._range = value_range
        self._cache: dict[str, Any] = {}

    @property
    def is_same_bits(self) -> bool:
        """Whether both arrays have one type and the same bits."""
        if self._before.dtype != self._after.dtype:
            return False
        views = (each.reshape(-1).view(np.uint8) for each in (self._x, self._y))
        return all(
            np.array_equal(one, other) for one, other in zip(*map(_byte_pieces, views), strict=True)
        )

    def raw(self, begin: int, end: int) -> tuple[Floats, Floats]:
        """Return original and reconstruction of flat positions as float64, all of them."""
        x = _wide(self._x[begin:end], self._before.dtype)
        return x, _wide(self._y[begin:end], self._after.dtype)

    def read(self, begin: int, end: int) -> tuple[Floats, Floats]:
        """Return original and error (reconstructed - original), NaN where left out."""
        x, y = self.raw(begin, end)
        with np.errstate(invalid="ignore", over="ignore"):
            e = y - x
        if self.has_left_out:
            is_out = ~(np.isfinite(x) & np.isfinite(y))
            x[is_out] = e[is_out] = np.nan
        return x, e

    def pieces(self) -> Iterator[tuple[Floats, Floats]]:
        """Yield original and error of the compared elements, flat, a piece at a time."""
        for begin in range(0, self.size, PIECE):
            x, e = self.read(begin, min(begin + PIECE, self.size))
            if self.has_left_out:
                is_in = ~np.isnan(x)
                x, e = x[is_in], e[is_in]
            if len(x):
                yield x, e

    def values(self, *, narrow: bool = False) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield original and reconstruction of the compared elements, flat, a piece at a time.

        Args:
            narrow: As float32 where that holds all elements of both arrays, else as float64.
        """
        is_narrow = narrow and {self._before.dtype, self._after.dtype} <= _NARROW
        for begin in range(0, self.size, PIECE):
            x, y = self.raw(begin, min(begin + PIECE, self.size))
            if self.has_left_out:
                is_in = np.isfinite(x) & np.isfinite(y)
                x, y = x[is_in], y[is_in]
            yield (x.astype(np.float32), y.astype(np.float32)) if is_narrow else (x, y)

    def cached(self, key: str, function: Callable[[], T]) -> T:
        """Return ``function()``, called once for each `key`: metrics share what is costly."""
        if key not in self._cache:
            self._cache[key] = function()
        found: T = self._cache[key]
        return found

    def blocks(self, axis: int, overlap: int) -> Iterator[tuple[Floats, Floats]]:
        """Yield original and error as (outer, length, inner) blocks, to shift along `axis`.

        Blocks overlap by `overlap` along the middle axis, so each pair of elements that are so
        far apart along `axis` is in one block exactly once. NaN where left out.
        """
        length, inner = self.shape[axis], math.prod(self.shape[axis + 1 :])
        outer = math.prod(self.shape[:axis])
        whole = length * inner
        if whole <= PIECE:
            step = max(1, PIECE // max(1, whole))
            for begin in range(0, outer, step):
                end = min(begin + step, outer)
                x, e = self.read(begin * whole, end * whole)
                yield x.reshape(-1, length, inner), e.reshape(-1, length, inner)
            return
        rows = max(1, PIECE // inner)
        for number in range(outer):
            for begin in range(0, length - overlap, rows):
                end = min(begin + rows + overlap, length)
                x, e = self.read((number * length + begin) * inner, (number * length + end) * inner)
                yield x.reshape(1, -1, inner), e.reshape(1, -1, inner)

    @property
    def has_left_out(self) -> bool:
        """Whether some elements are not finite in one array or both."""
        return self.extremes.count != self.size

    @functools.cached_property
    def extremes(self) -> Extremes:
        """What one pass finds; see `Extremes`."""
        parts = [
            _scan(*self.raw(begin, min(begin + PIECE, self.size)))
            for begin in range(0, self.size, PIECE)
        ]
        counted = [part for part in parts if part.count]
        nothing = [math.nan]
        return Extremes(
            count=sum(part.count for part in parts),
            nonfinite=sum(part.nonfinite for part in parts),
            mismatched=sum(part.mismatched for part in parts),
            low=min([part.low for part in counted] or nothing),
            high=max([part.high for part in counted] or nothing),
            low_after=min([part.low_after for part in counted] or nothing),
            high_after=max([part.high_after for part in counted] or nothing),
            max_abs_error=max([part.max_abs_error for part in counted] or nothing),
            is_exact=all(part.is_exact for part in parts),
        )

    @functools.cached_property
    def value_range(self) -> float:
        """R = max - min of the original's compared elements; inf if float64 cannot hold it."""
        if self._range is not None:
            return self._range
        found = self.extremes
        return found.high - found.low if found.count else math.nan

    @functools.cached_property
    def unit(self) -> float:
        """A power of two near the largest compared element, so that squares neither overflow."""
        found = self.extremes
        return _power_of_two(max(abs(found.low), abs(found.high))) if found.count else 1.0

    @functools.cached_property
    def error_unit(self) -> float:
        """The same for the error; 1 if there is none."""
        return _power_of_two(self.extremes.max_abs_error) if self.extremes.count else 1.0

    @functools.cached_property
    def sums(self) -> dict[str, float]:
        """Means over the compared elements, x in units of `unit`, e in units of `error_unit`.

        Keys: "x", "e", "xx", "ee", "xe"; "x" and "xx", "xe" are about `center`.
        """
        totals = np.zeros(5)
        for x, e in self.pieces():
            x = (x - self.center) / self.unit
            e = e / self.error_unit
            totals += (x.sum(), e.sum(), x @ x, e @ e, x @ e)
        count = max(1, self.extremes.count)
        names = ("x", "e", "xx", "ee", "xe")
        return dict(zip(names, (totals / count).tolist(), strict=True))

    @property
    def center(self) -> float:
        """Middle of the original's range: second moments about it do not cancel."""
        found = self.extremes
        return found.low / 2 + found.high / 2


def _byte_pieces(raw: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [raw[begin : begin + 8 * PIECE] for begin in range(0, len(raw), 8 * PIECE)]


def _checked(which: str, given: Any) -> ArrayData:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
    elif not isinstance(given, (np.ndarray, ArrayData)):
        given = np.asarray(given)
    data = given if isinstance(given, ArrayData) else as_array(given)
    if data.dtype.startswith(("complex", "bool")):
        raise DataError(
            f"{which} holds {data.dtype}, which has no error to measure; pass real numbers, such "
            "as the real and the imaginary part"
        )
    return data


def _wide(values: NDArray[Any], dtype: str) -> Floats:
    """Return elements as float64, always a copy; bit types through torch, which knows them."""
    if dtype in BIT_TYPES:
        wide: Floats = torch.from_numpy(values).view(BIT_TYPES[dtype][1]).double().numpy()
        return wide
    return values.astype(np.float64)


def _scan(x: Floats, y: Floats) -> Extremes:
    size = len(x)
    nonfinite = mismatched = 0
    is_in = np.isfinite(x) & np.isfinite(y)
    if not is_in.all():
        out_x, out_y = x[~is_in], y[~is_in]
        is_same = (out_x == out_y) | (np.isnan(out_x) & np.isnan(out_y))
        nonfinite = int(np.count_nonzero(is_same))
        mismatched = len(out_x) - nonfinite
        x, y = x[is_in], y[is_in]
    if not len(x):
        none = math.nan
        return Extremes(0, nonfinite, mismatched, none, none, none, none, none, not mismatched)
    with np.errstate(over="ignore"):
        largest = float(np.abs(y - x).max())
    extremes = (float(x.min()), float(x.max()), float(y.min()), float(y.max()))
    return Extremes(
        size - nonfinite - mismatched, nonfinite, mismatched, *extremes, largest,
        is_exact=largest == 0 and not mismatched,
    )  # fmt: skip


def _power_of_two(value: float) -> float:
    if not 0 < value < math.inf:
        return 1.0
    return math.ldexp(1.0, min(max(-1000, math.frexp(value)[1]), 1023))
