"""`KMeans`: scikit-learn's results and rules, samples of many kinds, parameters, errors."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.core.errors import ConfigError, DataError, LowtideError, UncorrectedFaultError
from lowtide.kmeans import KMeans, Protection
from lowtide.kmeans.backends import choose
from lowtide.kmeans.samples import as_samples
from lowtide.kmeans.scikit import ConvergenceWarning, NotFittedError, _Parameters
from tests.kmeans.points import chosen, flip_bits, points, quietly, wrong_products

SHAPES = [(50, 1, 3), (200, 2, 8), (900, 8, 8), (1500, 33, 17), (400, 5, 100), (300, 3, 1)]
SHAPES += [(600, 64, 40)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["blobs", "noise", "mean", "weights"])
def test_a_fit_is_scikit_learns(kind: str, shape: tuple[int, int, int], dtype: Any) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    count, features, n_clusters = shape
    samples = points(count, features, 1 if kind == "noise" else n_clusters, dtype=dtype)
    samples += dtype(50 if kind == "mean" else 0)
    weights = np.random.default_rng(3).random(count) if kind == "weights" else None
    start = chosen(samples, n_clusters)
    theirs = cluster.KMeans(n_clusters, init=start, n_init=1).fit(samples, sample_weight=weights)
    ours = KMeans(n_clusters, init=start).fit(samples, sample_weight=weights)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.n_iter_ == theirs.n_iter_
    tolerance = 2e-5 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(
        ours.cluster_centers_, theirs.cluster_centers_, rtol=tolerance, atol=tolerance
    )
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=2e-5, abs=1e-9)
    assert ours.cluster_centers_.dtype == theirs.cluster_centers_.dtype
    assert ours.labels_.dtype == theirs.labels_.dtype
    np.testing.assert_array_equal(ours.predict(samples[:50]), theirs.predict(samples[:50]))
    np.testing.assert_allclose(
        ours.transform(samples), theirs.transform(samples), rtol=2e-5, atol=1e-4
    )
    assert ours.score(samples) == pytest.approx(theirs.score(samples), rel=2e-5, abs=1e-9)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_a_fit_from_a_seed_is_scikit_learns(init: str) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    samples = points(700, 6)
    for seed in range(3):
        options: dict[str, Any] = {"init": init, "n_init": 3, "random_state": seed}
        theirs = cluster.KMeans(9, **options).fit(samples)
        ours = KMeans(9, **options).fit(samples)
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
        assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-10)


# Starts far from all samples are placed anew: at once where nothing is near them, else after 80
# samples; more of them than half a batch has samples not all at once.
@pytest.mark.parametrize(("far", "size"), [([90, 90], 150), ([50], 30), ([90] * 6, 8)])
def test_batches_move_centroids_as_scikit_learns_do(far: list[int], size: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    samples = points(1200, 4)
    samples[3] = 51.0
    start = np.vstack([chosen(samples[4:], 8 - len(far)), [[place] * 4 for place in far]])
    options: dict[str, Any] = {"init": start, "random_state": 0}
    theirs, ours = cluster.MiniBatchKMeans(8, n_init=1, **options), KMeans(8, **options)
    weights = np.random.default_rng(3).random(1200)
    for begin in range(0, 1200, size):
        part = slice(begin, begin + size)
        theirs.partial_fit(samples[part], sample_weight=weights[part])
        ours.partial_fit(samples[part], sample_weight=weights[part])
        np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-9)
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
        assert ours.inertia_ == pytest.approx(theirs.inertia_)
    assert ours.n_steps_ == theirs.n_steps_ == 1200 // size


def test_scikit_learns_own_checks_pass() -> None:
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    model = KMeans(n_clusters=2)
    found = quietly(lambda: checks.check_estimator(model, on_skip=None, on_fail=None))
    failed = {each["check_name"] for each in found if each["status"] == "failed"}
    # scikit-learn's own KMeans fails it too: other draws for samples in another order
    assert failed <= {"check_sample_weight_equivalence_on_dense_data"}
    assert sum(each["status"] == "passed" for each in found) >= 50


def test_scikit_learn_clones_and_pipes_it() -> None:
    base = pytest.importorskip("sklearn.base")
    pipeline = pytest.importorskip("sklearn.pipeline")
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler()
    model = KMeans(4, fault_tolerance=Protection("correct"), process_group=None, random_state=0)
    twin = base.clone(model)
    assert twin.get_params() == model.get_params()
    samples = points(100, 3)
    whole = pipeline.make_pipeline(scaler, twin).fit(samples)
    assert whole.transform(samples).shape == (100, 4)
    assert list(twin.get_feature_names_out()) == [f"kmeans{k}" for k in range(4)]


def test_without_scikit_learn_it_has_parameters_and_works() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import numpy as np\n"
        "from lowtide.kmeans import KMeans\n"
        "from lowtide.kmeans.scikit import HAS_SKLEARN\n"
        "assert not HAS_SKLEARN\n"
        "model = KMeans(3, tol=0.5).set_params(n_clusters=2)\n"
        "assert repr(model) == 'KMeans(n_clusters=2, tol=0.5)', repr(model)\n"
        "twin = type(model)(**model.get_params())\n"
        "x = np.array([[0.0], [1.0], [9.0], [10.0]])\n"
        "assert sorted(twin.fit(x).cluster_centers_.ravel()) == [0.5, 9.5]\n"
        "try: twin.predict(x[:, [0, 0]])\n"
        "except ValueError as error: assert 'KMeans is expecting 1' in str(error)\n"
        "else: raise AssertionError\n"
        "x.flags.writeable = False\n"  # torch would warn of it, once in a process
        "twin.fit(x)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lowtide.kmeans\n"
        "heavy = {'torch', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_unknown_parameter_is_named_with_the_nearest() -> None:
    class Plain(_Parameters):
        def __init__(self, n_clusters: int = 8) -> None:
            self.n_clusters = n_clusters

    with pytest.raises(ConfigError, match=r'no parameter "n_cluster".*Did you mean "n_clusters"'):
        Plain().set_params(n_cluster=3)


def test_results_are_tensors_for_tensors() -> None:
    samples = points(300, 4, dtype=np.float32)
    start = chosen(samples, 5)
    array = KMeans(5, init=start).fit(samples)
    tensor = KMeans(5, init=torch.from_numpy(start)).fit(torch.from_numpy(samples))
    for name in ("cluster_centers_", "labels_"):
        found = getattr(tensor, name)
        assert isinstance(found, torch.Tensor)
        np.testing.assert_array_equal(found.numpy(), getattr(array, name))
    assert isinstance(tensor.transform(torch.from_numpy(samples)), torch.Tensor)
    assert isinstance(tensor.predict(samples), np.ndarray)  # as what is asked about
    assert isinstance(tensor.inertia_, float)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samples_are_not_copied_and_not_changed(dtype: Any, tmp_path: Path) -> None:
    samples = points(300, 4, dtype=dtype)
    before = samples.copy()
    for given in (samples, torch.from_numpy(samples)):
        assert as_samples(given).tensor.data_ptr() == samples.ctypes.data
    KMeans(5, random_state=0, fault_tolerance="correct").fit(samples)
    np.testing.assert_array_equal(samples, before)
    np.save(tmp_path / "x.npy", samples)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert as_samples(mapped).tensor.data_ptr() == mapped.ctypes.data
    start = chosen(samples, 5)
    here, there = KMeans(5, init=start).fit(samples), KMeans(5, init=start).fit(mapped)
    np.testing.assert_array_equal(here.labels_, there.labels_)


def test_other_layouts_and_types_give_the_same() -> None:
    samples = points(300, 4).round(1).astype(np.float32)
    start = chosen(samples, 5)
    right = KMeans(5, init=start).fit(samples)
    wide = np.zeros((300, 8), np.float32)
    wide[:, ::2] = samples
    for given in (np.asfortranarray(samples), wide[:, ::2], torch.from_numpy(wide)[:, ::2]):
        found = KMeans(5, init=start).fit(given)
        np.testing.assert_array_equal(np.asarray(found.labels_), right.labels_)
    whole = (samples * 10).round()
    right = KMeans(5, init=start * 10).fit(whole.astype(np.float64))
    for given in (whole.astype(np.int64), whole.astype(int).tolist(), whole.astype(object)):
        found = KMeans(5, init=start * 10).fit(given)
        assert found.cluster_centers_.dtype == np.float64
        np.testing.assert_array_equal(found.labels_, right.labels_)
    halves = torch.from_numpy(samples).bfloat16()
    found = KMeans(5, init=start).fit(halves)
    assert found.cluster_centers_.dtype == torch.float32
    right = KMeans(5, init=start).fit(halves.float())
    assert torch.equal(found.labels_, right.labels_)


def test_weights_count_as_repeated_samples() -> None:
    samples = points(200, 3)
    times = np.random.default_rng(0).integers(0, 4, 200)
    start = chosen(samples, 6)
    weighted = KMeans(6, init=start).fit(samples, sample_weight=times)
    repeated = KMeans(6, init=start, tol=1e-4).fit(samples.repeat(times, axis=0))
    np.testing.assert_allclose(weighted.cluster_centers_, repeated.cluster_centers_)
    assert weighted.inertia_ == pytest.approx(repeated.inertia_)
    assert weighted.score(samples, sample_weight=times) == pytest.approx(-weighted.inertia_)


def test_labels_are_those_of_the_centroids() -> None:
    samples = points(500, 3, 1)
    model = KMeans(9, random_state=0, max_iter=3).fit(samples)
    np.testing.assert_array_equal(model.predict(samples), model.labels_)
    distances = model.transform(samples)
    np.testing.assert_array_equal(distances.argmin(axis=1), model.labels_)
    assert (distances.min(axis=1) ** 2).sum() == pytest.approx(model.inertia_)
    np.testing.assert_array_equal(
        KMeans(9, random_state=0, max_iter=3).fit_predict(samples), model.labels_
    )
    np.testing.assert_allclose(
        KMeans(9, random_state=0, max_iter=3).fit_transform(samples), distances
    )
    assert model.fit_transform(points(20, 3)[:, :3].astype(np.float32)).dtype == np.float32


def test_the_best_of_several_runs_is_kept() -> None:
    samples = points(400, 2, 12)
    one = [KMeans(12, init="random", n_init=1, random_state=s).fit(samples) for s in range(3)]
    generator = np.random.RandomState(0)
    runs = [
        KMeans(12, init="random", n_init=1, random_state=generator).fit(samples).inertia_
        for _ in range(10)
    ]
    best = KMeans(12, init="random", random_state=0).fit(samples)
    assert best.inertia_ == min(runs)
    assert len({round(model.inertia_, 6) for model in one}) > 1
    np.testing.assert_array_equal(best.predict(samples), best.labels_)


def test_iterations_are_logged_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lowtide")
    model = KMeans(5, random_state=0, tol=0.0).fit(points(300, 4, 1))
    assert not caplog.records
    model = model.set_params(verbose=1).fit(points(300, 4, 1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == model.n_iter_ - 1
    assert lines[0].startswith("run 0, iteration 0: inertia ")


def test_few_different_samples_are_warned_of() -> None:
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\) found smaller than"):
        KMeans(3, random_state=0).fit([[1.0], [1.0], [2.0], [2.0]])


def test_faults_are_put_right_during_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = points(500, 8, dtype=np.float32)
    start = chosen(samples, 6)
    options: dict[str, Any] = {"init": start, "backend": "torch"}
    clean = KMeans(6, **options).fit(samples)
    assert clean.fault_report_.checks == 0

    def change(found: torch.Tensor, number: int) -> None:
        g = np.random.default_rng(number)
        rows = torch.from_numpy(g.choice(500, 20, replace=False))
        flip_bits(found, (rows, torch.from_numpy(g.integers(0, 6, 20))), 30)

    calls = wrong_products(monkeypatch, change)
    for mode in ("correct", "recompute", True, {"mode": "correct", "kappa": 10}):
        calls.clear()
        model = KMeans(6, **options, fault_tolerance=mode).fit(samples)
        np.testing.assert_array_equal(model.labels_, clean.labels_)
        np.testing.assert_array_equal(model.cluster_centers_, clean.cluster_centers_)
        report = model.fault_report_
        assert report.detected >= 15 * model.n_iter_
        assert report.uncorrected == 0
    with pytest.raises(UncorrectedFaultError, match="silent errors were found"):
        KMeans(6, **options, fault_tolerance="detect").fit(samples)
    model.set_params(fault_tolerance="detect")
    with pytest.raises(UncorrectedFaultError, match="in the assignment"):
        model.predict(samples)
    model.set_params(fault_tolerance={"mode": "detect", "max_uncorrected": 10**6})
    assert model.fit(samples).fault_report_.uncorrected > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_clusters": 0}, "n_clusters: got 0, allowed are whole numbers from 1"),
        ({"n_clusters": 2.0}, "n_clusters: got 2.0"),
        ({"max_iter": 0}, "max_iter: got 0"),
        ({"n_init": "many"}, "n_init: got 'many', allowed are whole numbers from 1 or \"auto\""),
        ({"tol": -1e-3}, "tol: got -0.001, allowed are numbers from 0"),
        ({"backend": "cuda"}, 'backend: "cuda" is unknown'),
        ({"fault_tolerance": "correcd"}, 'mode "correcd" is unknown. Did you mean "correct"'),
        ({"fault_tolerance": {"kapa": 1}}, 'option "kapa" is unknown. Did you mean "kappa"'),
        ({"init": "kmeans||"}, 'init: "kmeans||" is unknown. Did you mean "k-means||"'),
        ({"random_state": "7"}, "random_state: got '7'"),
    ],
)
def test_parameters_are_checked_when_fitted(options: dict[str, Any], text: str) -> None:
    model = KMeans(**{"n_clusters": 2} | options)
    for fit in (model.fit, model.partial_fit):
        with pytest.raises(ConfigError) as caught:
            fit(points(9, 2))
        assert text in str(caught.value)


HOLE = np.ones((4, 2))
HOLE[2, 1] = np.nan


@pytest.mark.parametrize(
    ("given", "weights", "text"),
    [
        (np.ones(4), None, "Expected 2D array, got 1D array"),
        (np.ones((4, 0)), None, "0 feature(s) (shape=(4, 0))"),
        (np.ones((0, 2)), None, "0 sample(s) (shape=(0, 2))"),
        (np.ones((1, 2)), None, "n_samples=1 should be >= n_clusters=2"),
        (np.ones((4, 2)) * 1j, None, "Complex data not supported"),
        (torch.ones(4, 2) * 1j, None, "Complex data not supported"),
        (torch.ones(4, 2).to_sparse(), None, "Sparse data was passed"),
        ([[1, 2], [3]], None, "X: cannot be made an array"),
        (np.array([["a", "b"]] * 4), None, "dtype='numeric' is needed"),
        (HOLE, None, "X: contains NaN (first in row 2)"),
        (torch.tensor([[1.0], [torch.inf]]), None, "X: contains infinity (first in row 1)"),
        (np.ones((4, 2)), np.ones(3), "sample_weight.shape == (3,), expected (4,)"),
        (np.ones((4, 2)), np.ones((4, 1)), "must be 1D array or scalar"),
        (np.ones((4, 2)), [1, -2, 1, 1], "sample_weight: found -2.0, allowed are 0 and more"),
        (np.ones((4, 2)), [1, np.inf, 1, 1], "sample_weight: contains infinity (first in row 1)"),
        (np.ones((4, 2)), np.zeros(4), "sample_weight: all weights are zero"),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_clustered_are_refused(given: Any, weights: Any, text: str) -> None:
    with pytest.raises(DataError) as caught:
        KMeans(2).fit(given, sample_weight=weights)
    assert text in str(caught.value)


def test_a_model_has_to_be_fitted_and_samples_to_fit_it() -> None:
    with pytest.raises(NotFittedError, match="This KMeans instance is not fitted yet"):
        KMeans(2).predict(points(9, 2))
    assert issubclass(NotFittedError, LowtideError)
    model = KMeans(2, random_state=0).fit(points(9, 2))
    with pytest.raises(ValueError, match="X has 3 features, but KMeans is expecting 2"):
        model.predict(points(9, 3))
    with pytest.raises(DataError, match=r"0 sample\(s\)"):
        model.predict(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="X has 3 features, but KMeans is expecting 2"):
        model.partial_fit(points(9, 3))


def test_a_model_is_made_of_centroids() -> None:
    samples = points(300, 3, dtype=np.float32)
    fitted = KMeans(4, random_state=0).fit(samples)
    model = KMeans.from_centroids(fitted.cluster_centers_, fault_tolerance="correct")
    assert (model.n_clusters, model.n_features_in_) == (4, 3)
    assert model.cluster_centers_ is not fitted.cluster_centers_
    np.testing.assert_array_equal(model.predict(samples), fitted.labels_)
    with pytest.raises(ValueError, match="X has 2 features"):
        model.predict(samples[:, :2])
    with pytest.raises(DataError, match="X: contains NaN"):
        KMeans.from_centroids(HOLE)


def test_batches_go_on_after_a_fit() -> None:
    samples = points(300, 3)
    model = KMeans(4, random_state=0).fit(samples)
    before = model.cluster_centers_.copy()
    model.partial_fit(samples[:5])
    assert model.n_steps_ == 1
    assert len(model.labels_) == 5
    assert not np.array_equal(model.cluster_centers_, before)


def test_every_backend_that_is_there_ends_alike() -> None:
    samples = points(600, 7, dtype=np.float32)
    start = chosen(samples, 8)
    names = {"torch", "reference", choose("auto", samples).name}
    fits = [KMeans(8, init=start, backend=name).fit(samples) for name in sorted(names)]
    for each in fits[1:]:
        np.testing.assert_array_equal(each.labels_, fits[0].labels_)
        np.testing.assert_allclose(each.cluster_centers_, fits[0].cluster_centers_, rtol=1e-6)
        assert each.inertia_ == pytest.approx(fits[0].inertia_, rel=1e-6)
