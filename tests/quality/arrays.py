"""Arrays for the tests of metrics and selection, and slow float64 definitions to hold them to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def smooth(*shape: int, seed: int = 0) -> Floats:
    """Return a smooth field: a few waves of random direction and phase."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*(np.linspace(0, 1, length) for length in shape), indexing="ij")
    field: Floats = np.zeros(shape)
    for wave in range(1, 7):
        phase = sum(rng.normal() * 2 * wave * grid for grid in grids) + rng.uniform(0, 6.3)
        field += np.sin(2 * math.pi * phase) / wave
    return field


def noisy(x: Floats, scale: float = 0.01, seed: int = 1) -> Floats:
    """Return `x` with Gaussian errors."""
    return x + np.random.default_rng(seed).normal(size=x.shape) * scale


def ssim_by_loop(
    x: Any, y: Any, *, width: int, stride: int = 1, is_local: bool = False, is_unbiased: bool = True
) -> float:
    """Return SSIM window by window, as the formula stands in the paper."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    values = []
    whole = x.max() - x.min()
    for corner in itertools.product(*(range(0, length - width + 1, stride) for length in x.shape)):
        window = tuple(slice(begin, begin + width) for begin in corner)
        a, b = x[window].ravel(), y[window].ravel()
        spread = (a.max() - a.min()) if is_local else whole
        spread = spread or 1.0
        c1, c2 = (0.01 * spread) ** 2, (0.03 * spread) ** 2
        ddof = 1 if is_unbiased else 0
        covariance = ((a - a.mean()) * (b - b.mean())).sum() / (a.size - ddof)
        luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
        structure = (2 * covariance + c2) / (a.var(ddof=ddof) + b.var(ddof=ddof) + c2)
        values.append(luminance * structure)
    return float(np.mean(values))


def ks_by_counting(x: Any, y: Any) -> float:
    """Return the largest gap of the two distribution functions at any value."""
    points = np.unique(np.concatenate([x, y]))
    gaps = [abs(np.mean(x <= point) - np.mean(y <= point)) for point in points]
    return float(max(gaps))
