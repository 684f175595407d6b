"""Codebooks: vectors replaced by the number of the nearest centroid (vector quantisation)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError, listed

if TYPE_CHECKING:
    from lowtide.kmeans.estimator import KMeans
    from lowtide.kmeans.protection import Protection

FORMAT = 1
_LARGEST_BYTE = 256


@dataclass(frozen=True)
class Codebook:
    """Centroids of sub-vectors, and how well they fit.

    Attributes:
        centroids: float32 (K, d).
        relative_error: Of what was fitted: ``||x - x'|| / ||x||``, Frobenius.
        step: Optimizer step of the fit.
        iterations: Lloyd iterations of the fit.
    """

    centroids: NDArray[np.float32]
    relative_error: float
    step: int = 0
    iterations: int = 0

    @property
    def bits_per_value(self) -> float:
        """Bits of a code over the values it stands for; the centroids are not counted."""
        clusters, width = self.centroids.shape
        return float(max(clusters - 1, 1).bit_length() / width)

    def encode(self, values: torch.Tensor) -> NDArray[np.integer[Any]]:
        """Return codes: uint8, or uint16 above 256 centroids, of shape (..., D / d).

        Args:
            values: (..., D) with D a multiple of the codebook's width d; any float dtype.

        Raises:
            DataError: D is not such a multiple, or a value is not finite.
        """
        from lowtide.kmeans.backends import choose

        width = self.centroids.shape[1]
        if values.dim() == 0 or values.shape[-1] % width:
            raise DataError(
                f"codebook: values of shape {tuple(values.shape)}, the last axis must be a "
                f"multiple of {width}"
            )
        vectors = values.detach().to("cpu", torch.float32).reshape(-1, width).contiguous().numpy()
        if not np.isfinite(vectors).all():
            raise DataError("codebook: NaN or infinity among the values; they have no code")
        shape = (*values.shape[:-1], values.shape[-1] // width)
        dtype = np.uint8 if len(self.centroids) <= _LARGEST_BYTE else np.uint16
        if not len(vectors):
            return np.empty(shape, dtype)
        labels = choose("auto").prepare(vectors).assign(self.centroids).labels
        return labels.astype(dtype).reshape(shape)

    def decode(self, codes: NDArray[np.integer[Any]]) -> torch.Tensor:
        """Return float32 (..., D) of the codes of `encode`.

        Raises:
            DataError: a code has no centroid.
        """
        if codes.size and (codes.min() < 0 or codes.max() >= len(self.centroids)):
            raise DataError(
                f"codebook: codes from {codes.min()} to {codes.max()}, allowed are 0 to "
                f"{len(self.centroids) - 1}"
            )
        vectors = self.centroids[codes.astype(np.int64).reshape(-1)]
        return torch.from_numpy(vectors.reshape(*codes.shape[:-1], -1))


def fit_vectors(
    vectors: NDArray[Any],
    n_clusters: int,
    *,
    init: Any = "k-means++",
    max_iter: int,
    seed: int,
    protection: Protection,
    group: Any = None,
) -> KMeans:
    """Return an estimator that was fitted to vectors (n, d); arguments as those of `KMeans`.

    Raises:
        DataError, UncorrectedFaultError: as `KMeans.fit`.
    """
    from lowtide.kmeans.estimator import KMeans
    from lowtide.kmeans.scikit import ConvergenceWarning

    estimator = KMeans(
        n_clusters,
        init=init,
        n_init=1,
        max_iter=max_iter,
        random_state=seed,
        fault_tolerance=protection,
        process_group=group,
    )
    with warnings.catch_warnings():
        # Fewer different vectors than entries are nothing wrong: they all come back exactly.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(vectors)


def save(path: Path, books: Mapping[str, Codebook], settings: Mapping[str, Any]) -> None:
    """Write codebooks by name; a reader sees the old file or the new one, whole.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save as as_bytes

    facts = {
        name: {
            "relative_error": book.relative_error,
            "step": book.step,
            "iterations": book.iterations,
        }
        for name, book in books.items()
    }
    metadata = {
        "format": str(FORMAT),
        "settings": json.dumps(dict(settings), sort_keys=True),
        "books": json.dumps(facts, sort_keys=True),
    }
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("wb") as file:
        file.write(as_bytes({name: book.centroids for name, book in books.items()}, metadata))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def load(path: Path) -> dict[str, Codebook]:
    """Return the codebooks that `save` wrote.

    Raises:
        DataError: it is no such file, or a damaged one.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path.stat()  # a missing file in the system's own words
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT):
                raise DataError(
                    f'{path}: format {metadata.get("format")!r}, this version reads "{FORMAT}"'
                )
            facts = json.loads(metadata["books"])
            names = set(file.keys())
            if names != set(facts):
                raise DataError(f"{path}: facts of other books than {listed(sorted(names))}")
            return {name: Codebook(file.get_tensor(name), **facts[name]) for name in sorted(names)}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a file of codebooks, or damaged: {error}") from error
