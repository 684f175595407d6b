"""The torch backend: held to the float64 oracle; its checksums find and repair silent errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowtide.core.errors import ConfigError, DataError, NativeUnavailableError
from lowtide.kmeans import backends
from lowtide.kmeans.backends import choose
from lowtide.kmeans.portable import TorchBackend, full_precision
from lowtide.kmeans.protection import Protection
from lowtide.kmeans.reference import ReferenceBackend
from tests.kmeans.points import chosen, flip_bits, points, wrong_products

SHAPES = [(1, 1, 1), (7, 3, 2), (600, 1, 9), (500, 33, 17), (300, 130, 5), (1500, 8, 257)]


def allowed_gap(samples: Any, centroids: Any) -> Any:
    """Return, for each sample, the gap of distances inside which rounding may decide."""
    unit = np.finfo(samples.dtype).eps / 2
    length = np.linalg.norm(samples.astype(float), axis=1)
    longest = np.linalg.norm(centroids.astype(float), axis=1).max()
    return 2 * (samples.shape[1] + 2) * unit * (length + longest) ** 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", ["off", "correct"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pass_is_the_oracles(shape: tuple[int, int, int], mode: str, dtype: Any) -> None:
    count, features, n_clusters = shape
    samples = points(count, features, dtype=dtype)
    centroids = chosen(samples, n_clusters)
    weights = np.random.default_rng(3).random(count)
    found = TorchBackend().prepare(samples, weights).assign(centroids, Protection(mode))  # type: ignore[arg-type]
    right = ReferenceBackend().prepare(samples, weights).assign(centroids)
    assert right.distances is not None
    assert found.distances is not None
    own = ((samples.astype(float) - centroids[found.labels].astype(float)) ** 2).sum(axis=1)
    assert (own <= right.distances + allowed_gap(samples, centroids)).all()
    assert (found.labels == right.labels).mean() > 0.99
    assert found.labels.dtype == np.int32
    np.testing.assert_allclose(found.distances, own, rtol=1e-5, atol=1e-12)
    again = np.zeros_like(right.sums)
    np.add.at(again, found.labels, samples * weights[:, None].astype(float))
    np.testing.assert_allclose(found.sums, again, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.counts, np.bincount(found.labels, weights, n_clusters))
    assert found.inertia == pytest.approx((own * weights).sum(), rel=1e-5, abs=1e-9)
    assert (found.report.checks > 0) == (mode == "correct")
    assert found.report.detected == 0


def test_inertia_without_distances_is_the_same() -> None:
    samples = points(900, 12) + 30
    centroids = chosen(samples, 7)
    for weights in (None, np.random.default_rng(3).random(900)):
        prepared = TorchBackend().prepare(samples, weights)
        exact, quick = prepared.assign(centroids), prepared.assign(centroids, distances=False)
        assert quick.distances is None
        assert quick.inertia == pytest.approx(exact.inertia, rel=1e-12)
    at_home = TorchBackend().prepare(centroids).assign(centroids, distances=False)
    assert 0 <= at_home.inertia < 1e-9


def test_labels_stay_sharp_when_the_mean_is_large() -> None:
    samples = points(2000, 8, dtype=np.float32) + np.float32(3000)
    centroids = chosen(samples, 9)
    found = TorchBackend().prepare(samples).assign(centroids)
    right = ReferenceBackend().prepare(samples).assign(centroids)
    assert (found.labels == right.labels).mean() > 0.999  # 0.9 without taking the mean off


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_clusters", [9, 63, 64, 130])
def test_the_lowest_index_wins_when_centroids_are_equal(n_clusters: int, dtype: Any) -> None:
    places = points(3, 33, dtype=dtype)
    samples = places[np.random.default_rng(0).integers(0, 3, 700)]
    centroids = places[np.arange(n_clusters) % 3]
    for mode in ("off", "correct"):
        labels = TorchBackend().prepare(samples).assign(centroids, Protection.of(mode)).labels
        assert set(labels) == {0, 1, 2}


def test_bfloat16_is_computed_in_float32() -> None:
    samples = torch.from_numpy(points(400, 6)).bfloat16()
    centroids = chosen(samples.float().numpy(), 5)
    found = TorchBackend().prepare(samples).assign(centroids)
    right = ReferenceBackend().prepare(samples.float().numpy()).assign(centroids)
    assert (found.labels == right.labels).all()
    assert found.inertia == pytest.approx(right.inertia, rel=1e-6)


def test_samples_that_are_no_matrix_of_floats_are_refused() -> None:
    with pytest.raises(DataError, match=r"torch.int64 of shape \(3, 2\).*samples.float\(\)"):
        TorchBackend().prepare(torch.zeros(3, 2, dtype=torch.int64))


def test_no_samples_give_nothing() -> None:
    found = TorchBackend().prepare(np.zeros((0, 3))).assign(np.ones((2, 3)), Protection("correct"))
    assert (found.labels.size, found.inertia) == (0, 0.0)
    assert not found.sums.any()


def test_products_are_in_full_precision_and_settings_stay() -> None:
    place = torch.backends.mkldnn.matmul
    if not hasattr(place, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        with full_precision(torch.device("cpu")):
            assert place.fp32_precision == "ieee"
        assert place.fp32_precision == "bf16"
    finally:
        place.fp32_precision = before


BITS = [(np.float32, bit) for bit in (8, 12, 20, 23, 27, 30, 31)]
BITS += [(np.float64, bit) for bit in (20, 45, 52, 58, 62, 63)]


@pytest.mark.parametrize("mode", ["correct", "recompute"])
@pytest.mark.parametrize(("dtype", "bit"), BITS)
def test_flipped_bits_change_no_label(
    bit: int, mode: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = points(400, 16, 12, dtype=dtype)
    centroids = chosen(samples, 140)  # two tiles
    prepared = TorchBackend().prepare(samples)
    clean = prepared.assign(centroids)
    g = np.random.default_rng(bit)
    rows = torch.arange(256)
    columns = torch.from_numpy(g.integers(0, 142, 256))  # checksums too

    def change(found: torch.Tensor, number: int) -> None:
        if number == 0:
            flip_bits(found, (rows, columns), bit)

    wrong_products(monkeypatch, change)
    found = prepared.assign(centroids, Protection.of(mode))
    assert (found.labels == clean.labels).all()
    assert (found.sums == clean.sums).all()
    report = found.report
    assert report.uncorrected == 0
    if (bit, dtype) in [(27, np.float32), (31, np.float32), (58, np.float64), (63, np.float64)]:
        assert report.detected >= 256
        assert report.corrected + report.recomputed >= 256
    assert mode == "correct" or report.corrected == 0


def test_errors_are_rebuilt_where_one_is_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = points(300, 16, dtype=np.float32)
    centroids = chosen(samples, 20)
    prepared = TorchBackend().prepare(samples)
    clean = prepared.assign(centroids)

    def change(found: torch.Tensor, number: int) -> None:
        if number == 0:
            found[:100, 3] += 1e6
            found[100:200, 19] -= 1e6
            found[200, 5] = torch.nan
            found[201, 5] = -torch.inf
            found[202, :3] += torch.tensor([1e3, 1e4, 1e5])
            found[203, 20] = torch.nan  # the checksum
            found[204, [1, 3]] += torch.tensor([1e5, 3e5])  # as if the third by half a place

    wrong_products(monkeypatch, change)
    found = prepared.assign(centroids, Protection("correct"))
    assert (found.labels == clean.labels).all()
    assert found.report.detected == 205
    assert found.report.corrected >= 195
    assert found.report.recomputed >= 5  # not a number, infinity, several in a row
    assert found.report.uncorrected == 0


def test_small_errors_near_a_tie_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half-way between the first two of a hundred centroids but for a gap that one distance's
    # rounding cannot bridge and a rebuilt one's can.
    g = np.random.default_rng(0)
    centroids = 10 * g.standard_normal((100, 16)).astype(np.float32)
    gaps = g.uniform(0.003, 0.006, (300, 1)) * g.choice([-1, 1], (300, 1))
    ways = (centroids[1] - centroids[0]).astype(float)
    samples = (centroids[:2].mean(axis=0) + gaps * ways / (ways @ ways)).astype(np.float32)
    prepared = TorchBackend().prepare(samples)
    right = ReferenceBackend().prepare(samples).assign(centroids)
    np.testing.assert_array_equal(prepared.assign(centroids).labels, right.labels)
    assert len(set(right.labels)) == 2

    def change(found: torch.Tensor, number: int) -> None:
        if number == 0:
            found[:, 0] += 1e6

    wrong_products(monkeypatch, change)
    found = prepared.assign(centroids, Protection("correct"))
    assert found.report.corrected == 300
    np.testing.assert_array_equal(found.labels, right.labels)


@pytest.mark.parametrize("mode", ["detect", "correct", "recompute"])
def test_a_wrong_sum_is_found_and_made_from_the_labels(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = points(300, 4)
    prepared: Any = TorchBackend().prepare(samples, np.random.default_rng(0).random(300))
    clean = prepared.assign(chosen(samples, 5))
    right = prepared._add

    def add(sums: torch.Tensor, *others: Any) -> None:
        right(sums, *others)
        sums[2, 1] += 1e-9

    monkeypatch.setattr(prepared, "_add", add)
    found = prepared.assign(chosen(samples, 5), Protection.of(mode))
    report = found.report
    is_put_right = mode != "detect"
    assert (report.detected, report.recomputed) == (1, is_put_right)
    assert report.uncorrected == (not is_put_right)
    assert np.allclose(found.sums, clean.sums, rtol=0, atol=1e-11) == is_put_right
    np.testing.assert_allclose(found.counts, clean.counts, rtol=1e-13)


def test_detect_counts_and_repairs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = points(300, 16, dtype=np.float32)
    centroids = chosen(samples, 20)

    def change(found: torch.Tensor, number: int) -> None:
        found[7, :] = torch.flip(found[7, :], (0,)) - 1e4

    wrong_products(monkeypatch, change)
    report = TorchBackend().prepare(samples).assign(centroids, Protection("detect")).report
    assert report.detected >= 1
    assert report.uncorrected == report.detected
    assert (report.corrected, report.recomputed) == (0, 0)


def test_a_wrong_winner_is_found_when_the_row_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = points(300, 16, dtype=np.float32)
    centroids = chosen(samples, 20)
    prepared = TorchBackend().prepare(samples)
    clean = prepared.assign(centroids)

    def change(found: torch.Tensor, number: int) -> None:
        if number == 0:  # the sum stays
            rows = torch.arange(50)
            best = torch.from_numpy(clean.labels[:50]).long()
            others = (best + 7) % 20
            found[rows, best], found[rows, others] = found[rows, others], found[rows, best]

    wrong_products(monkeypatch, change)
    found = prepared.assign(centroids, Protection("correct"))
    assert found.report.detected == 50
    assert (found.labels == clean.labels).all()


@pytest.mark.parametrize("kind", ["normal", "mean", "heavy", "tiny", "huge", "zero", "equal"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_found_when_nothing_is_wrong(kind: str, dtype: Any) -> None:
    g = np.random.default_rng(5)
    for features, n_clusters in ((1, 2), (3, 130), (70, 40)):
        samples = g.standard_normal((1200, features))
        samples = {
            "normal": samples, "mean": samples + 1e3, "tiny": samples * 1e-15,
            "heavy": g.standard_t(1.5, samples.shape), "huge": samples * 1e15,
            "zero": samples * 0, "equal": samples[g.integers(0, 3, 1200)],
        }[kind].astype(dtype)  # fmt: skip
        found = (
            TorchBackend()
            .prepare(samples)
            .assign(chosen(samples, n_clusters), Protection("correct"))
        )
        assert found.report.detected == 0
        assert 0 <= found.report.max_residual <= 1
        assert found.report.checks > 1200


@pytest.mark.parametrize(("name", "given"), [("nativ", "native"), ("Torch", "torch")])
def test_an_unknown_backend_is_named_with_the_nearest(name: str, given: str) -> None:
    with pytest.raises(ConfigError, match=f'backend: "{name}" is unknown. Did you mean "{given}"'):
        choose(name)


def test_auto_takes_native_in_host_memory_and_torch_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "_is_native_there", lambda: False)
    assert choose("auto", np.zeros((2, 2))).name == "torch"
    with pytest.raises(NativeUnavailableError, match='"native" is not built here'):
        choose("native")
    elsewhere = torch.zeros(2, 2, device="meta")
    assert choose("auto", elsewhere).name == "torch"
    with pytest.raises(ConfigError, match=r'"reference" works in host memory.*on meta'):
        choose("reference", elsewhere)
    assert choose("reference").name == "reference"
