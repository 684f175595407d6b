"""Heads, scales, intervals: what stage 2 is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowtide.quality.predictors import Interval
from lowtide.quality.surrogate import intervals, outputs
from lowtide.quality.surrogate.features import NAMES
from lowtide.quality.surrogate.networks import DENSE, EXPERTS, Shape, trained
from lowtide.quality.surrogate.probe import NAMES as PROBED
from lowtide.quality.surrogate.stage import GATES


def rows(count: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6))
    gates = np.sign(x[:, :2])
    bent = np.where(x[:, 0] > 0, x[:, 1], -x[:, 1])  # two regimes
    return x, gates, np.stack([3 * x[:, 2] + 5, 0.2 * bent], axis=1)


@pytest.mark.parametrize("shape", [Shape(2, 1, 16, 1200), Shape(2, 3, 8, 1200)])
def test_heads_learn_lines_and_regimes(shape: Shape) -> None:
    x, gates, targets = rows()
    head = trained(x, gates, targets, shape, seed=0)
    x, gates, targets = rows(seed=1)
    errors = head.predict(x, gates) - targets
    assert np.abs(errors).mean(axis=0) == pytest.approx([0, 0], abs=0.2)
    assert np.abs(errors[:, 1]).mean() < 0.3 * np.abs(targets[:, 1]).mean()


def test_heads_are_the_same_when_trained_again() -> None:
    x, gates, targets = rows()
    shape = Shape(2, 2, 8, 30)
    one, other, third = (trained(x, gates, targets, shape, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(one.predict(x, gates), other.predict(x, gates))
    assert not np.array_equal(one.predict(x, gates), third.predict(x, gates))


def test_missing_labels_are_left_out_and_not_zero() -> None:
    x, gates, targets = rows()
    holed = targets.copy()
    holed[::2, 0] = np.nan
    found = trained(x, gates, holed, Shape(1, 1, 8, 400), seed=0).predict(x, gates)
    assert np.abs(found[:, 0] - targets[:, 0]).mean() < 0.3
    holed[:, 1] = np.nan
    assert np.isfinite(trained(x, gates, holed, Shape(1, 1, 8, 5), seed=0).predict(x, gates)).all()


def test_no_expert_idles_and_the_gate_decides() -> None:
    x, gates, targets = rows()
    head = trained(x, gates, targets, Shape(2, 4, 8, 300), seed=0)
    used = head.utilisation(gates)
    assert sum(used) == pytest.approx(1.0)
    assert used[0] < 0.7
    assert used[-1] > 0.02
    assert np.abs(head.predict(x, gates) - head.predict(x, -gates)).max() > 1e-3
    assert trained(x, gates, targets, Shape(1, 1, 8, 2), seed=0).utilisation(gates) == [1.0]


def test_experts_have_as_many_parameters_as_the_dense_head() -> None:
    counts = [each.parameters(len(NAMES), GATES, len(outputs.METRICS)) for each in (DENSE, EXPERTS)]
    assert counts[1] == pytest.approx(counts[0], rel=0.03)
    x, gates, targets = rows()
    for shape in (Shape(2, 1, 8, 1), Shape(2, 3, 8, 1)):
        arrays = trained(x, gates, targets, shape, seed=0).arrays
        learned = sum(
            value.size for name, value in arrays.items()
            if not name.startswith("target") and (shape.experts > 1 or "gate" not in name)
        )  # fmt: skip
        assert shape.parameters(6, 2, 2) == learned


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("compression_ratio", 12.5), ("psnr_db", 61.0), ("dssim", 3e-5), ("ssim", 0.999),
        ("error_autocorr", -0.4), ("spectral_error", 0.02),
    ],
)  # fmt: skip
def test_scales_go_back_and_forth(metric: str, value: float) -> None:
    place = outputs.to_scale(metric, value)
    found = outputs.from_scale(metric, place, 0.1)
    assert found.value == pytest.approx(value)
    assert found.lower < value < found.upper
    assert outputs.from_scale(metric, place, 0.0).lower == pytest.approx(value)


@pytest.mark.parametrize(
    ("metric", "value"), [("psnr_db", math.inf), ("dssim", 0.0), ("psnr_db", None)]
)
def test_what_has_no_place_on_a_scale_is_no_label(metric: str, value: float | None) -> None:
    assert math.isnan(outputs.to_scale(metric, value))


def test_ratios_are_not_below_one() -> None:
    found = outputs.from_scale("compression_ratio", -0.2, 0.1)
    assert found.value == found.lower == 1.0


def test_what_follows_is_derived_with_its_interval() -> None:
    given = {
        "compression_ratio": Interval(8.0, 4.0, 16.0), "psnr_db": Interval(40.0, 20.0, 60.0),
        "dssim": Interval(0.01, 0.001, 0.1),
    }  # fmt: skip
    found = outputs.with_derived(given, relative=1e-2, value_range=5.0, item_bits=32)
    assert found["bit_rate"] == pytest.approx((4.0, 2.0, 8.0))
    assert found["nrmse"] == pytest.approx((1e-2, 1e-3, 1e-1))
    assert found["rmse"] == pytest.approx((5e-2, 5e-3, 5e-1))
    assert found["mse"] == pytest.approx((25e-4, 25e-6, 25e-2))
    assert found["ssim"] == pytest.approx((0.99, 0.9, 0.999))
    assert found["max_abs_error"] == pytest.approx((5e-2, 0.0, 5e-2))


def test_probe_gives_the_first_guess() -> None:
    row = np.zeros((1, len(PROBED)))
    row[0, PROBED.index("interpolation_bits")] = 2.0  # 4 bits
    row[0, PROBED.index("interpolation_mse")] = -6.0
    assert 10 ** outputs.probed_at("compression_ratio", row, 32)[0] == pytest.approx(8.0)
    assert outputs.from_scale("psnr_db", outputs.probed_at("psnr_db", row, 32)[0], 0).value == 60
    assert outputs.probed_at("spectral_error", row, 32)[0] == 0.0


def test_intervals_hold_what_they_promise_on_exchangeable_data() -> None:
    rng = np.random.default_rng(0)

    def errors(count: int) -> tuple[np.ndarray, np.ndarray]:
        decades = rng.uniform(-5, -1, count)
        return rng.normal(size=(count, 1)) * 10 ** (decades[:, None] / 2), decades

    residuals, decades = errors(2000)
    calibration = intervals.calibrated(residuals, decades)
    later, places = errors(4000)
    for confidence in (0.5, 0.9):
        widths = calibration.half_widths(places, confidence)
        inside = np.abs(later) <= widths
        assert inside.mean() == pytest.approx(confidence, abs=0.03)
        # Not only on average: also where errors are a hundred times as large.
        assert inside[places > -2].mean() == pytest.approx(confidence, abs=0.08)
        assert inside[places < -4].mean() == pytest.approx(confidence, abs=0.08)


def test_intervals_are_infinite_when_calibration_is_too_small() -> None:
    few = intervals.calibrated(np.ones((5, 1)), np.full(5, -2.0))
    assert few.half_widths(np.array([-2.0]), 0.9)[0, 0] == math.inf
    assert few.half_widths(np.array([-2.0]), 0.5)[0, 0] < math.inf
    none = intervals.calibrated(np.full((5, 1), np.nan), np.full(5, -2.0))
    assert none.half_widths(np.array([-2.0]), 0.5)[0, 0] == math.inf


def test_arrays_are_familiar_when_near_those_that_were_learned() -> None:
    rng = np.random.default_rng(0)
    early, late = rng.normal(size=(50, 8)), rng.normal(size=(20, 8))
    known = intervals.familiar(early, late)
    assert all(known.knows(each) for each in late)
    assert not known.knows(np.full(8, 10.0))
    assert known.distance(early[0]) == pytest.approx(0.0, abs=1e-6)
