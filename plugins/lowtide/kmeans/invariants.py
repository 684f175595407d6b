"""What holds of a right assignment whatever the labels are: the sums over all clusters.

``sum_k S_k`` is the weighted sum of all samples and ``sum_k n_k`` their weight. Both are known from
one pass over the samples, so any single wrong accumulator shows, and so does a wrong message
between ranks. The rounding that is allowed for is that of adding up M float64 numbers in any order
(Higham, Accuracy and Stability, section 4.2), as a random walk with a wide margin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.kmeans.samples import blocks_of

_MARGIN = 16.0  # times u * sqrt(M) * sum |x|
_UNIT = float(np.finfo(np.float64).eps) / 2


@dataclass(frozen=True)
class Totals:
    """Sums over all samples.

    Attributes:
        sums: float64 (D,), weighted.
        sizes: float64 (D,), of the weighted absolute values.
        weight: Of all samples.
        squares: Weighted sum of squared norms.
        count: Samples.
    """

    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]
    weight: float
    squares: float
    count: int

    @classmethod
    def of(cls, values: torch.Tensor, weights: NDArray[np.float64] | None) -> Totals:
        """Return the totals of (M, D) samples."""
        sums = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        sizes = torch.zeros_like(sums)
        squares = 0.0
        for place, block in blocks_of(values):
            wide = block.double()
            if weights is None:
                ones = wide.new_ones(len(wide))
            else:
                ones = torch.from_numpy(weights[place]).to(wide.device)
            sums += ones @ wide
            squares += float(ones @ wide.square() @ wide.new_ones(wide.shape[1]))
            sizes += ones @ wide.abs()
        weight = float(len(values)) if weights is None else float(weights.sum())
        return cls(sums.cpu().numpy(), sizes.cpu().numpy(), weight, squares, len(values))

    def packed(self) -> NDArray[np.float64]:
        """Return the totals as one vector, which may be added up."""
        return np.concatenate(
            [self.sums, self.sizes, [self.weight, self.squares, float(self.count)]]
        )

    @classmethod
    def unpacked(cls, vector: NDArray[np.float64]) -> Totals:
        """Return the totals that such a vector holds."""
        features = (len(vector) - 3) // 2
        weight, squares, count = vector[2 * features :]
        return cls(
            vector[:features],
            vector[features : 2 * features],
            float(weight),
            float(squares),
            int(count),
        )

    def residual(self, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
        """Return how far (K, D) sums and (K,) weights are off, in units of what rounding may do.

        Above 1, or not a number, they are wrong.
        """
        unit = _MARGIN * _UNIT * np.sqrt(max(1, self.count))
        off = np.abs(sums.sum(axis=0) - self.sums)
        limits = unit * self.sizes
        allowed = np.where(limits > 0, limits, np.inf)
        largest = float((off / allowed).max(initial=0.0))
        if not (off[limits == 0] == 0).all():
            return float("inf")
        return max(largest, float(abs(counts.sum() - self.weight) / (unit * self.weight or 1.0)))


def sums_by_label(
    values: torch.Tensor,
    weights: NDArray[np.float64] | None,
    labels: NDArray[np.int32],
    n_clusters: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums and weights of clusters, added up one feature after the other in float64.

    It shares no code with the backends, for it answers for them where they failed a check.
    """
    host = values.cpu().numpy()
    sums = np.empty((n_clusters, host.shape[1]))
    ones = np.ones(len(host)) if weights is None else weights
    for feature in range(host.shape[1]):
        column = host[:, feature].astype(np.float64) * ones
        sums[:, feature] = np.bincount(labels, column, n_clusters)
    return sums, np.bincount(labels, ones, n_clusters).astype(np.float64)
