"""Lloyd's two steps in numpy, in float64 whatever the samples are: the oracle of all backends."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.kmeans.backend import Assignment, Backend, Floats, Prepared
from lowtide.kmeans.protection import Protection

_BLOCK = 4096  # rows whose distances are held at once


class ReferenceBackend(Backend):
    """Plain float64, without checks: what the others are held to."""

    name = "reference"

    def prepare(self, samples: Any, weights: NDArray[np.float64] | None = None) -> Prepared:
        """Return samples made ready; see `Backend.prepare`."""
        return _Prepared(np.asarray(samples), weights)


class _Prepared(Prepared):
    def __init__(self, samples: Floats, weights: NDArray[np.float64] | None) -> None:
        self._samples = samples
        self._weights = np.ones(len(samples)) if weights is None else weights

    def assign(
        self, centroids: Floats, protection: Protection | None = None, *, distances: bool = True
    ) -> Assignment:
        """See `Prepared.assign`; the oracle makes no checks."""
        del protection
        # As other backends see them, who compute in the samples' dtype.
        places = centroids.astype(self._samples.dtype).astype(np.float64)
        count, features = len(self._samples), self._samples.shape[1]
        labels = np.empty(count, np.int32)
        nearest = np.empty(count, np.float64)
        sums = np.zeros((len(places), features))
        for begin in range(0, count, _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            block = self._samples[rows].astype(np.float64)
            squares = np.stack([((block - place) ** 2).sum(axis=1) for place in places], axis=1)
            labels[rows] = squares.argmin(axis=1)
            nearest[rows] = squares.min(axis=1)
            np.add.at(sums, labels[rows], block * self._weights[rows, None])
        return Assignment(
            labels=labels,
            distances=nearest if distances else None,
            sums=sums,
            counts=np.asarray(np.bincount(labels, self._weights, len(places)), np.float64),
            inertia=float((nearest * self._weights).sum()),
        )
