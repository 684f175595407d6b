"""The native backend against the float64 oracle, over shapes, levels, threads and hard data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core.errors import DataError
from lowtide.kmeans.native import NativeBackend
from lowtide.kmeans.protection import Protection
from lowtide.kmeans.reference import ReferenceBackend
from tests.kmeans.native_data import (
    DTYPES,
    KINDS,
    LEVELS,
    assert_labels,
    case,
    exact_squares,
    needs_native,
    same_bits,
    sums_of,
)

pytestmark = needs_native

SHAPES = (
    (1, 1, 1), (7, 3, 2), (33, 8, 8), (65, 1, 5), (200, 2, 300), (300, 17, 12), (1023, 16, 13),
    (130, 129, 257), (90, 513, 25), (64, 5, 129), (1500, 4, 1), (3000, 33, 64), (40, 300, 1000),
)  # fmt: skip


def check_result(samples: Any, centroids: Any, **options: Any) -> int:
    weights = options.pop("weights", None)
    prepared = NativeBackend(**options).prepare(samples, weights)
    found = prepared.assign(centroids)
    assert found.distances is not None
    assert found.labels.dtype == np.int32
    differing = assert_labels(prepared, found, samples, centroids)
    squares = exact_squares(samples, centroids)[np.arange(len(samples)), found.labels]
    np.testing.assert_allclose(found.distances, squares.astype(np.float64), rtol=1e-12, atol=0)
    sums, counts, sizes = sums_of(samples, found.labels, len(centroids), weights)
    assert (np.abs(found.sums - sums) <= 1e-13 * sizes).all()
    np.testing.assert_allclose(found.counts, counts, rtol=1e-13, atol=0)
    factors = np.ones(len(samples)) if weights is None else weights
    inertia = float((factors * found.distances).sum())
    assert found.inertia == pytest.approx(inertia, rel=1e-12)
    quick = prepared.assign(centroids, distances=False)
    assert quick.distances is None
    assert quick.labels.tobytes() == found.labels.tobytes()
    assert quick.sums.tobytes() == found.sums.tobytes()
    # The identity loses what the samples' spread is larger than the distances.
    spread = float((factors[:, None] * (samples - samples.mean(axis=0)).astype(float) ** 2).sum())
    far = float((exact_squares(centroids, samples.mean(axis=0)[None]) * counts[:, None]).sum())
    assert quick.inertia == pytest.approx(inertia, rel=1e-9, abs=1e-12 * (spread + far))
    return differing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_samples_give_the_oracles_result(
    shape: tuple[int, int, int], level: str, dtype: Any
) -> None:
    samples, centroids = case("normal", shape, dtype)
    assert check_result(samples, centroids, level=level, threads=2) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_samples_keep_the_promise(kind: str, level: str, dtype: Any) -> None:
    for shape in ((1500, 7, 20), (400, 140, 9)):
        samples, centroids = case(kind, shape, dtype)
        check_result(samples, centroids, level=level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_ties_go_to_the_lowest_index(level: str, dtype: Any) -> None:
    samples, centroids = case("ties", (2000, 6, 50), dtype)
    squares = exact_squares(samples, centroids)
    ranked = np.sort(squares, axis=1)
    assert (ranked[:, 0] == ranked[:, 1]).mean() > 0.3  # there are ties
    found = NativeBackend(level=level).prepare(samples).assign(centroids)
    np.testing.assert_array_equal(found.labels, squares.argmin(axis=1))
    twice = np.concatenate([centroids, centroids, centroids])
    again = NativeBackend(level=level).prepare(samples + dtype(0.3)).assign(twice)
    assert again.labels.max() < len(centroids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40_000, 8, 8), (9_000, 70, 90), (3000, 33, 1000)], ids=str)
def test_threads_and_modes_change_no_bit(shape: tuple[int, int, int], dtype: Any) -> None:
    samples, centroids = case("blobs", shape, dtype)
    weights = np.random.default_rng(1).random(len(samples))
    for distances in (True, False):
        first = None
        for threads in (1, 2, 3, 4):
            prepared = NativeBackend(threads).prepare(samples, weights)
            for mode in ("off", "detect", "correct", "recompute"):
                found = prepared.assign(centroids, Protection(mode), distances=distances)  # type: ignore[arg-type]
                first = first or found
                assert same_bits(found, first), (threads, mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_with_fused_multiplication_give_the_same_labels_and_sums(dtype: Any) -> None:
    wide = [level for level in LEVELS if level != "generic"]
    for shape in ((5000, 10, 40), (2000, 300, 100)):
        samples, centroids = case("blobs", shape, dtype)
        found = [NativeBackend(level=level).prepare(samples).assign(centroids) for level in wide]
        for each in found[1:]:
            assert each.labels.tobytes() == found[0].labels.tobytes()
            assert each.sums.tobytes() == found[0].sums.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_weights_count_samples_that_many_times(level: str, dtype: Any) -> None:
    samples, centroids = case("normal", (3000, 9, 11), dtype)
    weights = np.random.default_rng(2).integers(0, 4, len(samples)).astype(np.float64)
    check_result(samples, centroids, weights=weights, level=level)
    times = NativeBackend(level=level).prepare(np.repeat(samples, weights.astype(int), axis=0))
    repeated = times.assign(centroids)
    found = NativeBackend(level=level).prepare(samples, weights).assign(centroids)
    np.testing.assert_array_equal(found.counts, repeated.counts)
    np.testing.assert_allclose(found.sums, repeated.sums, rtol=1e-11, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(1, 30), st.sampled_from(KINDS),
    st.sampled_from(DTYPES), st.sampled_from(LEVELS or ("generic",)), st.integers(0, 2**20),
)  # fmt: skip
def test_small_shapes_give_the_oracles_result(
    count: int, features: int, clusters: int, kind: str, dtype: Any, level: str, seed: int
) -> None:
    samples, centroids = case(kind, (count, features, clusters), dtype, seed)
    check_result(samples, centroids, level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_distances_that_overflow_are_done_in_float64(level: str) -> None:
    samples, centroids = case("normal", (300, 5, 6), np.float32)
    centroids[2] = 3e38
    centroids[4] = -2e30
    samples[7] = 1e20
    oracle = ReferenceBackend().prepare(samples).assign(centroids)
    for mode in ("off", "correct"):
        found = NativeBackend(level=level).prepare(samples).assign(centroids, Protection(mode))  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.labels, oracle.labels)
        assert found.report.detected == 0


def test_no_samples_give_no_sums() -> None:
    prepared = NativeBackend().prepare(np.empty((0, 3), np.float32))
    for protection in (None, Protection("correct")):
        for distances in (True, False):
            found = prepared.assign(np.ones((2, 3)), protection, distances=distances)
            assert found.labels.shape == (0,)
            assert found.inertia == 0
            assert not found.sums.any()
            assert not found.counts.any()


def test_centroids_of_any_dtype_are_taken_in_the_samples_dtype() -> None:
    samples, centroids = case("normal", (100, 4, 5), np.float32)
    prepared = NativeBackend().prepare(torch.from_numpy(samples))
    wide = prepared.assign(centroids.astype(np.float64))
    assert same_bits(prepared.assign(centroids), wide)
    assert same_bits(prepared.assign(np.asfortranarray(centroids)), wide)


def test_samples_are_not_changed() -> None:
    samples, centroids = case("far", (5000, 6, 7), np.float32)
    before = samples.tobytes()
    NativeBackend().prepare(samples).assign(centroids, Protection("correct"))
    assert samples.tobytes() == before


BAD = {
    "dtype": (np.zeros((3, 2), np.int32), None, "float32"),
    "one axis": (np.zeros(3, np.float32), None, r"\(samples, features\)"),
    "layout": (np.zeros((3, 4), np.float32)[:, ::2], None, "C-contiguous"),
    "no features": (np.zeros((3, 0), np.float32), None, "one feature"),
    "not finite": (np.array([[0, 1], [2, np.nan]], np.float32), None, "row 1, column 1"),
    "infinite": (np.array([[0, np.inf]]), None, "row 0, column 1"),
    "weights": (np.zeros((3, 2)), np.ones(2), "3 samples"),
}


@pytest.mark.parametrize("what", BAD)
def test_samples_that_cannot_be_clustered_are_refused(what: str) -> None:
    samples, weights, text = BAD[what]
    with pytest.raises(DataError, match=text):
        NativeBackend().prepare(samples, weights)


def test_centroids_that_do_not_fit_are_refused() -> None:
    prepared = NativeBackend().prepare(np.zeros((3, 2), np.float32))
    with pytest.raises(DataError, match="2 as the samples have"):
        prepared.assign(np.zeros((2, 3)))
    with pytest.raises(DataError, match="dimensions"):
        prepared.assign(np.zeros(2))
    with pytest.raises(DataError, match="0 rows"):
        prepared.assign(np.zeros((0, 2)))
    with pytest.raises(DataError, match="1 elements are not finite"):
        prepared.assign(np.array([[0, 1e39]]))  # too large for the samples' dtype
    with pytest.raises(DataError, match="level"):
        NativeBackend(level="sse9").prepare(np.zeros((3, 2)))
    with pytest.raises(DataError, match="threads"):
        NativeBackend(0).prepare(np.zeros((3, 2)))
