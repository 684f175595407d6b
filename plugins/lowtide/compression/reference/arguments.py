"""Checks of what callers hand to the primitives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import CodecError

MAX_AXES = 4
MAX_WEIGHT = 255


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return `shape` as a tuple; raise CodecError unless it has 1 to 4 axes of 1 and more."""
    if not 1 <= len(shape) <= MAX_AXES or min(shape) < 1:
        raise CodecError(
            f"shape: got {tuple(shape)}, allowed are 1 to {MAX_AXES} axes, each 1 and longer; "
            "collapse the array's shape first"
        )
    return tuple(int(extent) for extent in shape)


def checked_array(
    name: str, array: NDArray[Any], shape: tuple[int, ...], dtypes: tuple[type, ...]
) -> NDArray[Any]:
    """Return the flat `array` as a view of `shape`; raise CodecError where it does not fit."""
    if array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        allowed = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise CodecError(f"{name}: got dtype {array.dtype}, allowed is {allowed}; cast it first")
    if array.shape != (math.prod(shape),):
        raise CodecError(
            f"{name}: got shape {array.shape}, allowed is ({math.prod(shape)},), the elements "
            f"of {shape} in C order; ravel it first"
        )
    return array.reshape(shape)


def checked_step(step: float) -> float:
    """Return `step` as a float; raise CodecError unless it and 1 / `step` are finite, above 0."""
    if not 0 < step < math.inf or math.isinf(inverse(step)):
        raise CodecError(
            f"step: got {step}, allowed are finite numbers above 0 with a finite inverse"
        )
    return float(step)


def inverse(step: float) -> float:
    """Return 1 / `step` by the rules of IEEE 754: infinite where the step is 0 or too small."""
    with np.errstate(all="ignore"):
        return float(np.divide(1.0, step))


def checked_weights(weights: Sequence[int], n_axes: int) -> tuple[int, ...]:
    """Return `weights` as a tuple; raise CodecError unless each axis has one of 0 to 255."""
    if len(weights) != n_axes or not all(0 <= weight <= MAX_WEIGHT for weight in weights):
        raise CodecError(
            f"weights: got {tuple(weights)}, allowed are {n_axes} numbers, one for each axis, of "
            f"0 to {MAX_WEIGHT}"
        )
    return tuple(int(weight) for weight in weights)
