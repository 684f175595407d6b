"""Prediction by splines from coarse to fine: FORMAT.md, section 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.arguments import (
    checked_array,
    checked_shape,
    checked_step,
    checked_weights,
    inverse,
)
from lowtide.compression.reference.grid import CODE_LIMIT, Pass, scan
from lowtide.core.errors import CodecError


def interpolation_encode(
    work: NDArray[Any],
    shape: Sequence[int],
    weights: Sequence[int],
    cubic: bool,
    alpha: int,
    beta: int,
    step: float,
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Predict each point from points restored before it, and round what is left to a code.

    Args:
        work: float32 or float64, shape (n,): the chunk's working values in C order. Not changed.
        shape: 1 to 4 extents, their product n.
        weights: How much each axis counts where several predict a point, 0 to 255; one for each
            axis.
        cubic: Whether four points predict, where there are four, else two.
        alpha: Code 0 to 255 of the factor 1 + alpha/8 by which the step shrinks with each level.
        beta: Code 0 to 255 of the factor 1 + beta/4 by which it shrinks at most.
        step: The step of level 1, in the unit of `work`: above 0, it and its inverse finite.

    Returns:
        The codes, int32 of shape (n,), each at its point's place in C order, and what the decoder
        will restore: dtype and shape of `work`.

    Raises:
        CodecError: An argument is not as above.

    Source: Zhao et al., Optimizing error-bounded lossy compression for scientific data by dynamic
    spline interpolation (ICDE 2021), section V; steps by level: Liu et al., QoZ (SC 2022).
    """
    shape = checked_shape(shape)
    values = checked_array("work", work, shape, (np.float32, np.float64))
    restored, codes = np.zeros(shape, work.dtype), np.zeros(shape, np.int32)
    factors = _checked_factors(alpha, beta)
    with np.errstate(all="ignore"):
        for part in scan(shape, checked_weights(weights, len(shape))):
            step_l = _step_of(part, checked_step(step), factors)
            prediction = _predict(part, restored, cubic)
            left = values[part.points].astype(np.float64) - prediction.astype(np.float64)
            scaled = np.rint(left * inverse(step_l))
            code = np.where(np.abs(scaled) < CODE_LIMIT, scaled, 0.0).astype(np.int32)
            value, is_finite = _restore(code, prediction, step_l)
            codes[part.points] = np.where(is_finite, code, 0)
            restored[part.points] = np.where(is_finite, value, prediction)
    return codes.ravel(), restored.ravel()


def interpolation_decode(
    codes: NDArray[np.int32],
    shape: Sequence[int],
    weights: Sequence[int],
    cubic: bool,
    alpha: int,
    beta: int,
    step: float,
    is_double: bool,
) -> NDArray[Any]:
    """Restore the working values from `interpolation_encode`'s codes.

    Args:
        codes: int32, shape (n,), in C order.
        shape: As given to the encoder; so are all the others up to `step`.
        weights: See above.
        cubic: See above.
        alpha: See above.
        beta: See above.
        step: See above.
        is_double: Whether the working values are float64, else float32.

    Returns:
        float64 or float32, shape (n,): the encoder's second result, bit by bit; finite.

    Raises:
        CodecError: An argument is not as above.
    """
    shape = checked_shape(shape)
    numbers = checked_array("codes", codes, shape, (np.int32,))
    restored = np.zeros(shape, np.float64 if is_double else np.float32)
    factors = _checked_factors(alpha, beta)
    with np.errstate(all="ignore"):
        for part in scan(shape, checked_weights(weights, len(shape))):
            prediction = _predict(part, restored, cubic)
            step_l = _step_of(part, checked_step(step), factors)
            value, is_finite = _restore(numbers[part.points], prediction, step_l)
            restored[part.points] = np.where(is_finite, value, prediction)
    return restored.ravel()


def _predict(part: Pass, restored: NDArray[Any], cubic: bool) -> NDArray[Any]:
    """Return the predictions of a pass: shape of its points, dtype of `restored`, finite."""
    T = restored.dtype.type  # every constant in T: numpy must not widen the arithmetic
    total = np.zeros_like(restored[part.points])
    for i, (axis, share) in enumerate(part.shares):
        along = np.moveaxis(total, axis, 0)  # a view
        p = _predict_along(part.lines(restored, axis), len(along), cubic)
        if len(part.shares) > 1:
            p *= T(share)
        along[...] = along + p if i else p
    total[~np.isfinite(total)] = 0
    return total


def _predict_along(known: NDArray[Any], n_points: int, cubic: bool) -> NDArray[Any]:
    """Return what the spline along the first axis predicts, shape (n_points, ...).

    Args:
        known: Shape (n_points or one more, ...): values at 0, 2s, 4s, ... on the axis.
        n_points: Number of points at s, 3s, 5s, ...
        cubic: See `interpolation_encode`.
    """
    T = known.dtype.type
    n = len(known)
    p = known[:n_points].copy()
    p[: n - 1] = (known[:-1] + known[1:]) * T(0.5)
    if n_points == n and n >= 2:  # the last point stands behind the last known one
        p[-1] = T(1.5) * known[-1] - T(0.5) * known[-2]
    if cubic and n >= 3:
        p[0] = ((T(3) * known[0] + T(6) * known[1]) - known[2]) * T(0.125)
        p[n - 2] = ((T(6) * known[-2] + T(3) * known[-1]) - known[-3]) * T(0.125)
        inner = T(9) * (known[1:-2] + known[2:-1]) - (known[:-3] + known[3:])
        p[1 : n - 2] = inner * T(0.0625)
    return p


def _restore(
    code: NDArray[np.int32], prediction: NDArray[Any], step_l: float
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the values that the codes give, and which of them are finite."""
    value = prediction.astype(np.float64) + code.astype(np.float64) * step_l
    narrow = value.astype(prediction.dtype)
    return narrow, np.isfinite(narrow)


def _step_of(part: Pass, step: float, factors: tuple[float, float]) -> float:
    alpha, beta = factors
    f = 1.0
    for _ in range(part.level - 1):
        f *= alpha
    return step / min(f, beta)


def _checked_factors(alpha: int, beta: int) -> tuple[float, float]:
    for name, code in (("alpha", alpha), ("beta", beta)):
        if not 0 <= code <= 255:
            raise CodecError(f"{name}: got {code}, allowed are codes of 0 to 255")
    return 1 + alpha / 8, 1 + beta / 4
