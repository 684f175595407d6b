"""Where centroids start: scikit-learn's places for its random numbers, k-means||, the caller's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import ConfigError, DataError
from lowtide.kmeans import initial as initial_module
from lowtide.kmeans.initial import _uniform, initial
from lowtide.kmeans.passes import Problem
from lowtide.kmeans.reference import ReferenceBackend
from tests.kmeans.points import Array, points, problem_of

METHODS = ("k-means++", "k-means||", "random")


def starts(samples: Any, init: Any, n_clusters: int, weights: Any = None, seed: int = 0) -> Array:
    generator = np.random.RandomState(seed)
    return initial(problem_of(samples, weights), init, n_clusters, generator)


def inertia(samples: Any, centroids: Any) -> float:
    return ReferenceBackend().prepare(samples).assign(centroids).inertia


@pytest.mark.parametrize("shape", [(60, 1, 4), (900, 7, 12), (400, 40, 33)], ids=str)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_plus_plus_draws_what_scikit_learn_draws(
    shape: tuple[int, int, int], is_weighted: bool
) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    count, features, n_clusters = shape
    samples = points(count, features)
    weights = np.random.default_rng(2).random(count) if is_weighted else None
    for seed in range(4):
        theirs, _ = cluster.kmeans_plusplus(
            samples, n_clusters, sample_weight=weights, random_state=seed
        )
        np.testing.assert_array_equal(
            starts(samples, "k-means++", n_clusters, weights, seed), theirs
        )


def test_random_draws_what_numpy_draws_without_replacement() -> None:
    samples = points(50, 3)
    weights = np.random.default_rng(2).random(50) ** 4
    for seed in range(4):
        places = np.random.RandomState(seed).choice(
            50, 20, replace=False, p=weights / weights.sum()
        )
        found = starts(samples, "random", 20, weights, seed)
        np.testing.assert_array_equal(found, samples[places])


@pytest.mark.parametrize("method", METHODS)
def test_samples_without_weight_are_never_drawn(method: str) -> None:
    samples = points(200, 2)
    weights = (np.arange(200) % 3 == 0).astype(float)
    heavy = {tuple(row) for row in samples[::3]}
    for seed in range(5):
        found = starts(samples, method, 20, weights, seed)
        assert {tuple(row) for row in found} <= heavy
        assert len({tuple(row) for row in found}) == 20


def test_distances_draw_in_proportion_to_their_squares() -> None:
    # from 0 the next seed is 1, 2 or 3 with chances 1, 4 and 9 of 14, but for the greedy choice:
    # three trials, the one that leaves the least wins
    samples = np.array([[0.0], [1.0], [2.0], [3.0]])
    weights = np.array([1e12, 1.0, 1.0, 1.0])
    seeds = [starts(samples, "k-means++", 2, weights, seed)[1, 0] for seed in range(2000)]
    shares = np.array([seeds.count(value) for value in (1.0, 2.0, 3.0)]) / len(seeds)
    left = {1.0: 5.0, 2.0: 2.0, 3.0: 2.0}  # 2 and 3 leave as much; the first trial of them wins
    assert left[2.0] == left[3.0]
    chance = np.array([1, 4, 9]) / 14
    wanted = np.array([chance[0] ** 2, *(1 - chance[0] ** 2) * chance[1:] / chance[1:].sum()])
    np.testing.assert_allclose(shares, wanted, atol=0.035)


def test_parallel_is_as_good_as_plus_plus() -> None:
    samples = points(4000, 5, 30)
    ours = np.median([inertia(samples, starts(samples, "k-means||", 30, seed=s)) for s in range(5)])
    theirs = np.median(
        [inertia(samples, starts(samples, "k-means++", 30, seed=s)) for s in range(5)]
    )
    drawn = np.median([inertia(samples, starts(samples, "random", 30, seed=s)) for s in range(5)])
    assert ours < 1.3 * theirs
    assert ours < 0.6 * drawn


def test_candidates_of_parallel_are_different_and_weigh_what_they_stand_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples, weights = points(3000, 3, 20), np.random.default_rng(2).random(3000)
    seen = []
    right = initial_module.plus_plus

    def plus_plus(problem: Problem, *others: Any) -> Any:
        seen.append(problem.samples)
        return right(problem, *others)

    monkeypatch.setattr(initial_module, "plus_plus", plus_plus)
    starts(samples, "k-means||", 20, weights)
    (candidates,) = seen
    assert len(np.unique(candidates.values, axis=0)) == len(candidates.values)  # none drawn twice
    assert 100 < len(candidates.values) < 300  # five rounds of about 40
    nearest = ReferenceBackend().prepare(samples, weights).assign(candidates.values)
    np.testing.assert_allclose(candidates.weights, nearest.counts)


@pytest.mark.parametrize("method", ["k-means++", "k-means||"])
@pytest.mark.parametrize("values", [[[1.0]] * 6, [[1.0]] * 3 + [[2.0]] * 3])
def test_more_clusters_than_different_samples_repeat_them(method: str, values: Any) -> None:
    found = starts(np.array(values), method, 4)
    assert set(found.ravel()) == set(np.ravel(values))


@pytest.mark.parametrize("method", METHODS)
def test_every_sample_is_a_start_when_there_are_no_more(method: str) -> None:
    samples = points(9, 2, dtype=np.float32)
    found = starts(samples, method, 9)
    assert found.dtype == np.float32
    assert {tuple(row) for row in found} == {tuple(row) for row in samples}


@pytest.mark.parametrize("method", METHODS)
def test_a_large_mean_changes_no_seed(method: str) -> None:
    samples = (points(500, 4) * 16).round().astype(np.float32) / 16  # exact beside 1024
    found = starts(samples, method, 9)
    moved = starts(samples + np.float32(1024), method, 9)
    np.testing.assert_array_equal(moved - 1024, found)


def test_numbers_of_a_sample_do_not_depend_on_its_rank() -> None:
    whole = _uniform(7, 0, 103)
    assert (whole >= 0).all()
    assert (whole < 1).all()
    for begin, end in ((0, 5), (5, 5), (5, 50), (50, 103)):
        np.testing.assert_array_equal(_uniform(7, begin, end - begin), whole[begin:end])


def test_the_callers_function_gets_the_samples() -> None:
    samples = points(30, 2)

    def first(given: Any, n_clusters: int, random_state: np.random.RandomState) -> Any:
        np.testing.assert_array_equal(given, samples)
        return given[random_state.permutation(30)[:n_clusters]]

    np.testing.assert_array_equal(
        starts(samples, first, 3), samples[np.random.RandomState(0).permutation(30)[:3]]
    )


@pytest.mark.parametrize(
    ("init", "error", "text"),
    [
        ("kmeans++", ConfigError, r'init: "kmeans\+\+" is unknown. Did you mean "k-means\+\+"'),
        (np.zeros((2, 2)), DataError, r"\(2, 2\) does not match the number of clusters 3"),
        (np.zeros((3, 1)), DataError, r"\(3, 1\) does not match the number of features of the"),
        ([[1, 2], [3, np.nan], [4, 5]], DataError, "init: contains NaN"),
        ([["a", "b"]] * 3, DataError, "init: cannot be made an array of numbers"),
    ],
)
def test_what_cannot_be_a_start_is_refused(init: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        starts(points(9, 2), init, 3)


def test_random_needs_as_many_samples_with_weight_as_clusters() -> None:
    with pytest.raises(DataError, match=r'2 samples have a weight above 0.*pass init="k-means\+\+'):
        starts(points(5, 2), "random", 3, np.array([1.0, 0, 0, 2.0, 0]))
