"""Samples for the tests of K-Means, and a silent error in the distances of the torch backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.kmeans import portable_checks
from lowtide.kmeans.backend import Backend
from lowtide.kmeans.distributed import Group
from lowtide.kmeans.passes import Problem
from lowtide.kmeans.portable import TorchBackend
from lowtide.kmeans.protection import Protection
from lowtide.kmeans.samples import as_samples

Array = np.ndarray


def points(
    count: int, features: int, blobs: int = 5, *, seed: int = 0, dtype: Any = np.float64
) -> Array:
    """Return samples around `blobs` places."""
    g = np.random.default_rng(seed)
    places = 4 * g.standard_normal((blobs, features))
    samples = places[g.integers(0, blobs, count)] + g.standard_normal((count, features))
    return samples.astype(dtype)


def chosen(samples: Array, count: int, *, seed: int = 1) -> Array:
    """Return different samples to start from."""
    return samples[np.random.default_rng(seed).choice(len(samples), count, replace=False)]


def problem_of(
    samples: Any,
    weights: Any = None,
    *,
    mode: str = "off",
    backend: Backend | None = None,
    group: Group | None = None,
) -> Problem:
    """Return a problem for the torch backend, or another."""
    return Problem.of(
        as_samples(samples, weights),
        backend or TorchBackend(),
        group=group,
        protection=Protection.of(mode),
    )


def flip_bits(values: torch.Tensor, places: Any, bit: int) -> None:
    """Flip a bit of float32 or float64 elements (rows, columns) in place."""
    words = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    width = 8 * values.element_size()
    mask = torch.tensor(1 << bit if bit < width - 1 else -(1 << bit), dtype=words.dtype)
    words[places] ^= mask


def wrong_products(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, int], None]
) -> list[int]:
    """Let `change(distances and checksums, number of the product)` damage every product."""
    calls: list[int] = []
    right = portable_checks.product

    def product(samples: torch.Tensor, centres: portable_checks.Centres) -> torch.Tensor:
        found = right(samples, centres)
        change(found, len(calls))
        calls.append(len(calls))
        return found

    monkeypatch.setattr(portable_checks, "product", product)
    return calls


def quietly(fit: Callable[[], Any]) -> Any:
    """Return what `fit` returns, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit()
