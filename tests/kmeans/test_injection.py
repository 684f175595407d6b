"""Silent errors put into the native kernels: what is seen, what is put right, what is left."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest

from lowtide.core.errors import ConfigError
from lowtide.kmeans.backend import Assignment
from lowtide.kmeans.injection import Injector, Site
from lowtide.kmeans.native import NativeBackend
from lowtide.kmeans.protection import Mode, Protection
from tests.kmeans.native_data import DTYPES, LEVELS, case, needs_native, same_bits

SITES = get_args(Site)
ON = tuple(mode for mode in get_args(Mode) if mode != "off")
SHAPES = ((4000, 12, 20), (2000, 40, 150), (500, 300, 30))


def run(
    shape: tuple[int, int, int], dtype: Any, mode: Any = "off", injector: Injector | None = None,
    **options: Any,
) -> Assignment:  # fmt: skip
    samples, centroids = case("blobs", shape, dtype)
    prepared = NativeBackend(injector=injector, **options).prepare(samples)
    return prepared.assign(centroids, Protection(mode))


def rate_of(site: str, shape: tuple[int, int, int]) -> float:
    """Enough that some are large, few enough that most meet a check of their own."""
    return {"norm": 3, "sum": 12, "count": 12}.get(site, shape[0] / 8)


@needs_native
@pytest.mark.parametrize("mode", ["correct", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", SITES)
def test_what_was_put_right_is_the_clean_result(site: Any, dtype: Any, mode: Any) -> None:
    for level, shape in itertools.product(LEVELS, SHAPES):
        clean = run(shape, dtype, level=level)
        seen = 0
        for seed in range(3):
            injector = Injector(site, rate=rate_of(site, shape), seed=seed)
            found = run(shape, dtype, mode, injector, level=level)
            report = found.report
            assert report.injected == len(injector.log) > 0
            assert report.detected == report.corrected + report.recomputed
            assert report.uncorrected == 0
            assert found.labels.tobytes() == clean.labels.tobytes()
            small = [flip for flip in injector.log if not changes_much(flip.before, flip.after)]
            if site not in ("sum", "count") or not small:
                assert same_bits(found, clean)
            else:  # below the threshold of a sum nothing is seen, and little is changed
                np.testing.assert_allclose(found.sums, clean.sums, rtol=1e-10, atol=1e-9)
                np.testing.assert_allclose(found.counts, clean.counts, rtol=1e-12)
            seen += report.detected
        assert seen > 0


def changes_much(before: float, after: float) -> bool:
    with np.errstate(all="ignore"):
        return not abs(after - before) <= 1e-10 * abs(before)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["acc", "argmin", "sum", "count"])
def test_without_protection_errors_do_harm(site: Any, dtype: Any) -> None:
    shape = SHAPES[0]
    clean = run(shape, dtype)
    injector = Injector(site, rate=rate_of(site, shape))
    found = run(shape, dtype, "off", injector)
    assert not same_bits(found, clean)
    assert found.report.injected == len(injector.log)
    assert (found.report.checks, found.report.detected) == (0, 0)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", SITES)
def test_detect_counts_and_says_what_remains(site: Any, dtype: Any) -> None:
    shape = SHAPES[0]
    injector = Injector(site, rate=rate_of(site, shape))
    report = run(shape, dtype, "detect", injector).report
    assert 0 < report.detected == report.uncorrected
    assert (report.corrected, report.recomputed) == (0, 0)


@needs_native
@pytest.mark.parametrize("site", SITES)
def test_choices_follow_from_the_seed_alone(site: Any) -> None:
    shape = (5000, 12, 200)
    logs = []
    for threads, level in itertools.product((1, 3), LEVELS):
        injector = Injector(site, rate=20.5, seed=5)
        samples, centroids = case("normal", shape, np.float32)
        prepared = NativeBackend(threads, level, injector).prepare(samples)
        for _ in range(3):
            prepared.assign(centroids, Protection("correct"))
        logs.append([(each.call, each.site, each.row, each.column, each.bit)
                     for each in injector.log])  # fmt: skip
    assert all(log == logs[0] for log in logs)
    calls = [each[0] for each in logs[0]]
    assert {calls.count(call) for call in range(3)} <= {20, 21}
    other = Injector(site, rate=20.5, seed=6)
    assert other.plan(5000, centroids) != Injector(site, rate=20.5, seed=5).plan(5000, centroids)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_flips_change_one_bit(dtype: Any) -> None:
    for site in SITES:
        injector = Injector(site, rate=rate_of(site, SHAPES[0]))
        run(SHAPES[0], dtype, "correct", injector)
        kind = np.float64 if site in ("sum", "count") else dtype
        word = {np.float32: np.uint32, np.float64: np.uint64}[kind]
        for flip in injector.log:
            if flip.site == "index" or not np.isfinite([flip.before, flip.after]).all():
                continue  # an index is no number; passing a NaN on may change it
            bits = [int(np.array(value, kind).view(word)) for value in (flip.before, flip.after)]
            assert bits[0] ^ bits[1] == 1 << flip.bit


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["acc", "checksum", "argmin"])
def test_every_high_bit_is_seen(site: Any, dtype: Any) -> None:
    """From the middle of the mantissa up, sign and exponent too: a row that is wrong is found."""
    shape = (2000, 16, 24)
    clean = run(shape, dtype)
    first, last = (16, 31) if dtype is np.float32 else (40, 63)
    for bit in range(first, last + 1):
        injector = Injector(site, bit=bit, rate=250, seed=bit)
        found = run(shape, dtype, "correct", injector)
        assert found.labels.tobytes() == clean.labels.tobytes()
        if site != "argmin":  # a minimum that a later centroid replaces is nobody's error
            assert found.report.detected >= 0.97 * len(injector.log), bit


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_error_changes_a_label_unseen(dtype: Any) -> None:
    flips, changed_without = 0, 0
    for site, shape in itertools.product(("acc", "checksum", "argmin"), SHAPES):
        samples, centroids = case("normal", shape, dtype)
        clean = NativeBackend().prepare(samples).assign(centroids, distances=False)
        protected = NativeBackend(injector=Injector(site, rate=shape[0] / 4)).prepare(samples)
        bare = NativeBackend(injector=Injector(site, rate=shape[0] / 4)).prepare(samples)
        for _ in range(10):
            found = protected.assign(centroids, Protection("correct"), distances=False)
            assert found.labels.tobytes() == clean.labels.tobytes()
            flips += found.report.injected
            unprotected = bare.assign(centroids, distances=False)
            changed_without += int((unprotected.labels != clean.labels).sum())
    assert flips > 40_000
    assert changed_without > 1000


@needs_native
def test_many_errors_in_one_row_are_put_right() -> None:
    samples, centroids = case("blobs", (40, 12, 20), np.float32)
    clean = NativeBackend().prepare(samples).assign(centroids)
    injector = Injector("acc", bit=30, rate=400)  # ten to a row
    prepared = NativeBackend(injector=injector).prepare(samples)
    assert same_bits(prepared.assign(centroids, Protection("correct")), clean)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'"accc" is unknown. Did you mean "acc"'):
        Injector("accc")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="bit 64"):
        Injector("acc", bit=64)
    with pytest.raises(ConfigError, match="rate -1"):
        Injector("acc", rate=-1)
