"""What every implementation of Lloyd's two steps has in common.

One call does an assignment and the sums of the update together, in one pass over the samples. All
backends keep the same rules, so that they can stand in for each other: squared Euclidean
distances, the lowest index wins a tie, sums and counts in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lowtide.kmeans.protection import FaultReport, Protection

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Assignment:
    """Result of one pass over M samples of D features with K centroids.

    Attributes:
        labels: int32 (M,), the nearest centroid.
        distances: float64 (M,), squared distance to it, never negative; None if not asked for.
        sums: float64 (K, D), weighted sum of each cluster's samples.
        counts: float64 (K,), weight of each cluster's samples.
        inertia: Weighted sum of the squared distances. Without `distances` it may come from the
            sums (sum of ``w |x|^2 - 2 s.c + n |c|^2`` about a common centre, in float64), which
            costs next to nothing.
        report: What the checks found.
    """

    labels: NDArray[np.int32]
    distances: NDArray[np.float64] | None
    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    inertia: float
    report: FaultReport = field(default_factory=FaultReport)


class Prepared(ABC):
    """Samples made ready once per fit: layout, norms, checksums. Holds them, does not change them.

    Results are in the caller's coordinates; a backend may work around the samples' mean inside,
    which is what keeps float32 distances and the checksums' thresholds sharp.
    """

    @abstractmethod
    def assign(
        self, centroids: Floats, protection: Protection | None = None, *, distances: bool = True
    ) -> Assignment:
        """Assign every sample to its nearest centroid and sum up the clusters.

        Args:
            centroids: (K, D), finite, any float dtype; K >= 1. Computed with in the dtype of the
                samples.
            protection: Checks to make; None makes none.
            distances: Whether `Assignment.distances` is wanted. They are computed anew from the
                differences, to be exact where a sample is close to its centroid; with few
                centroids that takes longer than the assignment itself.

        Returns:
            The assignment. With `protection` on, `report` counts; whatever could not be put right
            is in ``report.uncorrected`` and raising is the caller's.
        """


class Backend(ABC):
    """A way to do the work, by name."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, samples: Any, weights: NDArray[np.float64] | None = None) -> Prepared:
        """Return samples made ready.

        Args:
            samples: (M, D) float32 or float64, C-contiguous, finite; numpy, or a tensor where the
                backend takes those.
            weights: float64 (M,), finite and not negative; None is all ones.
        """
