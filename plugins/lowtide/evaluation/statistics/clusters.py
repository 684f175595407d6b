"""Items that belong together (questions on one passage, seeds of one item), summed by cluster.

Shape letters: N items, K columns, C clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lowtide.core.errors import DataError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From means of columns, shape (..., K), to a figure, shape (...)."""


def mean(means: Floats) -> Floats:
    """Return the mean of the first column: the statistic of a plain score."""
    first: Floats = means[..., 0]
    return first


def ratio(means: Floats) -> Floats:
    """Return the sum of the first column over that of the second, NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Floats = np.where(means[..., 1] == 0, np.nan, means[..., 0] / means[..., 1])
    return quotient


def f1_of_means(means: Floats) -> Floats:
    """Return the harmonic mean of mean precision (first) and mean recall (second), 0 for 0, 0."""
    precision, recall = means[..., 0], means[..., 1]
    total = precision + recall
    with np.errstate(divide="ignore", invalid="ignore"):
        score: Floats = np.where(total > 0, 2 * precision * recall / total, 0.0)
    return score


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSums:
    """Sums of columns by cluster.

    Attributes:
        sums: float64, shape (C, K).
        counts: float64, shape (C,): items of each cluster.
    """

    sums: Floats
    counts: Floats

    @property
    def means(self) -> Floats:
        """Means of the columns over all items, shape (K,)."""
        means: Floats = self.sums.sum(axis=0) / self.counts.sum()
        return means


def columns_of(values: ArrayLike) -> Floats:
    """Return finite values as float64 of shape (N, K), N >= 1.

    Raises:
        DataError: another shape, nothing, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    columns = array[:, None] if array.ndim == 1 else array
    if columns.ndim != 2 or columns.shape[0] == 0 or columns.shape[1] == 0:
        raise DataError(
            f"values: got shape {array.shape}, allowed is (items,) or (items, columns), not empty"
        )
    if not np.isfinite(columns).all():
        row = int(np.flatnonzero(~np.isfinite(columns).all(axis=1))[0])
        raise DataError(
            f"values[{row}]: got {columns[row].tolist()}, allowed are finite numbers; leave out "
            "items that have no score and say how many they are"
        )
    return columns


def cluster_codes(clusters: Sequence[Any] | NDArray[Any] | None, items: int) -> NDArray[np.intp]:
    """Return numbers 0 ... C-1, one for each item; each item is a cluster where `clusters` is None.

    Raises:
        DataError: as many labels as items are needed.
    """
    if clusters is None:
        return np.arange(items)
    labels = np.asarray(clusters)
    if labels.shape != (items,):
        raise DataError(f"clusters: got shape {labels.shape}, allowed is ({items},), one per item")
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def cluster_sums(
    values: ArrayLike, clusters: Sequence[Any] | NDArray[Any] | None = None
) -> ClusterSums:
    """Sum columns by cluster.

    Args:
        values: float, shape (N,) or (N, K).
        clusters: N labels; None makes each item its own cluster.

    Raises:
        DataError: shapes do not fit, or a value is not finite.
    """
    columns = columns_of(values)
    if clusters is None:
        return ClusterSums(sums=columns, counts=np.ones(len(columns)))
    codes = cluster_codes(clusters, len(columns))
    count = int(codes.max()) + 1
    sums = np.column_stack([np.bincount(codes, column, count) for column in columns.T]).astype(
        float
    )
    return ClusterSums(sums=sums, counts=np.bincount(codes, minlength=count).astype(float))
