"""Statistics of an array that do not depend on a bound.

After FXRZ (Rahman et al., 2023): mean differences to neighbours and to predictors, share of blocks
that vary; Krasowska et al. (2021) and Ganguli et al. (2023): correlation, and how many singular
values hold most of a block.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lowtide.quality.surrogate.blocks import Blocks

Singles = NDArray[np.float32]
Floats = NDArray[np.float64]

LAGS = (1, 2, 4, 8)
SHARES = (0.9, 0.99, 0.999)  # of the energy of a block
NAMES = (
    "log10_elements", "item_bits", "is_1d", "is_2d", "is_3d", "shortest_axis", "mean", "deviation",
    "skewness", "kurtosis", "neighbour_difference", "lorenzo_difference", "spline_difference",
    "varying_blocks_3", "varying_blocks_5", "local_deviation", "local_spread", "block_spread",
    "roughness_spread", "zeros", "repeats", *(f"autocorrelation_{lag}" for lag in LAGS),
    *(f"autocorrelation_first_{lag}" for lag in LAGS), *(f"singular_{share}" for share in SHARES),
)  # fmt: skip
_TINY = 1e-9
_DECOMPOSED = 4  # blocks


def statistics(blocks: Blocks) -> Floats:
    """Return what `NAMES` says, float64; logarithms are to 10, lengths in units of the range."""
    x = blocks.values
    rank = x.ndim - 1
    flat = x.reshape(len(x), -1)
    means, deviations = flat.mean(axis=1, dtype=np.float64), flat.std(axis=1, dtype=np.float64)
    mean = float(means.mean())
    deviation = max(math.sqrt(float((deviations**2).mean() + means.var())), _TINY)
    unit = (flat - np.float32(mean)) / np.float32(deviation)
    squares = unit * unit
    differences = [np.abs(np.diff(x, axis=axis)) for axis in range(1, x.ndim)]
    roughness = np.mean([d.reshape(len(x), -1).mean(axis=1) for d in differences], axis=0)
    groups = x.reshape(-1)[: x.size // 4 * 4].reshape(-1, 4)
    spans = groups.max(axis=1) - groups.min(axis=1)
    logs = np.log10(spans + _TINY)
    return np.array([
        math.log10(blocks.elements), blocks.item_bits, rank == 1, rank == 2, rank == 3,
        math.log10(min(blocks.shape)), mean, math.log10(deviation),
        float(np.clip((unit * squares).mean(), -10, 10)),
        math.log10(float((squares * squares).mean())),
        _log(float(np.mean([d.mean() for d in differences]))),
        _log(float(np.abs(_lorenzo(x)).mean())), _log(float(np.mean(_splines(x)))),
        float((spans > 1e-3).mean()), float((spans > 1e-5).mean()),
        float(logs.mean()), float(logs.std()),
        float(np.std(np.log10(deviations + _TINY))) + float(means.std()),
        float(np.std(np.log10(roughness + _TINY))),
        float((x == 0).mean()), float((differences[-1] == 0).mean()),
        *(_autocorrelation(x, x.ndim - 1, lag, mean, deviation) for lag in LAGS),
        *(_autocorrelation(x, 1, lag, mean, deviation) for lag in LAGS),
        *_singular(x),
    ], np.float64)  # fmt: skip


def _log(value: float) -> float:
    return math.log10(value + _TINY)


def _lorenzo(x: Singles) -> Singles:
    for axis in range(1, x.ndim):
        x = np.diff(x, axis=axis)
    return x


def _splines(x: Singles) -> list[float]:
    """Return mean distances to the cubic through four neighbours, along each axis."""
    found = []
    for axis in range(1, x.ndim):
        m = np.moveaxis(x, axis, -1)
        if m.shape[-1] >= 7:
            guess = 0.5625 * (m[..., 2:-4] + m[..., 4:-2]) - 0.0625 * (m[..., :-6] + m[..., 6:])
            found.append(float(np.abs(m[..., 3:-3] - guess).mean()))
    return found or [0.0]


def _autocorrelation(x: Singles, axis: int, lag: int, mean: float, deviation: float) -> float:
    m = np.moveaxis(x, axis, -1)
    if m.shape[-1] <= lag:
        return 0.0
    centred = m - np.float32(mean)
    return float((centred[..., lag:] * centred[..., :-lag]).mean()) / deviation**2


def _singular(x: Singles) -> list[float]:
    """Return which share of the singular values of a block hold `SHARES` of its energy."""
    some = x[:: max(1, len(x) // _DECOMPOSED)][:_DECOMPOSED]
    length = x.shape[-1]
    if x.ndim == 2:  # one axis: its pieces are the rows
        rows = math.isqrt(length)
        matrices = some[:, : rows * rows].reshape(len(some), rows, rows).astype(np.float64)
    else:
        matrices = some.reshape(len(some), -1, length).astype(np.float64)
    matrices -= matrices.mean(axis=(1, 2), keepdims=True)
    energies = np.linalg.eigvalsh(np.swapaxes(matrices, 1, 2) @ matrices)[:, ::-1]
    sums = np.cumsum(np.maximum(energies, 0.0), axis=1)
    shares = sums / np.maximum(sums[:, -1:], 1e-300)
    return [float((shares < share).mean()) for share in SHARES]
