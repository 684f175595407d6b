"""One fit of a codebook: by all ranks that have vectors of it, from the centroids of before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lowtide.kmeans.adapters.replicas import Replicas
from lowtide.kmeans.codebook import Codebook, fit_vectors
from lowtide.kmeans.config import KMeansConfig
from lowtide.kmeans.protection import FaultReport


class Fitter:
    """Codebooks by name.

    Attributes:
        books: The newest of each.
        faults: What the checks found in all fits of this rank.
    """

    def __init__(self, config: KMeansConfig) -> None:
        self._config = config
        self.books: dict[str, Codebook] = {}
        self.faults = FaultReport()

    def start_from(self, books: Mapping[str, Codebook], replicas: Replicas) -> None:
        """Begin with the codebooks that replica 0 has. Collective.

        Those of another shape than the settings ask for are forgotten.
        """
        shared: list[Any] = [dict(books)]
        if replicas.size > 1:
            root = dist.get_global_rank(replicas.group, 0)
            dist.broadcast_object_list(shared, src=root, group=replicas.group)
        shape = (self._config.n_clusters, self._config.sub_dim)
        self.books = {
            name: book for name, book in shared[0].items() if book.centroids.shape == shape
        }

    def fit(
        self, name: str, vectors: torch.Tensor, replicas: Replicas, step: int
    ) -> Codebook | None:
        """Fit the codebook called `name` anew. Collective over `replicas`.

        Args:
            name: Of the parameter or module.
            vectors: float32 (n, sub_dim) on the CPU, n may be 0 on some ranks.
            replicas: Ranks that take part.
            step: Of the run.

        Returns:
            The codebook, the same on all ranks, or None where they have fewer vectors together
            than a codebook has entries.

        Raises:
            DataError: NaN or infinity among the vectors of some rank.
            UncorrectedFaultError: as the fault tolerance says.
        """
        config = self._config
        totals = torch.tensor([len(vectors), float(vectors.double().square().sum())])
        totals = totals.double()
        if replicas.size > 1:
            device = _device_of(replicas)
            totals = totals.to(device)
            dist.all_reduce(totals, group=replicas.group)
            totals = totals.cpu()
        count, energy = int(totals[0]), float(totals[1])
        if count < config.n_clusters:
            return None
        before = self.books.get(name)
        estimator = fit_vectors(
            vectors.numpy(),
            config.n_clusters,
            # A few passes instead of one for each centroid, each of which asks all ranks.
            init="k-means||" if before is None else before.centroids,
            max_iter=config.max_iter,
            seed=config.seed,
            protection=config.fault_tolerance.protection(),
            group=replicas.group,
        )
        self.faults.add(estimator.fault_report_)
        book = Codebook(
            np.ascontiguousarray(estimator.cluster_centers_, np.float32),
            relative_error=float(np.sqrt(estimator.inertia_ / energy)) if energy else 0.0,
            step=step,
            iterations=int(estimator.n_iter_),
        )
        self.books[name] = book
        return book


def _device_of(replicas: Replicas) -> torch.device:
    if dist.get_backend(replicas.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
