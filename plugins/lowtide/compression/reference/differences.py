"""Prediction by differences of values that are already integers: FORMAT.md, section 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.arguments import (
    checked_array,
    checked_shape,
    checked_step,
    inverse,
)
from lowtide.compression.reference.grid import CODE_LIMIT
from lowtide.core.errors import CodecError

_MAX_DIFFERENCES = 2


def difference_encode(
    work: NDArray[Any], shape: Sequence[int], orders: Sequence[int], step: float
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Round the values to multiples of `step` and take differences of the multipliers.

    The integers come first and the prediction after, so nothing the decoder does can drift, and
    each axis is one vector operation. A value too large for a code, or not finite, gets the
    multiplier of the element before it (0 at the start).

    Args:
        work: float32 or float64, shape (n,): the chunk's working values in C order. Not changed.
        shape: 1 to 4 extents, their product n.
        orders: How many times to take differences along each axis, 0 to 2; one for each axis.
        step: Distance of two multiples, in the unit of `work`: above 0, it and its
            inverse finite.

    Returns:
        The codes, int32 of shape (n,), and what the decoder will restore, with dtype and shape of
        `work`.

    Raises:
        CodecError: An argument is not as above.

    Source: dual quantization, Tian et al., cuSZ (PACT 2020), section 3; the alternating corner
    sums are Ibarria et al., Out-of-core compression with the Lorenzo predictor (2003).
    """
    shape, orders, step = checked_arguments(shape, orders, step)
    values = checked_array("work", work, shape, (np.float32, np.float64)).ravel()
    with np.errstate(all="ignore"):
        multiples = np.rint(values.astype(np.float64) * inverse(step))
        is_good = np.abs(multiples) < CODE_LIMIT
        last_good = np.maximum.accumulate(np.where(is_good, np.arange(values.size), -1))
        multiples = np.where(last_good >= 0, multiples[np.maximum(last_good, 0)], 0.0)
    numbers = multiples.astype(np.int32)
    codes = numbers.reshape(shape)
    for axis, order in enumerate(orders):
        for _ in range(order):
            codes = np.diff(codes, axis=axis, prepend=np.int32(0))  # int32 wraps around
    return np.ascontiguousarray(codes.ravel()), times_step(numbers, step, work.dtype)


def difference_decode(
    codes: NDArray[np.int32],
    shape: Sequence[int],
    orders: Sequence[int],
    step: float,
    is_double: bool,
) -> NDArray[Any]:
    """Restore the working values from `difference_encode`'s codes.

    Args:
        codes: int32, shape (n,).
        shape: As given to the encoder.
        orders: As given to the encoder.
        step: As given to the encoder.
        is_double: Whether the working values are float64, else float32.

    Returns:
        float64 or float32, shape (n,): the encoder's second result, bit by bit.

    Raises:
        CodecError: An argument is not as above.
    """
    shape, orders, step = checked_arguments(shape, orders, step)
    numbers = checked_array("codes", codes, shape, (np.int32,))
    for axis, order in enumerate(orders):
        for _ in range(order):
            numbers = np.cumsum(numbers, axis=axis, dtype=np.int32)
    return times_step(numbers.ravel(), step, np.dtype(np.float64 if is_double else np.float32))


def times_step(numbers: NDArray[np.int32], step: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return multiples of `step` as working values."""
    # From the integers, as the decoder has them: k = -0.0 would give another zero.
    with np.errstate(all="ignore"):
        return (numbers.astype(np.float64) * step).astype(dtype)


def checked_arguments(
    shape: Sequence[int], orders: Sequence[int], step: float
) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Return the arguments with their types; raise CodecError where they are not allowed."""
    shape = checked_shape(shape)
    if len(orders) != len(shape) or not set(orders) <= set(range(_MAX_DIFFERENCES + 1)):
        raise CodecError(
            f"orders: got {tuple(orders)}, allowed are {len(shape)} numbers, one for each axis, "
            f"of 0 to {_MAX_DIFFERENCES}"
        )
    return shape, tuple(int(order) for order in orders), checked_step(step)
