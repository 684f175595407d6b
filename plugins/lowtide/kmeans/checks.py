"""What the native code checks, stated in numpy, and the calibrated numbers it uses.

Letters: M samples, D features, K centroids, G groups of centroids, u the unit roundoff of the
dtype. x and c stand about the samples' frame: ``(caller's - origin) * scale``.

A row's checksum (FT K-Means, section IV, with one side encoded). The accumulators of a sample are
``a_k = |c_k|^2 - 2 x.c_k``, linear in the column ``(|c_k|^2, -2 c_k)``. A further column is the sum
of a group's columns with alternating signs, encoded from the centroids; its accumulator must be
the sum of the others' with the same signs. It is compared within ``kappa * u * (2 |x| |C| + |n|)``
where C are the group's centroids (Frobenius norm) and n their squared norms. Signs alternate
because ``|c_k|^2`` is much the same for all k: the sum stays small, and so does its rounding.

What exceeds the threshold is looked into: the sample's sums are made again on another path with
the same operations in the same order. The same bits again mean rounding, other bits an error. So
the threshold decides how small an error is seen and how often the code looks, not whether a sound
result is called wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.kmeans.backend import Floats

GROUP_CENTROIDS = 128
"""Centroids under one checksum, at most; as csrc/kmeans/pass.hpp has it."""
FEATURE_BLOCK = 256
"""Features an accumulator runs over before it joins a total; as csrc/kmeans/pass.hpp has it."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """Residuals of sound passes, in units of ``u * (2 |x| |C| + |n|)``.

    Attributes:
        features: Up to so many.
        kappa: Threshold, about one and a half times `ordinary`.
        ordinary: Largest of random data: normal, far from nought, blobs, integers.
        adversarial: Largest of data whose features are all alike, or with heavy tails.
        checks: Checksums that were compared for each of the two, at least.
    """

    features: float
    kappa: float
    ordinary: float
    adversarial: float
    checks: int


CALIBRATIONS = (
    Calibration(16, 17.0, 11.67, 33.59, 2_990_000),
    Calibration(256, 12.5, 8.57, 118.96, 3_100_000),
    Calibration(np.inf, 9.5, 6.38, 149.82, 2_210_000),
)
"""Measured by ``python benchmarks/kmeans_faults.py --calibrate``, float32 and float64 together."""

KAPPA_SUMS = 3.0
"""Threshold of the sums of the clusters over n rows: so many ``2^-53 sqrt(n) sum(|w x|)``."""


def kappa_for(features: int) -> float:
    """Return the calibrated threshold of the rows' checksums."""
    return next(each.kappa for each in CALIBRATIONS if features <= each.features)


def framed(values: Floats, origin: Floats, scale: float) -> Floats:
    """Return samples or centroids about the frame, rounded to their dtype as the kernels do."""
    return (values - origin) * values.dtype.type(scale)


def groups(count: int) -> list[slice]:
    """Return the centroids of each group: as few groups as can be, of near-equal size."""
    number = -(-count // GROUP_CENTROIDS)
    each = -(-count // number)
    return [slice(begin, min(begin + each, count)) for begin in range(0, count, each)]


def signs(count: int) -> Array:
    """Return the signs of a group's columns."""
    return np.where(np.arange(count) % 2 == 0, 1.0, -1.0)


def encoded(centroids: Floats) -> Array:
    """Return the checksum column of one group, (D + 1,): start, then features.

    Args:
        centroids: (K, D) of the group, framed.
    """
    places = centroids.astype(np.float64)
    starts = (places**2).sum(axis=1).astype(centroids.dtype).astype(np.float64)
    columns = np.concatenate([starts[:, None], -2 * places], axis=1)
    column = (signs(len(places))[:, None] * columns).sum(axis=0)
    return column.astype(centroids.dtype).astype(np.float64)


def residuals(samples: Floats, centroids: Floats) -> Array:
    """Return how far each row's checksums are off without rounding in between, (M, G).

    Args:
        samples: (M, D), framed.
        centroids: (K, D), framed.
    """
    x = np.concatenate([np.ones((len(samples), 1)), samples.astype(np.float64)], axis=1)
    made = []
    for group in groups(len(centroids)):
        places = centroids[group].astype(np.float64)
        starts = (places**2).sum(axis=1).astype(centroids.dtype).astype(np.float64)
        accumulators = x @ np.concatenate([starts[:, None], -2 * places], axis=1).T
        made.append(np.abs(accumulators @ signs(len(places)) - x @ encoded(centroids[group])))
    return np.stack(made, axis=1)


def thresholds(samples: Floats, centroids: Floats, kappa: float) -> Array:
    """Return what is compared with `residuals`, (M, G)."""
    unit = kappa * np.finfo(samples.dtype).eps / 2
    norms = np.linalg.norm(samples.astype(np.float64), axis=1)
    made = []
    for group in groups(len(centroids)):
        places = centroids[group].astype(np.float64)
        squares = (places**2).sum(axis=1)
        made.append(unit * (2 * norms * np.sqrt(squares.sum()) + np.linalg.norm(squares)))
    return np.stack(made, axis=1)


def label_gap(
    samples: Floats, centroids: Floats, labels: NDArray[Any], others: NDArray[Any]
) -> Any:
    """Return by how much two labels' squared distances may differ and still be confused, (M,).

    The promise of exactness: a native label is the float64 oracle's, or the two squared distances,
    about the frame, are closer than this. Each accumulator rounds at most ``n`` times, at most to
    ``u S`` with ``S = (|x| + |c|)^2``; framing rounds x and c, which is ``2 u S``, and squaring c
    another ``u S``; there are two accumulators.

    Args:
        samples: (M, D), framed.
        centroids: (K, D), framed.
        labels: (M,), one choice.
        others: (M,), the other.
    """
    features = samples.shape[1]
    rounded = min(features, FEATURE_BLOCK) + -(-features // FEATURE_BLOCK) + 1
    norms = np.linalg.norm(centroids.astype(np.float64), axis=1)
    far = np.maximum(norms[labels], norms[others])
    size = (np.linalg.norm(samples.astype(np.float64), axis=1) + far) ** 2
    info = np.finfo(samples.dtype)
    return 1.01 * (rounded + 3) * info.eps * size + features * float(info.tiny)
