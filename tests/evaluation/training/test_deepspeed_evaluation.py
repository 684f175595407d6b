"""Evaluations inside DeepSpeed runs: every ZeRO stage, uneven items, ranks that fail."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

CASES = ["0 fp32", "1 bf16", "2 fp32", "3 fp32", "3 bf16"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluation")
    arguments = ["-m", "tests.evaluation.training.deepspeed_worker", str(folder)]
    return run_ranks(arguments, timeout_s=290).check().results


def test_nothing_is_imported_when_it_is_off(ranks: list[dict[str, Any]]) -> None:
    assert [facts["is_imported_when_off"] for facts in ranks] == [False, False]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_random_numbers_are_those_of_stock(
    ranks: list[dict[str, Any]], case: str
) -> None:
    for facts in ranks:
        found = facts["trainings"][case]
        assert found["on"] == found["stock"]
        assert found["on rng"] == found["stock rng"]
        assert found["stock"][-1][0] < found["stock"][0][0]
        assert found["said"]["evaluations"] == 3
        assert found["said"]["failures"] == 0


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_figures_and_the_first_records_them(
    ranks: list[dict[str, Any]], case: str
) -> None:
    first, second = (facts["trainings"][case] for facts in ranks)
    figures = first["said"]["last"]
    assert figures == second["said"]["last"]
    assert {"held_out/loss", "mcq/accuracy", "open/correct"} <= set(figures)
    assert all(value is not None and math.isfinite(value) for value in figures.values())
    recorded = {name for name in first["scalars"] if name.startswith("evaluation/")}
    assert recorded == {f"evaluation/{name}" for name in figures}
    assert not any(name.startswith("evaluation/") for name in second["scalars"])


def test_stages_find_what_one_another_find(ranks: list[dict[str, Any]]) -> None:
    runs = ranks[0]["trainings"]
    for case in ("2 fp32", "3 fp32"):
        expected = pytest.approx(runs["0 fp32"]["said"]["last"], rel=1e-4)
        assert runs[case]["said"]["last"] == expected


def test_a_rank_that_fails_alone_stops_nobody(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        stock = [loss for loss, *_ in facts["trainings"]["3 fp32"]["stock"]]
        assert facts["one rank fails"]["losses"] == stock
        said = facts["one rank fails"]["said"]
        assert said["failures"] == 1
        assert said["evaluations"] == 3
        assert "mcq/accuracy" in said["last"]


def test_the_first_ranks_clock_decides(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert (facts["budget"]["evaluations"], facts["budget"]["left_out"]) == (0, 3)


def test_ranks_with_different_suites_are_told(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert "the ranks have different suites" in facts["different"]


def test_figures_reach_the_monitor(ranks: list[dict[str, Any]]) -> None:
    assert len(ranks[0]["monitor"]) == 3
    assert "bits_per_byte" in "".join(ranks[0]["monitor"])


def test_pipelines_are_refused(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert "leave the key out under pipeline parallelism" in facts["pipeline"]
