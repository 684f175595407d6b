"""Centroids that move with each batch of samples: Sculley, Web-Scale K-Means Clustering, 2010.

A centroid is the mean of all samples that batches ever gave it. As in scikit-learn's
MiniBatchKMeans, centroids that got less than a hundredth of what the largest got are put on random
samples of the batch every now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.kmeans.backend import Floats
from lowtide.kmeans.initial import uniform_samples
from lowtide.kmeans.passes import Problem, one_pass

_RATIO = 0.01  # of the largest weight: a cluster with less is placed anew
_EVERY = 10  # times K samples


@dataclass
class MiniBatches:
    """What is remembered from batch to batch.

    Attributes:
        weights: float64 (K,), given to each centroid so far.
        since: Samples since centroids were placed anew.
        generator: The same on all ranks.
    """

    weights: NDArray[np.float64]
    since: int
    generator: np.random.RandomState

    @classmethod
    def fresh(cls, n_clusters: int, generator: np.random.RandomState) -> MiniBatches:
        """Return the state before the first batch."""
        return cls(np.zeros(n_clusters), 0, generator)

    def step(self, problem: Problem, centroids: Floats) -> tuple[Floats, Any, float]:
        """Move (K, D) centroids by a batch.

        Returns:
            The centroids, and the batch's labels and inertia with them.
        """
        found = one_pass(problem, centroids)
        total = self.weights + found.counts
        sums = centroids * self.weights[:, None] + found.sums
        has_new = found.counts > 0
        moved = centroids.astype(np.float64)
        moved[has_new] = sums[has_new] / total[has_new, None]
        is_time = self._is_time(problem.moments.count)
        self.weights = total
        if is_time:
            self._place_anew(problem, moved)
        centroids = moved.astype(centroids.dtype)
        found = one_pass(problem, centroids)
        return centroids, found.labels, found.inertia

    def _is_time(self, count: int) -> bool:
        self.since += count
        if (self.weights == 0).any() or self.since >= _EVERY * len(self.weights):
            self.since = 0
            return True
        return False

    def _place_anew(self, problem: Problem, centroids: NDArray[np.float64]) -> None:
        is_small = self.weights < _RATIO * self.weights.max()
        most = problem.moments.count // 2
        if is_small.sum() > 0.5 * problem.moments.count:
            is_small[np.argsort(self.weights)[most:]] = False
        if not is_small.any():
            return
        centroids[is_small] = uniform_samples(problem, int(is_small.sum()), self.generator)
        # Not so light that the next batch would place them again.
        self.weights[is_small] = self.weights[~is_small].min()
