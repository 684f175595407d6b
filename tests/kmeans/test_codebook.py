"""Codebooks: codes, files, and which vectors of a tensor a fit looks at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.core.errors import DataError
from lowtide.kmeans import codebook
from lowtide.kmeans.adapters.replicas import Replicas
from lowtide.kmeans.codebook import Codebook
from lowtide.kmeans.vectors import of_activation, of_parameter


def book(entries: int = 5, width: int = 4) -> Codebook:
    centroids = np.random.default_rng(0).normal(size=(entries, width)).astype(np.float32)
    return Codebook(centroids, relative_error=0.25, step=30, iterations=4)


def test_codes_are_the_nearest_centroids() -> None:
    found = book()
    values = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes = found.encode(values)
    assert (codes.shape, codes.dtype) == ((6, 3), np.uint8)
    distances = ((values.reshape(6, 3, 1, 4) - torch.from_numpy(found.centroids)) ** 2).sum(-1)
    assert (torch.from_numpy(codes.astype(np.int64)) == distances.argmin(-1)).all()
    decoded = found.decode(codes)
    assert (decoded.dtype, decoded.shape) == (torch.float32, (6, 12))
    assert (found.encode(decoded) == codes).all()


def test_codes_of_many_entries_have_two_bytes() -> None:
    found = book(300, 2)
    codes = found.encode(torch.from_numpy(found.centroids))
    assert codes.dtype == np.uint16
    assert (codes[:, 0] == np.arange(300)).all()
    assert found.bits_per_value == 9 / 2
    assert book(256, 8).bits_per_value == 1.0


def test_nothing_has_no_codes() -> None:
    assert book().encode(torch.empty(0, 8)).shape == (0, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.zeros(3, 6), "multiple of 4"),
        (torch.tensor(1.0), "multiple of 4"),
        (torch.full((1, 4), float("nan")), "NaN or infinity"),
    ],
)
def test_values_without_codes_are_refused(values: torch.Tensor, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        book().encode(values)


def test_codes_without_a_centroid_are_refused() -> None:
    with pytest.raises(DataError, match="codes from 0 to 5, allowed are 0 to 4"):
        book().decode(np.array([[0, 5]]))


def test_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "books.safetensors"
    books = {"a.weight": book(), "b.weight": book(300, 2)}
    codebook.save(path, books, {"use": "codebook"})
    codebook.save(path, books, {"use": "codebook"})  # over the old one
    found = codebook.load(path)
    assert list(found) == ["a.weight", "b.weight"]
    for name, each in found.items():
        assert (each.centroids == books[name].centroids).all()
        assert (each.relative_error, each.step, each.iterations) == (0.25, 30, 4)
    assert [each.name for each in tmp_path.iterdir()] == ["books.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError):
        codebook.load(tmp_path / "none")
    (tmp_path / "text").write_text("no codebooks here")
    with pytest.raises(DataError, match="not a file of codebooks"):
        codebook.load(tmp_path / "text")
    save_file({"x": np.zeros(3)}, tmp_path / "plain")
    with pytest.raises(DataError, match='format None, this version reads "1"'):
        codebook.load(tmp_path / "plain")
    codebook.save(tmp_path / "cut", {"a": book()}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged"):
        codebook.load(tmp_path / "cut")


def shards_of(values: torch.Tensor, ranks: int) -> list[Any]:
    """Stand in for the parts of a parameter that ZeRO-3 has divided."""
    size = -(-values.numel() // ranks)
    flat = torch.zeros(size * ranks)
    flat[: values.numel()] = values.reshape(-1)
    return [
        SimpleNamespace(ds_tensor=flat[rank * size : (rank + 1) * size], ds_numel=values.numel())
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("limit", [1000, 30])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_replicas_share_the_vectors_of_a_parameter(ranks: int, limit: int) -> None:
    values = torch.arange(7 * 26, dtype=torch.float32).reshape(7, 26)
    alone = of_parameter(values, 4, limit, Replicas())
    assert alone is not None
    parts = []
    for rank in range(ranks):
        found = of_parameter(values.to(torch.bfloat16), 4, limit, Replicas(rank, ranks))
        assert found is not None
        parts.append(found[0])
    together = torch.cat(parts)
    assert len(together) == min(limit, 7 * 26 // 4)
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
    order = together[:, 0].argsort()
    assert (together[order] == alone[0].to(torch.bfloat16).float()).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_vectors_of_a_divided_parameter_are_those_that_one_rank_has(ranks: int) -> None:
    values = torch.arange(7 * 26, dtype=torch.float32).reshape(7, 26)
    parts = []
    for rank, shard in enumerate(shards_of(values, ranks)):
        found = of_parameter(shard, 4, 1000, Replicas(rank, ranks))
        assert found is not None
        parts.append(found[0])
    firsts = torch.cat(parts)[:, 0]
    size = -(-values.numel() // ranks)
    split = {4 * (size * rank // 4) for rank in range(1, ranks) if size * rank % 4}
    expected = [first for first in range(0, 180, 4) if first not in split]
    assert firsts.tolist() == expected
    assert (torch.cat(parts) == firsts[:, None] + torch.arange(4)).all()


def test_a_parameter_smaller_than_a_vector_has_none() -> None:
    assert of_parameter(torch.zeros(1, 3), 4, 10, Replicas()) is None


def test_activations_are_sampled_evenly() -> None:
    output = torch.arange(5 * 3 * 8, dtype=torch.bfloat16).reshape(5, 3, 8)
    found = of_activation(output, 4, 10, Replicas(0, 2))
    assert found is not None
    assert found.dtype == torch.float32
    assert found[:, 0].tolist() == [0, 24, 48, 72, 96]
    assert of_activation(output, 3, 10, Replicas()) is None
    assert of_activation(torch.zeros(4, 8, dtype=torch.int64), 4, 10, Replicas()) is None
