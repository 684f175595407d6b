"""Ranks that share a clustering: the same result as one, and errors that reach all of them."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from lowtide.core.errors import ConfigError
from lowtide.kmeans import KMeans
from lowtide.kmeans.distributed import Group, group_of
from tests.helpers.ranks import RankResult, run_ranks
from tests.kmeans.points import points
from tests.kmeans.ranks_worker import COUNT, bounds, samples_of, starts, weights_of

pytestmark = pytest.mark.dist


@functools.cache
def start(nproc: int) -> RankResult:
    with tempfile.TemporaryDirectory(prefix="lowtide-kmeans-") as folder:
        worker = ["-m", "tests.kmeans.ranks_worker", folder]
        return run_ranks(worker, nproc=nproc, timeout_s=200)


def results(nproc: int) -> list[Any]:
    return start(nproc).check().results


NAMES = [*starts(), "batches"]


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_shards_end_as_the_whole_does(name: str, nproc: int) -> None:
    (whole,) = (each["fits"][name] for each in results(1))
    parts = [each["fits"][name] for each in results(nproc)]
    if name != "batches":  # those are dealt out in turn
        labels = np.concatenate([part["labels"] for part in parts])
        np.testing.assert_array_equal(labels, whole["labels"])
    for part in parts:
        assert part["centroids"] == parts[0]["centroids"]  # bit for bit
        assert part["n_iter"] == whole["n_iter"]
        assert part["inertia"] == pytest.approx(whole["inertia"], rel=1e-6)
        assert part["report"] == parts[0]["report"]
        assert part["report"]["detected"] == 0
    np.testing.assert_allclose(parts[0]["centroids"], whole["centroids"], rtol=1e-5, atol=1e-6)


def test_one_rank_ends_as_no_group_does() -> None:
    for name, (dtype, options) in starts().items():
        n_clusters = 10 if name == "empty" else 8
        model = KMeans(n_clusters, random_state=3, tol=0.0, **options)
        model.fit(samples_of(dtype), sample_weight=weights_of())
        found = results(1)[0]["fits"][name]
        assert model.labels_.tolist() == found["labels"]
        assert model.cluster_centers_.tolist() == found["centroids"]
        assert set(found["labels"]) == set(range(n_clusters))  # none stays empty


def test_rows_are_gathered_from_uneven_shards() -> None:
    for nproc in (2, 4):
        wanted = np.diff(bounds(nproc)).tolist()
        assert (nproc == 4) == (0 in wanted)
        assert all(each["gathered"] == wanted for each in results(nproc))


FAILURES = {
    "nan": (0, "DataError: X: contains NaN (first in row 1)"),
    "parameter": (1, "ConfigError: tol: got -1"),
    "backend": (0, 'ConfigError: backend: "nonsense" is unknown'),
    "breaks": (1, "MemoryError: no memory left on this rank"),
}
TOGETHER = {
    "features": "ranks have different number of features: 3, 5",
    "n_clusters": "ranks have different n_clusters: 8, 9",
    "init": "init: ranks were given different arrays",
    "few": f"n_samples={COUNT} should be >= n_clusters={COUNT + 1}",
}


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_on_one_rank_fails_on_all(name: str, nproc: int) -> None:
    guilty, text = FAILURES[name]
    for rank, each in enumerate(results(nproc)):
        said = each["failures"][name]
        if rank == guilty:
            assert said.startswith(text)
        else:
            assert "the clustering failed on another rank, so it stops on all: " in said
            assert f"rank {guilty}: {text.partition(': ')[2]}" in said
        assert each["failures"]["after"] == "no error"  # the group is still in step


@pytest.mark.parametrize("name", TOGETHER)
def test_calls_that_do_not_fit_together_are_refused_on_all_ranks(name: str) -> None:
    for each in results(2):
        assert TOGETHER[name] in each["failures"][name]


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("where", ["sent", "received"])
def test_a_wrong_message_is_found_and_sent_again(where: str, nproc: int) -> None:
    for each in results(nproc):
        found, clean = each["damaged"][where], each["fits"]["array64"]
        assert (found["report"]["detected"], found["report"]["recomputed"]) == (1, 1)
        assert found["report"]["uncorrected"] == 0
        assert found["labels"] == clean["labels"]
        assert found["n_iter"] == clean["n_iter"]
        np.testing.assert_allclose(found["centroids"], clean["centroids"], rtol=1e-12)


def test_messages_that_stay_wrong_raise_on_all_ranks() -> None:
    for each in results(2):
        assert "UncorrectedFaultError: fault_tolerance:" in each["damaged"]["everywhere"]["error"]


@pytest.mark.parametrize("nproc", [2, 4])
def test_a_stopped_fit_goes_on_with_the_same_bits_on_all_ranks(nproc: int) -> None:
    for rank, each in enumerate(results(nproc)):
        found = each["resumed"]
        assert found["is_stopped"]
        assert found["is_there"] == (rank == 0)
        assert found["is_gone"]
        assert found["again"] == found["whole"]


def test_a_group_has_to_be_one() -> None:
    assert type(group_of(None)) is Group
    with pytest.raises(ConfigError, match=r'"wrld" is unknown. Allowed: None, "world"'):
        KMeans(2, process_group="wrld").fit(points(9, 2))
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match=r"call torch.distributed.init_process_group first"):
        KMeans(2, process_group="world").fit(points(9, 2))
