"""Samples for the native backend, easy and hard, and what the oracle makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lowtide.core.native import native_or_none
from lowtide.kmeans.backend import Assignment, Floats, Prepared
from lowtide.kmeans.checks import framed, label_gap

MODULE = getattr(native_or_none(), "kmeans", None)
LEVELS = tuple(MODULE.levels()) if MODULE is not None else ()
DTYPES = (np.float32, np.float64)

needs_native = pytest.mark.skipif(MODULE is None, reason="the native code has no kmeans here")

KINDS = (
    "normal", "far", "tiny", "huge", "blobs", "integers", "ties", "duplicates", "rank1",
    "constant", "heavy", "outlier",
)  # fmt: skip


def samples_of(kind: str, count: int, features: int, rng: np.random.Generator) -> Any:
    """Return (M, D) in float64."""
    normal = rng.standard_normal((count, features))
    if kind == "far":
        return normal + 1e5
    if kind in ("tiny", "huge"):
        return normal * (1e-15 if kind == "tiny" else 1e15)
    if kind == "blobs":
        return 0.1 * normal + rng.standard_normal((5, features))[rng.integers(0, 5, count)]
    if kind == "integers":
        return rng.integers(0, 256, (count, features)).astype(np.float64)
    if kind == "ties":  # on a grid, far from nought: many distances are the same number
        return rng.integers(0, 3, (count, features)) + 4096.0
    if kind == "duplicates":
        return normal[rng.integers(0, min(count, 3), count)]
    if kind == "rank1":
        return normal[:, :1] * np.ones(features)
    if kind == "constant":
        return np.full((count, features), 0.1)
    if kind == "heavy":
        return rng.standard_t(1.5, (count, features))
    if kind == "outlier":
        normal[0] = 1e18
        return normal
    assert kind == "normal"
    return normal


def case(
    kind: str, shape: tuple[int, int, int], dtype: Any, seed: int = 0
) -> tuple[Floats, Floats]:
    """Return samples (M, D) and centroids (K, D), most of which are near samples."""
    count, features, clusters = shape
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    samples = samples_of(kind, count, features, rng).astype(dtype)
    centroids = samples[rng.choice(count, clusters, replace=clusters > count)].copy()
    if kind not in ("ties", "integers", "duplicates", "constant"):
        centroids[1::2] *= dtype(0.97)
    return samples, centroids


def exact_squares(samples: Floats, centroids: Floats) -> Any:
    """Return squared distances (M, K), in more than float64 for float64."""
    wide: Any = np.float64 if samples.dtype == np.float32 else np.longdouble
    places = centroids.astype(samples.dtype).astype(wide)
    x = samples.astype(wide)
    return np.stack([((x - place) ** 2).sum(axis=1) for place in places], axis=1)


def assert_labels(prepared: Prepared, found: Assignment, samples: Floats, centroids: Floats) -> int:
    """Check the promise of exactness; return how many labels are not the oracle's."""
    squares = exact_squares(samples, centroids)
    best = squares.argmin(axis=1)
    made: Any = prepared._made  # type: ignore[attr-defined]
    x, c = (framed(each, made.origin, made.scale) for each in (samples, centroids))
    rows = np.arange(len(samples))
    gap = (squares[rows, found.labels] - squares[rows, best]) * np.longdouble(made.scale) ** 2
    assert (gap <= label_gap(x, c, found.labels, best)).all()
    return int((found.labels != best).sum())


def sums_of(
    samples: Floats, labels: NDArray[Any], clusters: int, weights: NDArray[Any] | None = None
) -> tuple[Any, Any, Any]:
    """Return float64 sums, counts and the sums of the terms' magnitudes."""
    factors = np.ones(len(samples)) if weights is None else weights
    terms = samples.astype(np.float64) * factors[:, None]
    sums, sizes = np.zeros((2, clusters, samples.shape[1]))
    np.add.at(sums, labels, terms)
    np.add.at(sizes, labels, np.abs(terms))
    return sums, np.bincount(labels, factors, clusters), sizes


def same_bits(a: Assignment, b: Assignment) -> bool:
    """Whether two results are the same, but for their reports."""
    fields = ("labels", "distances", "sums", "counts")
    values = [(getattr(a, name), getattr(b, name)) for name in fields]
    arrays = all((x is None and y is None) or x.tobytes() == y.tobytes() for x, y in values)
    return arrays and a.inertia == b.inertia
