"""Graders against closed forms, naive versions written here, and other libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from lowtide.core.errors import DataError
from lowtide.evaluation.grading import calibration, choices, numeric, overlap, text, units
from lowtide.evaluation.grading.choices import OptionScore


@pytest.mark.parametrize(
    ("output", "references", "is_right"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], True),
        ("ﬁve  apples", ["Five apples"], True),
        ("Paris, France", ["Paris"], False),
        ("+", ["+"], True),
        ("-", ["+"], False),
        ("", ["the"], False),
        ("B", ["A", "b"], True),
    ],
)
def test_exact_match_ignores_what_does_not_matter(
    output: str, references: list[str], is_right: bool
) -> None:
    assert text.exact_match(output, references) is is_right


def test_exact_match_without_normalisation_is_literal() -> None:
    assert not text.exact_match("paris", ["Paris"], is_normalised=False)
    assert text.exact_match(" Paris\n", ["Paris"], is_normalised=False)


def test_patterns_extract_the_last_answer() -> None:
    pattern = text.compiled(r"answer is (\w+)")
    assert text.extract("the answer is 3, no: the answer is four", pattern) == "four"
    assert text.regex_match("the answer is 4", pattern, ["4"])
    assert not text.regex_match("the answer is 4, the answer is 5", pattern, ["4"])
    assert text.regex_match("answer is x", pattern)
    assert not text.regex_match("none", pattern)
    with pytest.raises(DataError, match="no regular expression"):
        text.compiled("(")


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("about 1,234.5 of them", 1234.5), ("-3e-4", -3e-4), ("3 x 10^-3", 3e-3),
        ("so 2.5·10⁻³", 2.5e-3), ("it is 5×10**{6}", 5e6), ("−7", -7.0), ("first 3, then 4.", 4.0),
        ("3 x 1000", 1000.0), (".5", 0.5), ("inf", math.inf), ("-Infinity", -math.inf),
        ("1e999999999", math.inf), ("1e-999999999", 0.0), ("42%", 42.0), ("H2O", None), ("", None),
        ("v1.2.3", None), ("12,34", 34.0),
    ],
)  # fmt: skip
def test_numbers_are_found(said: str, value: float | None) -> None:
    assert numeric.numeric_answer(said) == value


def test_nan_is_wrong_unless_it_is_wanted() -> None:
    assert math.isnan(numeric.numeric_answer("NaN") or 0)
    assert not numeric.numeric_match("nan", 1.0)
    assert not numeric.numeric_match("nan", math.nan)
    assert numeric.numeric_match("nan", math.nan, nan="equal")
    assert not numeric.numeric_match("1", math.nan, nan="equal")
    assert not numeric.close(math.inf, 1e308, rtol=10, atol=0)
    assert numeric.close(math.inf, math.inf, rtol=0, atol=0)
    assert not numeric.close(-math.inf, math.inf, rtol=0, atol=0)


def test_tolerances_add_up() -> None:
    assert numeric.close(110.0, 100.0, rtol=0.1, atol=0)
    assert not numeric.close(110.1, 100.0, rtol=0.1, atol=0)
    assert numeric.close(110.1, 100.0, rtol=0.1, atol=0.2)
    assert numeric.close(0.05, 0.0, rtol=0.5, atol=0.1)
    assert not numeric.close(0.05, 0.0, rtol=0.5, atol=0)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(DataError, match="rtol, atol"):
            numeric.close(1.0, 1.0, rtol=bad, atol=0)


@pytest.mark.parametrize(
    ("said", "unit", "value"),
    [
        ("3.2 km", "m", 3200.0), ("3 J mol-1", "J/mol", 3.0), ("9.81 m s^-2.", "m/s^2", 9.81),
        ("2 kWh", "J", None), ("5 h", "s", 18000.0), ("12 seconds", "s", None),
        ("12 s, not 3 m", "s", 12.0), ("12", "s", None), ("50 %", "1", 0.5), ("0.5", "%", 50.0),
        ("1 eV", "J", 1.602176634e-19), ("250 mL", "cm^3", 250.0), ("4 kg m²/s²", "J", 4.0),
        ("1 µm", "nm", 1000.0), ("7 m", "s", None), ("2 mmol/L", "M", 2e-3),
    ],
)  # fmt: skip
def test_units_are_converted(said: str, unit: str, value: float | None) -> None:
    found = numeric.numeric_answer(said, unit=unit)
    assert found == (None if value is None else pytest.approx(value))


def test_units_multiply_as_they_should() -> None:
    assert units.parse_unit("J/(kg K)") == units.parse_unit("m^2 s^-2 K^-1")
    assert units.parse_unit("N").to(units.parse_unit("kg*m/s**2")) == pytest.approx(1.0)
    assert units.parse_unit("Pa").to(units.parse_unit("m")) is None
    ohm = units.parse_unit("V/A").to(units.parse_unit("Ω"))
    assert ohm == pytest.approx(1.0)
    for bad in ("furlong", "(m", "m)", "m^99", "°C"):
        with pytest.raises(DataError, match="unit"):
            units.parse_unit(bad)


words = some.lists(some.sampled_from("abcd"), max_size=12)


def naive_lcs(one: list[str], other: list[str]) -> int:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


@settings(deadline=None, max_examples=200)
@given(words, words)
def test_common_subsequences_are_those_of_the_table(one: list[str], other: list[str]) -> None:
    assert overlap.common_subsequence(one, other) == naive_lcs(one, other)


def test_overlaps_by_hand() -> None:
    found = overlap.token_overlap("the cat sat sat", ["cat sat on mat"])
    assert found == pytest.approx((2 / 3, 2 / 4, 4 / 7))
    best = overlap.token_overlap("red fox", ["blue", "red fox ran"])
    assert best == pytest.approx((1.0, 2 / 3, 0.8))
    assert overlap.token_overlap("", ["the"]) == (1.0, 1.0, 1.0)
    assert overlap.token_overlap("", ["x"]) == (0.0, 0.0, 0.0)
    assert overlap.token_overlap("x", [""]) == (0.0, 0.0, 0.0)
    rouge = overlap.rouge_l("police kill the gunman", ["police killed the gunman"])  # Lin (2004)
    assert rouge.f1 == pytest.approx(0.75)
    assert overlap.rouge_l("the gunman kill police", ["police killed the gunman"]).f1 == 0.5
    assert overlap.set_overlap(["Iron", "gold", "gold."], ["gold", "tin"]) == (0.5, 0.5, 0.5)
    assert overlap.parse_set("1. Iron\n2. Gold and tin; zinc") == {"iron", "gold", "tin", "zinc"}
    with pytest.raises(DataError, match="one or more right answers"):
        overlap.token_overlap("x", [])


def test_the_two_definitions_of_f1_differ_and_f1_hides_what_moved() -> None:
    mixed = [overlap.Overlap(1.0, 0.2, 2 * 0.2 / 1.2), overlap.Overlap(0.2, 1.0, 2 * 0.2 / 1.2)]
    assert overlap.mean_of_f1(mixed) == pytest.approx(1 / 3)
    assert overlap.f1_of_means(mixed) == pytest.approx(0.6)
    precise, complete = overlap.Overlap(0.9, 0.6, 0.72), overlap.Overlap(0.6, 0.9, 0.72)
    assert overlap.f1_of_means([precise]) == pytest.approx(overlap.f1_of_means([complete]))
    assert overlap.f1_of_means([overlap.Overlap(0, 0, 0)]) == 0.0
    with pytest.raises(DataError, match="one or more items"):
        overlap.f1_of_means([])


def test_rouge_l_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    random = np.random.default_rng(0)
    for _ in range(50):
        one, other = (" ".join(random.choice(list("abcde"), 9)) for _ in range(2))
        theirs = scorer.score(other, one)["rougeL"]
        ours = overlap.rouge_l(one, [other])
        assert ours == pytest.approx((theirs.precision, theirs.recall, theirs.fmeasure))


OPTIONS = [
    OptionScore(-6.0, 2, 12, -5.0), OptionScore(-7.0, 3, 7, -8.0), OptionScore(-8.0, 8, 10, -7.5),
]  # fmt: skip


@pytest.mark.parametrize(
    ("scoring", "values"),
    [
        ("sum", [-6.0, -7.0, -8.0]), ("per_token", [-3.0, -7 / 3, -1.0]),
        ("per_byte", [-0.5, -1.0, -0.8]), ("unconditional", [-1.0, 1.0, -0.5]),
    ],
)  # fmt: skip
def test_options_are_scored_in_four_ways(scoring: Any, values: list[float]) -> None:
    assert choices.option_scores(OPTIONS, scoring).tolist() == pytest.approx(values)


def test_options_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(DataError, match="0 tokens"):
        choices.option_scores([OptionScore(-1.0, 0, 1)], "per_token")
    with pytest.raises(DataError, match="unconditional"):
        choices.option_scores([OptionScore(-1.0, 1, 1)], "unconditional")
    with pytest.raises(DataError, match="scoring"):
        choices.option_scores(OPTIONS, "best")  # type: ignore[arg-type]


def test_probabilities_are_a_softmax() -> None:
    found = choices.probabilities(np.array([0.0, math.log(3.0), -math.inf]))
    assert found.tolist() == pytest.approx([0.25, 0.75, 0.0])
    assert choices.probabilities(np.array([-5000.0, -5001.0])).sum() == pytest.approx(1.0)
    assert choices.probabilities(np.array([-math.inf] * 2)).tolist() == [0.5, 0.5]


def test_rotations_put_each_option_once_at_each_position() -> None:
    found = choices.orders(4, 4, seed=3)
    for position in range(4):
        assert {order[position] for order in found} == {0, 1, 2, 3}
    assert found == choices.orders(4, 4, seed=3)
    assert {choices.orders(4, 1, seed=s)[0] for s in range(200)} > {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert len(choices.orders(3, 7, seed=0)) == 7
    with pytest.raises(DataError, match="2 and 1 or more"):
        choices.orders(1, 1, seed=0)


def test_a_model_that_loves_the_first_position_is_found_out() -> None:
    items = []
    for answer in range(4):
        shown = choices.orders(4, 4, seed=answer)
        items.append((answer, shown, [0] * 4))
    bias = choices.position_bias(items)
    assert bias.chosen == (16, 0, 0, 0)
    assert bias.accuracy == (1.0, 0.0, 0.0, 0.0)
    assert bias.excess == 0.75
    assert bias.consistency == 0.0
    fair = [(a, o, [order.index(a) for order in o]) for a, o, _ in items]
    honest = choices.position_bias(fair)
    assert honest.excess == 0.0
    assert honest.consistency == 1.0
    with pytest.raises(DataError, match="4 orders and 1 choices"):
        choices.position_bias([(0, items[0][1], [0])])


def test_calibration_by_hand() -> None:
    confidence, correct = [0.95, 0.9, 0.6, 0.55], [1, 0, 1, 1]
    error = calibration.expected_calibration_error(confidence, correct)
    # Bins (0.8, 0.9], (0.9, 1], (0.5, 0.6]: the edge belongs to the bin below it.
    assert error == pytest.approx((1 * 0.05 + 1 * 0.9 + 2 * (1 - 0.575)) / 4)
    table = calibration.reliability_bins(confidence, correct)
    assert [each.count for each in table] == [0, 0, 0, 0, 0, 2, 0, 0, 1, 1]
    assert math.isnan(table[0].accuracy)
    mass = calibration.reliability_bins(confidence, correct, bins=2, by="mass")
    assert [each.count for each in mass] == [2, 2]
    same = calibration.reliability_bins([0.5] * 3, [1, 0, 1], bins=4, by="mass")
    assert [each.count for each in same] == [3]
    assert calibration.brier_score([0.8, 0.3], [1, 0]) == pytest.approx((0.04 + 0.09) / 2)
    assert calibration.brier_score([[0.7, 0.2, 0.1]], [1]) == pytest.approx(0.49 + 0.64 + 0.01)
    curve = calibration.abstention_curve([0.9, 0.8, 0.8, 0.1], [1, 1, 0, 0])
    assert np.array(curve) == pytest.approx(np.array([(0.25, 1.0), (0.75, 2 / 3), (1.0, 0.5)]))


def test_a_calibrated_model_has_no_error_and_a_boaster_has_one() -> None:
    random = np.random.default_rng(0)
    stated = random.random(200_000)
    right = random.random(200_000) < stated
    assert calibration.expected_calibration_error(stated, right) < 0.01
    assert calibration.expected_calibration_error(np.ones(1000), np.arange(1000) % 2) == 0.5
    metrics = pytest.importorskip("sklearn.metrics")
    ours = calibration.brier_score(stated, right)
    assert ours == pytest.approx(metrics.brier_score_loss(right, stated))


@pytest.mark.parametrize(
    ("confidence", "correct", "said"),
    [([1.5], [1], "from 0 to 1"), ([0.5], [2], "true and false"), ([], [], "n of 1"),
     ([0.5, 0.5], [1], "twice")],
)  # fmt: skip
def test_what_is_no_probability_is_refused(confidence: Any, correct: Any, said: str) -> None:
    for function in (
        calibration.expected_calibration_error, calibration.brier_score,
        calibration.abstention_curve,
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            function(confidence, correct)
