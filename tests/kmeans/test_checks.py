"""The native checks are those that checks.py states, and sound passes raise no alarm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowtide.kmeans import checks
from lowtide.kmeans.injection import Injector
from lowtide.kmeans.native import NativeBackend
from lowtide.kmeans.protection import Protection
from tests.kmeans.native_data import DTYPES, KINDS, LEVELS, MODULE, case, needs_native

SHAPES = ((3000, 8, 8), (1000, 40, 300), (700, 600, 20), (2000, 1, 3), (100, 3, 1))


@needs_native
def test_constants_are_those_of_the_native_code() -> None:
    assert MODULE.group_centroids == checks.GROUP_CENTROIDS
    assert MODULE.feature_block == checks.FEATURE_BLOCK


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 257, 1000, 5000])
def test_groups_cover_all_centroids_once(count: int) -> None:
    made = checks.groups(count)
    covered = np.concatenate([np.arange(count)[group] for group in made])
    np.testing.assert_array_equal(covered, np.arange(count))
    assert max(group.stop - group.start for group in made) <= checks.GROUP_CENTROIDS


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_hold_up_to_the_encodings_rounding(kind: str) -> None:
    samples, centroids = case(kind, (200, 9, 150), np.float32)
    origin = np.median(samples, axis=0)
    x, c = (checks.framed(each, origin, 1.0) for each in (samples, centroids))
    # Computed in float64 what remains is the rounding of the column to float32: of a sum of T
    # terms, which is at most sqrt(T) times the norm of its terms.
    most = checks.thresholds(x, c, np.sqrt(checks.GROUP_CENTROIDS))
    residuals = checks.residuals(x, c)
    assert (residuals <= most).all()
    assert kind in ("ties", "integers", "constant") or residuals.any()


@needs_native
@pytest.mark.parametrize("mode", ["detect", "correct"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_sound_passes_raise_no_alarm(kind: str, dtype: Any, mode: Any) -> None:
    for level in LEVELS:
        for shape in SHAPES:
            samples, centroids = case(kind, shape, dtype)
            found = NativeBackend(level=level).prepare(samples)
            report = found.assign(centroids, Protection(mode), distances=False).report
            assert report.checks >= len(samples) * 2
            assert (report.detected, report.corrected, report.recomputed) == (0, 0, 0)
            assert report.uncorrected == 0
            # So far that nothing was hidden by a threshold that the data raised.
            tight = found.assign(centroids, Protection(mode, kappa=0.01), distances=False).report
            assert tight.detected == 0
            assert kind != "normal" or shape[2] < 8 or tight.max_residual > 1


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4000, 8, 8), (4000, 33, 260), (1500, 300, 30)], ids=str)
def test_native_thresholds_are_the_stated_ones(shape: tuple[int, int, int], dtype: Any) -> None:
    samples, centroids = case("normal", shape, dtype)
    kappa = checks.kappa_for(shape[1])
    for level in LEVELS:
        clean = NativeBackend(level=level).prepare(samples)
        rounding = clean.assign(centroids, Protection("detect")).report.max_residual
        assert rounding < 0.8
        frame: Any = clean._made  # type: ignore[attr-defined]
        x, c = (checks.framed(each, frame.origin, frame.scale) for each in (samples, centroids))
        thresholds = checks.thresholds(x, c, kappa)
        in_group = np.concatenate(
            [np.full(each.stop - each.start, i) for i, each in enumerate(checks.groups(len(c)))]
        )
        least, most, near = 0, 0, 0
        injector = Injector("acc", rate=800)
        prepared = NativeBackend(level=level, injector=injector).prepare(samples)
        report = prepared.assign(centroids, Protection("detect")).report
        assert len(injector.log) == 800
        for flip in injector.log:
            with np.errstate(over="ignore", invalid="ignore"):
                delta = abs(flip.after - flip.before) / thresholds[flip.row, in_group[flip.column]]
            # An infinity or a number that is none is an error whatever the threshold.
            least += bool(not delta <= 1 + rounding + 1e-3)
            most += bool(not delta <= 1 - rounding - 1e-3)
            near += bool(0.01 < delta < 100)
        assert near > 20  # the threshold lies among them
        assert least <= report.detected <= most
        assert most - least < 0.15 * 800


def test_calibration_is_kept_as_measured() -> None:
    for each in checks.CALIBRATIONS:
        assert each.kappa >= 1.4 * each.ordinary
        assert each.checks >= 1e6
    assert [each.features for each in checks.CALIBRATIONS] == sorted(
        each.features for each in checks.CALIBRATIONS
    )
    assert checks.kappa_for(16) == checks.CALIBRATIONS[0].kappa
    assert checks.kappa_for(17) == checks.CALIBRATIONS[1].kappa
    assert checks.kappa_for(10**6) == checks.CALIBRATIONS[-1].kappa
