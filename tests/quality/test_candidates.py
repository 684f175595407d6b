"""Candidates, targets and goals: what users write, and what they are told."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from lowtide.core.errors import ConfigError
from lowtide.quality import Candidate, Target
from lowtide.quality.candidates import Family, automatic, families_of
from lowtide.quality.search import Goal, first_guess
from lowtide.quality.targets import targets_of


def test_lists_of_bounds_become_candidates_tightest_first() -> None:
    (family,) = families_of([{"codec": "lowtide.sz", "mode": "rel", "bounds": [1e-2, 1e-4, 1e-2]}])
    found = family.grid(5.0)
    assert [candidate.bound for candidate in found] == [1e-4, 1e-2]
    assert found[0].config() == {"id": "lowtide.sz", "mode": "rel", "bound": 1e-4}
    assert found[0].build().bound.value == 1e-4
    assert family.coarse(5.0) == found


def test_every_way_to_name_a_codec_is_understood() -> None:
    found = families_of(
        ["lowtide.zstd", {"codec": {"id": "lowtide.zstd", "level": 9}},
         {"codec": {"id": "lowtide.sz", "mode": "abs", "bound": 0.5}},
         Candidate("lowtide.sz", {}, "pw_rel", 0.01), Family("lowtide.sz", {}, "rel")]
    )  # fmt: skip
    assert [family.mode for family in found] == [None, None, "abs", "pw_rel", "rel"]
    assert found[1].grid(1.0)[0].build().get_config() == {"id": "lowtide.zstd", "level": 9}
    assert found[2].grid(9.0) == [Candidate("lowtide.sz", {}, "abs", 0.5)]
    assert str(found[3].grid(1.0)[0]) == "lowtide.sz pw_rel 0.01"
    assert Candidate.of("lowtide.zstd") == Candidate("lowtide.zstd")
    codec = found[2].grid(1.0)[0].build()
    assert Candidate.of(codec).build() == codec


def test_open_bounds_are_a_grid_of_the_range() -> None:
    family = Family("lowtide.sz", {}, "abs")
    ones, fives = family.grid(1.0), family.grid(5.0)
    ratios = {round(b.bound / a.bound, 9) for a, b in itertools.pairwise(ones)}
    assert ratios == {round(10 ** (1 / 48), 9)}
    assert fives[7].bound == pytest.approx(5 * ones[7].bound)
    assert 0.5 < ones[-1].bound < 0.52
    assert ones[0].bound == pytest.approx(1e-7)
    assert set(family.coarse(5.0)) < set(fives)
    relative = Family("lowtide.sz", {}, "rel")
    assert relative.grid(5.0) == relative.grid(1.0)


def test_equal_candidates_are_one() -> None:
    one = Candidate("lowtide.sz", {"level": 1, "goal": "size"}, "rel", 0.1)
    other = Candidate("lowtide.sz", {"goal": "size", "level": 1}, "rel", 0.1)
    assert len({one, other}) == 1
    assert one.family == Candidate("lowtide.sz", {"goal": "size", "level": 1}, "rel", 0.2).family


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ([], "candidates: is empty"),
        ("lowtide.sz", 'allowed are "auto" or a list'),
        ([{"codec": "lowtide.sq"}], r'candidates\[0\]: unknown codec.*Did you mean "lowtide.sz"'),
        (["lowtide.sz"], 'needs "mode"'),
        ([{"codec": "lowtide.sz", "mode": "relative"}], 'allowed are "abs", "pw_rel", "rel"'),
        ([{"codec": "lowtide.sz", "mod": "rel"}], r'\[0\].mod: unknown key. Did you mean "mode"'),
        ([{"codec": "lowtide.sz", "mode": "rel", "bounds": []}], r"\[0\].bounds: is empty"),
        ([{"codec": "lowtide.sz", "mode": "rel", "bounds": [0.1, 0]}], "got 0, allowed are posit"),
        ([{"codec": "lowtide.sz", "mode": "rel", "bounds": [math.inf]}], "got inf"),
        ([{"codec": "lowtide.sz", "bounds": [0.1]}], 'need "mode"'),
        ([{"codec": {"id": "lowtide.sz", "goal": "pnsr"}, "mode": "rel"}], 'mean "psnr"'),
        ([{"codec": 5}], r"\[0\].codec: got 5"),
        ([3], "got 3, allowed are names"),
    ],
)
def test_wrong_candidates_are_named(spec: Any, text: str) -> None:
    with pytest.raises((ConfigError, TypeError), match=text):
        families_of(spec)


def test_auto_limits_each_value_only_where_that_is_asked_for() -> None:
    assert {family.mode for family in automatic()} == {None, "rel"}
    asked = automatic(targets_of({"max_pw_rel_error": 0.01, "psnr_db": 40}))
    assert {family.mode for family in asked} == {None, "pw_rel"}


def test_targets_take_the_direction_of_their_metric() -> None:
    found = targets_of({"psnr_db": 60, "dssim": 1e-3, "error_autocorr:2": 0.1, "bit_rate": 4})
    assert [str(target) for target in found] == [
        "psnr_db >= 60", "dssim <= 0.001", "error_autocorr:2 <= 0.1", "bit_rate <= 4",
    ]  # fmt: skip
    assert targets_of([{"metric": "psnr_db", "op": ">=", "value": 60}]) == found[:1]
    assert targets_of(found) == found
    assert targets_of(found[0]) == found[:1]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({}, "target: is empty"),
        ("psnr_db", "allowed is an object"),
        ({"psnr": 60}, r'target.psnr: unknown metric "psnr".*Did you mean "psnr_db"'),
        ({"psnr_db": "60"}, "target.psnr_db.value: got '60'"),
        ({"psnr_db": math.nan}, "allowed are finite"),
        ({"ssim": 1.5}, "got 1.5 for ssim, which is 1 at most"),
        ({"dssim": -1}, "got -1 for dssim, allowed are 0 and more"),
        ({"compression_ratio": 0}, "allowed are 0.001 and more"),
        ([{"metric": "psnr_db", "op": "<=", "value": 60}], "asks for a worse result.*write >="),
        ([{"metric": "psnr_db", "op": "=", "value": 60}], r"target\[0\].op: got \'=\'"),
        ([{"metric": "psnr_db", "values": 60}], r'\[0\].values: unknown key. Did you mean "value"'),
        ([Target("psnr_db", ">=", 60), Target("psnr_db", ">=", 50)], "contradict each other"),
        ({"error_autocorr:x": 1}, "is not a number"),
        ([5], r"target\[0\]: got 5"),
    ],
)
def test_wrong_targets_are_named(spec: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        targets_of(spec)


def test_margins_are_decades_of_the_error() -> None:
    psnr, dssim, ssim, ratio, rate, lag = targets_of(
        {"psnr_db": 60, "dssim": 1e-4, "ssim": 0.99, "compression_ratio": 10, "bit_rate": 4,
         "error_autocorr": 0.1}
    )  # fmt: skip
    assert psnr.margin(80.0) == 1.0
    assert psnr.margin(math.inf) == math.inf
    assert dssim.margin(1e-2) == pytest.approx(-1.0)
    assert ssim.margin(0.9999) == pytest.approx(1.0)
    assert ratio.margin(1.0) == pytest.approx(-1.0)
    assert rate.margin(0.4) == pytest.approx(1.0)
    assert lag.margin(-1.0) == pytest.approx(-1.0)
    assert (lag.is_met(-0.05), lag.is_met(-0.2)) == (True, False)
    assert psnr.margin(None) == -math.inf
    assert not psnr.is_met(None)
    assert ratio.margin(0.0) == -math.inf
    exact = targets_of({"ssim": 1.0})[0]
    assert (exact.margin(1.0), exact.is_met(1.0)) == (0.0, True)
    assert exact.margin(0.9) == -math.inf


def test_an_objective_needs_something_that_stops_it() -> None:
    with pytest.raises(ConfigError, match='allowed are "compression_ratio", "psnr_db"'):
        Goal(targets_of({"psnr_db": 60}), "ratio")
    with pytest.raises(ConfigError, match="needs a target for the quality"):
        Goal(targets_of({"compression_ratio": 5}))
    with pytest.raises(ConfigError, match="needs a target for the size"):
        Goal(targets_of({"ssim": 0.9}), "psnr_db")
    assert Goal(targets_of({"ssim": 0.9})).metrics == ["ssim", "psnr_db", "max_abs_error"]


def test_first_guesses_meet_the_targets_if_errors_are_uniform() -> None:
    for spec, relative in (
        ({"psnr_db": 60}, math.sqrt(3) * 1e-3),
        ({"nrmse": 1e-3}, math.sqrt(3) * 1e-3),
        ({"rmse": 4e-3}, math.sqrt(3) * 1e-3),
        ({"mse": 16e-6}, math.sqrt(3) * 1e-3),
        ({"max_abs_error": 4e-3}, 1e-3),
        ({"max_rel_error": 1e-3}, 1e-3),
        ({"psnr_db": 60, "max_rel_error": 1e-4}, 1e-4),
    ):
        targets = targets_of(spec)
        assert first_guess(targets, "rel", 4.0) == pytest.approx(relative), spec
        assert first_guess(targets, "abs", 4.0) == pytest.approx(4 * relative), spec
    assert first_guess(targets_of({"ssim": 0.9}), "rel", 4.0) is None
    assert first_guess(targets_of({"max_pw_rel_error": 0.01}), "pw_rel", 4.0) == 0.01
    assert first_guess(targets_of({"psnr_db": 60}), "pw_rel", 4.0) is None
