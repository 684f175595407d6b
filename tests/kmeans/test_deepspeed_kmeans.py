"""Through the DeepSpeed JSON: ZeRO stages, outputs of modules, resuming. One start of 2 ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.kmeans.deepspeed_worker import CASES, STEPS

pytestmark = pytest.mark.dist

WEIGHTS = [
    *("words.weight", "places.weight", "lm_head.weight"),
    *(f"blocks.{n}.{part}.weight" for n in (0, 1) for part in ("qkv", "out", "up", "down")),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("kmeans")
    arguments = ["-m", "tests.kmeans.deepspeed_worker", str(folder)]
    return run_ranks(arguments, timeout_s=240).check().results


def test_nothing_is_imported_when_it_is_off(ranks: list[dict[str, Any]]) -> None:
    assert [facts["is_imported"] for facts in ranks] == [False, False]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_stock(ranks: list[dict[str, Any]], case: str) -> None:
    for facts in ranks:
        found = facts["cases"][case]
        assert found["losses"] == found["stock"]
        assert found["hooks"] == 0  # more than stock has


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_same_codebooks(ranks: list[dict[str, Any]], case: str) -> None:
    first, second = (facts["cases"][case]["centroids"] for facts in ranks)
    assert first == second
    expected = {"blocks.0.up", "blocks.1.up"} if "outputs" in case else set(WEIGHTS)
    assert set(first) == expected
    for facts in ranks:
        summary = facts["cases"][case]["summary"]
        assert summary["fits"] == STEPS // 2
        assert {each["step"] for each in summary["codebooks"].values()} == {STEPS}
        assert summary["faults"]["detected"] == 0
        assert summary["faults"]["checks"] > 0
        assert 0 < summary["share"] < 1


@pytest.mark.parametrize("case", [case for case in CASES if "stage" in case])
def test_errors_are_those_of_the_whole_parameter(ranks: list[dict[str, Any]], case: str) -> None:
    for facts in ranks:
        found = facts["cases"][case]
        books = found["summary"]["codebooks"]
        assert {name: each["relative_error"] for name, each in books.items()} == pytest.approx(
            found["by hand"], rel=1e-4
        )
        # Sixteen vectors for four normal values each: a good deal better than the mean alone.
        assert all(each < 0.75 for each in found["by hand"].values())


def test_offloaded_run_has_the_codebooks_of_the_run_without(ranks: list[dict[str, Any]]) -> None:
    # Parameters are read when the step is over in every respect, so nothing is in flight.
    found = ranks[0]["cases"]["stage 3, offload"]
    assert found["by hand"].keys() == set(WEIGHTS)


def test_next_run_begins_with_the_codebooks_of_before(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        found = facts["resumed"]
        assert set(found["names"]) == set(WEIGHTS)
        assert all(found["is same"])
        assert found["files"] == ["codebooks-rank00000.safetensors"]


def test_example_prints_what_the_codes_cost() -> None:
    log = run_ranks(["examples/kmeans/codebooks.py", "--steps", "10"]).check().logs[0]
    rows = re.findall(r"^layers\.\S+: 2\.0 bits, relative error (0\.\d+)$", log, re.MULTILINE)
    assert len(rows) == 8  # four matrices in each of two layers
    assert all(0.1 < float(row) < 0.4 for row in rows)
    (found,) = re.findall(r"^loss (\S+); of the model as its codes say it is (\S+)$", log, re.M)
    before, after = map(float, found)
    assert before < after < before + 0.2
    assert "1 fits took" in log
    stock = run_ranks(["examples/kmeans/codebooks.py", "--steps", "10", "--stock"]).check().logs[0]
    steps = [line for line in log.splitlines() if line.startswith("step ")]
    assert [line for line in stock.splitlines() if line.startswith("step ")] == steps
    assert len(steps) == 10
