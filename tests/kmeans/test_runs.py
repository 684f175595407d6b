"""Several runs, and fits that are stopped and go on from a file with the same bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.core.errors import ConfigError, DataError
from lowtide.kmeans import KMeans, runs
from tests.kmeans.points import chosen, points


class StoppedError(Exception):
    """As if the process had been killed."""


@pytest.fixture(autouse=True)
def _written_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "EVERY_S", 0.0)


def stopped(model: KMeans, samples: Any, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit until so many iterations are written, and lose everything but the file."""
    written: list[int] = []
    right = runs._File.write

    def write(self: Any, position: Any) -> None:
        right(self, position)
        written.append(1)
        if len(written) == iterations:
            raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):  # noqa: PT012
        patch.setattr(runs._File, "write", write)
        model.fit(samples)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("iterations", [1, 4, 14, 27])
def test_a_fit_goes_on_with_the_same_bits(
    iterations: int, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = points(600, 4, 1, dtype=dtype)
    options: dict[str, Any] = {"init": "random", "n_init": 3, "random_state": 1, "tol": 0}
    whole = KMeans(9, **options).fit(samples)
    path = tmp_path / "fit.npy"
    stopped(KMeans(9, **options, checkpoint=path), samples, iterations, monkeypatch)
    assert path.stat().st_size < 10_000
    again = KMeans(9, **options, checkpoint=path).fit(samples)
    np.testing.assert_array_equal(again.cluster_centers_, whole.cluster_centers_)
    np.testing.assert_array_equal(again.labels_, whole.labels_)
    assert (again.inertia_, again.n_iter_) == (whole.inertia_, whole.n_iter_)
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_left_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = points(600, 4, 1)
    path = tmp_path / "fit.npy"
    model = KMeans(9, random_state=1, tol=0, checkpoint=path)
    stopped(model, samples, 5, monkeypatch)
    caplog.set_level(logging.INFO, logger="lowtide")
    model.set_params(verbose=1).fit(samples)
    assert caplog.records[0].getMessage().startswith("run 0, iteration 4: ")


def test_a_file_of_another_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = points(300, 4, 1)
    path = tmp_path / "fit.npy"
    stopped(KMeans(9, random_state=1, checkpoint=path), samples, 2, monkeypatch)
    for other, options in (
        (samples + 1e-9, {}), (samples.astype(np.float32), {}), (samples, {"n_clusters": 8}),
        (samples, {"max_iter": 20}), (samples, {"tol": 1e-3}), (samples, {"init": "random"}),
    ):  # fmt: skip
        model = KMeans(**{"n_clusters": 9, "random_state": 1, "checkpoint": path} | options)
        with pytest.raises(DataError, match="is of other samples or of a fit with other param"):
            model.fit(other)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"fit.npy cannot be read .*remove it"):
        KMeans(9, checkpoint=path).fit(samples)


def test_a_fit_does_not_end_because_the_file_cannot_be_written(tmp_path: Path) -> None:
    samples = points(300, 4, 1)
    model = KMeans(9, random_state=1, tol=0, checkpoint=tmp_path / "no" / "fit.npy")
    with pytest.warns(RuntimeWarning, match="cannot be written.*goes on without"):
        model.fit(samples)
    assert model.inertia_ == KMeans(9, random_state=1, tol=0).fit(samples).inertia_


def test_a_generator_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    generator = np.random.RandomState(np.random.PCG64(1))
    model = KMeans(9, random_state=generator, tol=0, checkpoint=tmp_path / "fit.npy")
    with pytest.raises(ConfigError, match="a RandomState over PCG64 cannot be kept"):
        model.fit(points(300, 4, 1))


def test_the_file_is_not_written_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "EVERY_S", 3600.0)
    written: list[int] = []
    monkeypatch.setattr(runs.os, "replace", lambda *paths: written.append(1))
    samples = points(300, 4, 1)
    KMeans(9, init=chosen(samples, 9), tol=0, checkpoint=tmp_path / "fit.npy").fit(samples)
    assert not written
