"""The sharded layers against an unsharded reference: outputs, loss, dx and every weight's gradient.

Errors are relative Frobenius norms of whole tensors (see compare.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.tensor_parallel.starts import of_each

EXACT = 1e-12  # float64
pytestmark = pytest.mark.timeout(600)  # the first test of each number of ranks runs all
ranks = pytest.mark.parametrize(
    "nproc", [1, pytest.param(2, marks=pytest.mark.dist), pytest.param(4, marks=pytest.mark.dist)]
)
up_to_two = pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.dist)])
several = pytest.mark.parametrize("nproc", [2, 4])


def assert_small(cases: dict[str, dict[str, Any]], bound: float) -> None:
    assert cases
    for name, errors in cases.items():
        for what, error in errors.items():
            if what != "worst":
                assert error <= bound, f"{name}: {what} is {error:.2e} off ({errors['worst']})"


@ranks
@pytest.mark.parametrize("scenario", ["exact", "hard_inputs"])
def test_float64_is_that_of_the_reference(nproc: int, scenario: str) -> None:
    for found in of_each(nproc, scenario):
        assert all("dW" in errors for errors in found.values())
        assert_small(found, EXACT)


@up_to_two
def test_float64_after_steps_of_the_optimizer(nproc: int) -> None:
    for found in of_each(nproc, "optimizer_steps"):
        assert_small(found, EXACT)


@pytest.mark.dist
def test_halves_of_the_batch_that_take_turns() -> None:
    for found in of_each(2, "overlap"):
        assert len(found) == 11
        assert_small(found, EXACT)


@up_to_two
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(nproc: int) -> None:
    for found in of_each(nproc, "frozen"):
        assert len(found) == 13
        assert_small(found, EXACT)


@up_to_two
@pytest.mark.parametrize("scenario", ["layer_calls", "whole_logits"])
def test_any_strides_of_inputs_and_gradients(nproc: int, scenario: str) -> None:
    for found in of_each(nproc, scenario):
        assert_small(found, EXACT)


@up_to_two
def test_a_loss_that_is_no_part_of_the_model(nproc: int) -> None:
    for found in of_each(nproc, "replaced_loss"):
        assert_small({"": found}, EXACT)


@ranks
def test_float32_stays_near_float64(nproc: int) -> None:
    for found in of_each(nproc, "precision"):
        cases = {name: found[name] for name in found if name.endswith(", float32")}
        assert len(cases) == (5 if nproc < 4 else 2)
        for name, errors in cases.items():
            assert_near(name, errors)


@ranks
def test_float32_with_an_outlier_channel_or_large_means(nproc: int) -> None:
    for found in of_each(nproc, "outliers"):
        assert len(found) == 6
        for name in ("float32", "layer norm, float32"):
            assert_near(name, found[name])
        # Means of 30 and 50 take digits from everyone: one rank is above 2e-6 itself.
        assert_same_class("means", found["means, float32"])


def assert_near(name: str, found: dict[str, dict[str, float]]) -> None:
    ours, single = found["sharded"], found["single"]
    for what in ("loss", "logits", "dx", "dW"):
        # 1.5e-6 and more on one rank for gains of head norms: there the bound is 1.5 times that.
        bound = max(2e-6, 1.5 * single[what])
        assert ours[what] <= bound, f"{name}: {what} {ours[what]:.1e}, one rank {single[what]:.1e}"


def assert_same_class(name: str, found: dict[str, dict[str, float]]) -> None:
    ours, single = found["sharded"], found["single"]
    for what, factor in (("logits", 1.5), ("dx", 1.5), ("dW", 2.0)):
        text = f"{name}: {what} {ours[what]:.1e}, one rank {single[what]:.1e}"
        assert ours[what] <= factor * single[what], text


@ranks
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_as_near_to_float64_as_one_rank(nproc: int, dtype: str) -> None:
    for found in of_each(nproc, "precision"):
        names = [name for name in found if name.endswith(f", {dtype}")]
        assert names
        for name in names:
            assert_same_class(name, found[name])


@ranks
def test_bfloat16_with_an_outlier_channel_or_large_means(nproc: int) -> None:
    """A statistic of 8 bits would hide here, in the rounding of all else: the next test sees it."""
    for found in of_each(nproc, "outliers"):
        for name in (each for each in found if each.endswith("bfloat16")):
            assert_same_class(name, found[name])


@pytest.mark.dist
@several
def test_replicated_gradients_and_statistic_have_the_same_bits_on_all_ranks(nproc: int) -> None:
    for found in of_each(nproc, "replicas"):
        for name, facts in found.items():
            assert facts["differing"] == 0, name
            assert not facts["statistic differs"], name
            # 48 squares summed in float32; a bfloat16 statistic is 4e-3 off.
            assert facts["statistic"] < 1e-6, name


@ranks
@pytest.mark.parametrize("model", ["untied", "biases"])
def test_float16_where_gain_times_x_overflows(nproc: int, model: str) -> None:
    for found in of_each(nproc, "large_halves"):
        assert_same_class(model, found[model])


@up_to_two
@pytest.mark.parametrize(
    "kind",
    ["float32 gains", "autocast", "layer norm, float32 gains", "layer norm, autocast"],
)
def test_mixed_precision(nproc: int, kind: str) -> None:
    for found in of_each(nproc, "mixed_precision"):
        assert_same_class(kind, found[kind])


@ranks
def test_checkpointing_changes_no_bit(nproc: int) -> None:
    for found in of_each(nproc, "tiers"):
        assert len(found) == 5
        assert set(map(tuple, (each.values() for each in found.values()))) == {(0, 0)}, found


@ranks
def test_options_of_the_loss(nproc: int) -> None:
    for found in of_each(nproc, "losses"):
        assert len(found) == 24
        assert {name: error for name, error in found.items() if not error <= EXACT} == {}


@ranks
def test_state_dict_is_that_of_the_unsharded_model(nproc: int) -> None:
    for found in of_each(nproc, "state_dicts"):
        for name, facts in found.items():
            expected = {"names": [], "values": [], "loaded": [], "on last": True}
            assert facts == expected, name


@up_to_two
def test_decoding_with_a_cache(nproc: int) -> None:
    for found in of_each(nproc, "decoding"):
        assert len(found) == 6
        assert_small(found, EXACT)


@pytest.mark.dist
def test_groups_of_two_among_four_ranks() -> None:
    found = of_each(4, "subgroups")
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2]  # they had other data
    for errors in found:
        assert_small({"": errors}, EXACT)


@pytest.mark.dist
@several
def test_sums_wait_for_late_ranks_and_refuse_views(nproc: int) -> None:
    for found in of_each(nproc, "late_ranks"):
        assert found == {"sum": [float(nproc)] * 3, "a view is refused": True}
