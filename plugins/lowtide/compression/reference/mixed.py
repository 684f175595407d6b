"""Differences, and predictions from elsewhere in between: FORMAT.md, section 8."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.arguments import checked_array
from lowtide.compression.reference.differences import checked_arguments, times_step

_FACTORS = ((1,), (1, -1), (1, -2, 1))  # of a value and those before it, by order


def mixed_decode(
    codes: NDArray[np.int32],
    predicted: NDArray[np.int32],
    is_predicted: NDArray[np.uint8],
    shape: Sequence[int],
    orders: Sequence[int],
    step: float,
    is_double: bool,
) -> NDArray[Any]:
    """Restore working values where some codes are differences and others are prediction errors.

    Args:
        codes: int32, shape (n,), C order of `shape`.
        predicted: int32, shape (n,): multiples of `step`; they count where `is_predicted`.
        is_predicted: uint8, shape (n,): 0 where the code is a difference of all multiples, as
            `difference_encode` takes them, else the code is the multiple less `predicted`.
        shape: 1 to 4 extents, their product n.
        orders: How many times differences were taken along each axis, 0 to 2.
        step: As given to `difference_encode`.
        is_double: Whether the working values are float64, else float32.

    Returns:
        float64 or float32, shape (n,).

    Raises:
        CodecError: An argument is not as above.
    """
    shape, orders, step = checked_arguments(shape, orders, step)
    rows = checked_array("codes", codes, shape, (np.int32,)).reshape(-1, shape[-1])
    guesses = checked_array("predicted", predicted, shape, (np.int32,)).reshape(rows.shape)
    mask = checked_array("is_predicted", is_predicted, shape, (np.uint8,)).reshape(rows.shape)
    numbers = np.zeros(shape, np.int32)
    with np.errstate(over="ignore"):  # int32 wraps around
        for number, place in enumerate(np.ndindex(shape[:-1])):
            before = _rows_before(numbers, place, orders)
            numbers[place] = _row(rows[number], guesses[number], mask[number], before, orders[-1])
    return times_step(numbers.ravel(), step, np.dtype(np.float64 if is_double else np.float32))


def _rows_before(
    numbers: NDArray[np.int32], place: tuple[int, ...], orders: Sequence[int]
) -> NDArray[np.int32]:
    """Return what rows before add to the differences of a row, but for those along it."""
    total = np.zeros(numbers.shape[-1], np.int32)
    for back in itertools.product(*(range(order + 1) for order in orders[:-1])):
        at = tuple(np.subtract(place, back, dtype=int)) if place else ()
        if any(back) and min(at) >= 0:
            factor = 1
            for order, distance in zip(orders, back, strict=False):
                factor *= _FACTORS[order][distance]
            total += np.int32(factor) * numbers[at]
    return total


def _row(
    codes: NDArray[np.int32],
    guesses: NDArray[np.int32],
    mask: NDArray[np.uint8],
    before: NDArray[np.int32],
    order: int,
) -> NDArray[np.int32]:
    """Return the multiples of one row."""
    sums = np.zeros(len(codes) + 2, np.int32)  # of rows, this one included; two zeros before it
    ends = [0, *(np.flatnonzero(np.diff(mask != 0)) + 1), len(codes)]
    for begin, end in itertools.pairwise(ends):
        if mask[begin]:
            sums[begin + 2 : end + 2] = codes[begin:end] + guesses[begin:end] + before[begin:end]
            continue
        run = codes[begin:end]
        if order == 2:
            run = sums[begin + 1] - sums[begin] + np.cumsum(run, dtype=np.int32)
        if order:
            run = sums[begin + 1] + np.cumsum(run, dtype=np.int32)
        sums[begin + 2 : end + 2] = run
    return sums[2:] - before
