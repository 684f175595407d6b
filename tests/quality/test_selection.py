"""`select`: the target is met as measured, near the best there is, with few measurements."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.core.errors import ConfigError
from lowtide.quality import Candidate, Estimate, measure, select
from lowtide.quality.candidates import Family
from lowtide.quality.predictors import (
    BlockSampling,
    ClosedForm,
    Interval,
    Persistence,
    interpolated,
)
from lowtide.quality.search import Goal, Trials, search
from lowtide.quality.targets import targets_of
from tests.quality.arrays import smooth

FIELD = smooth(48, 64).astype(np.float32)
OPEN = [{"codec": "lowtide.sz", "mode": "rel"}]


def exhaustive(x: Any, targets: dict[str, float], family: Family) -> float:
    """Return the best ratio of all candidates of a family that meet the targets."""
    best = 1.0
    for candidate in family.grid(float(np.ptp(x))):
        report = measure(x, candidate, list(targets))
        if all(target.is_met(report.value(target.metric)) for target in targets_of(targets)):
            best = max(best, report.ratio or 1.0)
    return best


@pytest.mark.parametrize(
    "targets", [{"psnr_db": 60}, {"ssim": 0.999}, {"max_abs_error": 1e-3}, {"gradient_error": 0.05}]
)
def test_the_search_finds_the_best_of_the_grid_by_few_measurements(
    targets: dict[str, float],
) -> None:
    found = select(FIELD, targets, OPEN)
    assert found.measured is not None
    for target in found.targets:
        assert target.is_met(found.measured.value(target.metric))
    assert found.decision == "searched"
    assert found.measurements <= 8
    oracle = exhaustive(FIELD, targets, Family("lowtide.sz", {}, "rel"))
    assert found.ratio >= 0.98 * oracle


def test_the_same_call_gives_the_same_choice() -> None:
    one, other = (select(FIELD, {"psnr_db": 50}) for _ in range(2))
    assert one.candidate == other.candidate
    assert (one.ratio, one.measurements) == (other.ratio, other.measurements)


def test_families_that_cannot_win_are_left_early() -> None:
    both = select(FIELD, {"psnr_db": 55}, [*OPEN, {"codec": "lowtide.sz", "mode": "abs"}])
    one = select(FIELD, {"psnr_db": 55}, OPEN)
    assert both.measurements <= one.measurements + 2
    assert both.ratio >= one.ratio


def test_listed_bounds_are_the_only_ones() -> None:
    bounds = [10 ** -(k / 2) for k in range(2, 13)]
    found = select(FIELD, {"psnr_db": 60}, [{"codec": "lowtide.sz", "mode": "rel",
                                             "bounds": bounds}])  # fmt: skip
    assert found.candidate is not None
    assert found.candidate.bound == 1e-3
    assert found.measurements <= 3
    assert found.measured.evaluation["psnr_db"] >= 60


def test_the_best_quality_at_a_size() -> None:
    found = select(FIELD, {"compression_ratio": 15}, OPEN, objective="psnr_db")
    assert found.ratio >= 15
    grid = Family("lowtide.sz", {}, "rel").grid(1.0)
    best = max(
        report.evaluation["psnr_db"] for report in (measure(FIELD, c, ["psnr_db"]) for c in grid)
         if report.ratio >= 15
    )  # fmt: skip
    assert found.measured.evaluation["psnr_db"] >= best - 0.5
    assert found.measurements <= 10


def test_all_targets_count_and_an_impossible_size_stores_the_array_as_it_is() -> None:
    found = select(FIELD, {"psnr_db": 60, "max_rel_error": 1e-4}, OPEN)
    assert found.measured.evaluation["max_rel_error"] <= 1e-4
    none = select(FIELD, {"psnr_db": 80, "compression_ratio": 1000})
    assert (none.decision, none.candidate, none.ratio) == ("uncompressed", None, 1.0)
    assert "no candidate meets psnr_db >= 80, compression_ratio >= 1000" in none.fallback_reason
    assert select(FIELD, {"psnr_db": 500}, OPEN).decision == "uncompressed"
    assert select(FIELD, {"psnr_db": 500}).candidate == Candidate("lowtide.zstd")


@pytest.mark.parametrize(
    ("x", "decision", "reason"),
    [
        (np.zeros((0, 5), np.float32), "uncompressed", "empty"),
        (np.full(5000, 2.5), "exact", "all values are equal"),
        (np.arange(5000), "exact", "int64 is not floating-point"),
        (np.full(5000, np.nan), "exact", "no value is finite"),
        (np.random.default_rng(0).integers(0, 255, 5000, np.uint8), "uncompressed", "uint8"),
        (np.where(np.arange(3072) % 50, FIELD.ravel(), np.nan), "searched", "NaN"),
        (FIELD[:10], "searched", "measured sooner"),
    ],
    ids=["empty", "constant", "integers", "all NaN", "bytes", "some NaN", "small"],
)
def test_some_arrays_are_not_predicted(x: Any, decision: str, reason: str) -> None:
    found = select(x, {"psnr_db": 60}, predictor=Known({}))
    assert found.decision == decision
    assert reason in (found.fallback_reason or "")
    json.dumps(found.as_dict(), allow_nan=False)
    if decision == "exact":
        assert found.measured.evaluation.is_exact


class Known:
    """A predictor that says what it is told: bound -> PSNR, or a function of it."""

    name = "known"

    def __init__(self, psnr: Any, ratio: Any = None, *, is_familiar: bool = True) -> None:
        self._psnr, self._ratio, self._is_familiar = psnr, ratio, is_familiar
        self.heard: list[Any] = []

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        found = []
        for candidate in candidates:
            metrics = {}
            if callable(self._psnr) and candidate.bound:
                value, width = self._psnr(candidate.bound)
                metrics["psnr_db"] = Interval(value, value - width, value + width)
                if self._ratio is not None:
                    ratio = self._ratio(candidate.bound)
                    metrics["compression_ratio"] = Interval(ratio, ratio, ratio)
            found.append(Estimate(candidate, metrics, self.name, self._is_familiar))
        return found

    def observe(self, report: Any) -> None:
        self.heard.append(report)


def uniform(offset: float = 0.0, width: float = 0.0) -> Any:
    return lambda bound: (-20 * math.log10(bound) + 10 * math.log10(3) + offset, width)


def test_a_good_prediction_takes_one_measurement() -> None:
    predictor = Known(uniform())
    found = select(FIELD, {"psnr_db": 60}, OPEN, predictor=predictor)
    assert (found.decision, found.measurements, found.fallback_reason) == ("predicted", 1, None)
    assert found.measured.evaluation["psnr_db"] >= 60
    assert found.estimate.metrics["psnr_db"].value == pytest.approx(60, abs=0.42)
    assert found.estimate.metrics["psnr_db"].value >= 60
    assert [report.candidate for report in predictor.heard] == [found.candidate]


def test_the_lower_end_of_the_interval_decides() -> None:
    sure = select(FIELD, {"psnr_db": 60}, OPEN, predictor=Known(uniform()))
    unsure = select(FIELD, {"psnr_db": 60}, OPEN, predictor=Known(uniform(width=6.0)))
    assert unsure.candidate.bound < sure.candidate.bound / 1.8


def test_a_bad_prediction_is_put_right_by_measuring() -> None:
    found = select(FIELD, {"psnr_db": 60}, OPEN, predictor=Known(uniform(offset=20)))
    assert found.decision == "tightened"
    assert 2 <= found.measurements <= 4
    assert found.measured.evaluation["psnr_db"] >= 60
    assert found.estimate is None
    hopeless = Known(lambda bound: (100.0, 0.0), lambda bound: bound)
    searched = select(FIELD, {"psnr_db": 60}, OPEN, predictor=hopeless, max_tightenings=0)
    assert searched.decision == "searched"
    assert "missed a target" in searched.fallback_reason
    assert searched.measured.evaluation["psnr_db"] >= 60


def test_the_cheapest_predicted_is_taken() -> None:
    wrong_way = Known(uniform(), ratio=lambda bound: 1e-9 / bound)
    found = select(FIELD, {"psnr_db": 60}, OPEN, predictor=wrong_way)
    assert found.candidate.bound == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("predictor", "reason"),
    [
        (Known(uniform(), is_familiar=False), "unlike those it knows"),
        (Known({}), "known predicts no psnr_db here"),
        (Known(uniform(offset=-500)), "nothing is predicted to meet"),
    ],
)
def test_a_prediction_of_no_use_falls_back_to_measuring(predictor: Known, reason: str) -> None:
    found = select(FIELD, {"psnr_db": 60}, OPEN, predictor=predictor)
    assert found.decision == "searched"
    assert reason in found.fallback_reason
    assert found.candidate == select(FIELD, {"psnr_db": 60}, OPEN).candidate
    assert len(predictor.heard) == found.measurements


def test_a_codec_that_breaks_its_bound_is_never_chosen() -> None:
    goal = Goal(targets_of({"psnr_db": 1}))
    trials = Trials(_data(FIELD), goal)
    trial = trials.run(Candidate("lowtide.sz", {}, "rel", 1e-2))
    broken = trials._judged(trial.report.__class__(**{**vars(trial.report),
                                                      "is_within_bound": False}))  # fmt: skip
    assert (trial.is_met, broken.is_met) == (True, False)


def _data(x: Any) -> Any:
    from lowtide.quality.measurement import host_array

    return host_array(x)


def test_measurements_are_made_once() -> None:
    heard: list[Any] = []
    trials = Trials(_data(FIELD), Goal(targets_of({"psnr_db": 60})), heard.append)
    grid = Family("lowtide.sz", {}, "rel").grid(1.0)
    search(trials, grid, 1e-4)
    count = len(heard)
    assert count == len(trials.all()) > 1
    for trial in trials.all():
        assert trials.run(trial.report.candidate) is trial
    assert len(heard) == count


def test_a_family_that_gains_nothing_where_it_misses_is_left() -> None:
    trials = Trials(_data(FIELD), Goal(targets_of({"psnr_db": 60})))
    best = trials.run(Candidate("lowtide.sz", {}, "rel", 1.6e-3))
    assert best.is_met
    poor = Family("lowtide.sz", {"chunk_elements": 16}, "rel").grid(1.0)
    search(trials, poor, 1e-2)
    assert [trial.is_met for trial in trials.all()] == [True, False]
    alone = Trials(_data(FIELD), Goal(targets_of({"psnr_db": 60})))
    search(alone, poor, 1e-2)
    assert len(alone.all()) > 1


def test_a_miss_of_unknown_size_is_tightened_step_by_step() -> None:
    predictor = Known(uniform())
    select(FIELD, {"psnr_db": 60, "ssim": 1.0}, OPEN, predictor=predictor)
    bounds = [report.candidate.bound for report in predictor.heard[:4]]
    ratios = [after / before for before, after in itertools.pairwise(bounds)]
    assert ratios == pytest.approx([10 ** (-1 / 48)] * 3)


# -- predictors


def test_the_closed_form_is_right_where_errors_are_uniform() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (100, 100))
    for mode, bound in (("rel", 1e-3), ("abs", 1e-3 * float(np.ptp(x)))):
        candidate = Candidate("lowtide.sz", {"predictor": "differences"}, mode, bound)
        (estimate,) = ClosedForm().predict(x, [candidate])
        report = measure(x, candidate, list(estimate.metrics))
        for name, interval in estimate.metrics.items():
            assert interval.lower <= report.value(name) <= interval.upper, name
    nothing = ClosedForm().predict(x, [Candidate("lowtide.zstd")])
    assert nothing[0].metrics == {}


@pytest.mark.parametrize("shape", [(200, 300), (40, 50, 60), (40_000,), (4, 10, 60, 50)])
def test_blocks_stand_for_the_whole(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    candidate = Candidate("lowtide.sz", {}, "rel", 1e-3)
    (estimate,) = BlockSampling(0.25).predict(x, [candidate])
    report = measure(x, candidate, ["psnr_db"])
    assert estimate.metrics["psnr_db"].value == pytest.approx(report.value("psnr_db"), abs=0.3)
    assert estimate.metrics["compression_ratio"].value == pytest.approx(report.ratio, rel=0.1)


def test_bytes_that_any_stream_has_are_counted_once() -> None:
    x = np.zeros((200, 200), np.float32)
    x[0, 0] = 1.0
    candidate = Candidate("lowtide.sz", {}, "abs", 0.1)
    (estimate,) = BlockSampling(0.1).predict(x, [candidate])
    stored = x.nbytes / estimate.metrics["compression_ratio"].value
    least = len(candidate.build().encode(x[:1, :1]))
    # Counted for each share, they alone would be ten times as many.
    assert least <= stored <= 2 * measure(x, candidate, []).stream_bytes


def test_a_sample_is_as_large_as_asked_for_and_the_same_each_time() -> None:
    x = smooth(200, 200)
    sampling = BlockSampling(0.1)
    one, other = sampling.sample(_data(x)), sampling.sample(_data(x))
    assert np.array_equal(one.values, other.values)
    assert one.values.size == pytest.approx(4000, rel=0.3)
    assert set(one.values.ravel()) <= set(x.ravel())
    assert len(set(one.values.ravel())) > 0.8 * one.values.size
    bits = _data(torch.from_numpy(x).bfloat16())
    assert sampling.sample(bits).dtype == "bfloat16"


def test_persistence_repeats_and_interpolates_what_was_measured() -> None:
    last = Persistence()
    bounds = [1e-3, 1e-4]
    reports = [measure(FIELD, Candidate("lowtide.sz", {}, "rel", b), ["psnr_db"]) for b in bounds]
    assert last.predict(FIELD, [reports[0].candidate])[0].metrics == {}
    for report in reports:
        last.observe(report)
    asked = [Candidate("lowtide.sz", {}, "rel", b) for b in (1e-3, 10**-3.5, 1e-5)]
    exact, between, beyond = last.predict(FIELD, asked)
    assert exact.metrics["psnr_db"].value == reports[0].value("psnr_db")
    assert exact.metrics["compression_ratio"].value == pytest.approx(reports[0].ratio)
    middle = sum(report.value("psnr_db") for report in reports) / 2
    assert between.metrics["psnr_db"].value == pytest.approx(middle)
    # Beyond: 20 dB and log2(10) bits for each decade.
    assert beyond.metrics["psnr_db"].value == pytest.approx(reports[1].value("psnr_db") + 20)
    rate = reports[1].bit_rate + math.log2(10)
    assert beyond.metrics["bit_rate"].value == pytest.approx(rate)
    assert beyond.metrics["compression_ratio"].value == pytest.approx(32 / rate)
    assert last.predict(FIELD[1:], asked)[0].metrics == {}
    last.forget()
    assert last.predict(FIELD, asked)[0].metrics == {}


def test_persistence_saves_measurements_on_slow_series() -> None:
    last, counts = Persistence(), []
    for step in range(4):
        found = select(FIELD * (1 + 0.01 * step), {"ssim": 0.999}, OPEN, predictor=last)
        assert found.measured.evaluation["ssim"] >= 0.999
        counts.append(found.measurements)
    assert counts[0] > 1
    assert counts[1:] == [1, 1, 1]


def test_estimates_between_bounds_are_interpolated_in_decades() -> None:
    family = Family("lowtide.sz", {}, "rel")
    some, grid = family.coarse(1.0), family.grid(1.0)
    estimates = Known(uniform(width=1.0), lambda b: b**0.5).predict(FIELD, some)
    found = interpolated(estimates, grid, ("psnr_db", "compression_ratio"))
    assert len(found) >= len(grid) - 11
    for estimate in found:
        value, width = uniform(width=1.0)(estimate.candidate.bound)
        expected = (value, value - width, value + width)
        assert tuple(estimate.metrics["psnr_db"]) == pytest.approx(expected)
        ratio = estimate.metrics["compression_ratio"].value
        assert ratio == pytest.approx(estimate.candidate.bound**0.5)
    plain = [estimate.as_dict() for estimate in found]
    json.dumps(plain, allow_nan=False)


def test_objectives_and_targets_are_checked_first() -> None:
    with pytest.raises(ConfigError, match="unknown metric"):
        select(FIELD, {"psnr": 60})
    with pytest.raises(ConfigError, match="candidates: is empty"):
        select(FIELD, {"psnr_db": 60}, [])
