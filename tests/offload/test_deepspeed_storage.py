"""Behind an unmodified DeepSpeed, with state in files: the bits of stock."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.offload.storage_worker import MEMORY_BYTES, PAIRS, WAYS

pytestmark = pytest.mark.dist
STAGES = (3, 2)


def run(folder: Any, *stages: int, nproc: int) -> list[Any]:
    arguments = ["-m", "tests.offload.storage_worker", str(folder), *map(str, stages)]
    return run_ranks(arguments, nproc=nproc, timeout_s=300).check().results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run(tmp_path_factory.mktemp("storage"), *STAGES, nproc=2)


def stored(ranks: list[Any]) -> list[tuple[str, Any]]:
    """Return (way, facts) of all ranks, stages and ways that store something."""
    return [(w, rank[str(s)]) for rank in ranks for s in STAGES for w in WAYS[s] if w != "stock"]


def assert_equal_to_stock(facts: Any, stage: int) -> None:
    for way in WAYS[stage]:
        assert facts[str(stage)][way] == facts[str(stage)]["stock"], way
    for pair in PAIRS[stage]:
        assert facts[str(stage)][pair] == facts[str(stage)]["stock stock"], pair
    assert facts[str(stage)].get("fragments", stage == 3)
    expected, found = facts["taken out"][str(stage)]
    assert found == expected


@pytest.mark.parametrize("stage", STAGES)
def test_state_weights_and_losses_are_those_of_stock(ranks: list[Any], stage: int) -> None:
    for facts in ranks:
        assert_equal_to_stock(facts, stage)


def test_one_rank_alone_is_equal_to_stock(tmp_path: Any) -> None:
    (facts,) = run(tmp_path, 1, nproc=1)
    assert_equal_to_stock(facts, 1)
    assert facts["1"]["random facts"]["stored"] > 0


def test_memory_holds_no_more_than_was_allowed(ranks: list[Any]) -> None:
    for way, facts in stored(ranks):
        found = facts[f"{way} facts"]
        moved = facts[f"{way} at the start"]
        assert moved
        assert all(moved)
        assert found["memory"] <= MEMORY_BYTES
        assert 0 < found["buffers"] <= 3 * 12 * 1024
        assert 0 < found["resident"] + found["buffers"] <= MEMORY_BYTES + found["pages"]
        assert found["memory"] + found["stored"] >= found["state"]
        assert found["stored"] > 0


def test_every_path_is_read_and_written(ranks: list[Any]) -> None:
    for way, facts in stored(ranks):
        found = facts[f"{way} facts"]
        assert {"read0", "read1", "write0", "write1"} <= set(found["lanes"]), way
        assert "write1" in found["chart"]
        assert [each["folder"][-1] for each in found["summary"]] == ["a", "b"]
    for facts in ranks:
        lanes = [set(facts[str(stage)]["random facts"]["lanes"]) for stage in STAGES]
        assert "device" in set().union(*lanes, facts["3"]["auto facts"]["lanes"])


def test_pieces_change_paths_in_random_plans(ranks: list[Any]) -> None:
    for way, facts in stored(ranks):
        if way in ("random", "lazy"):
            assert facts[f"{way} facts"]["moves"] > 0, way


def test_files_have_no_names(ranks: list[Any]) -> None:
    assert [facts[str(s)]["left over"] for facts in ranks for s in STAGES] == [[]] * 4


def test_a_path_that_refuses_writes_costs_no_bit(ranks: list[Any]) -> None:
    first, last = (facts["failing"] for facts in ranks)
    for facts in (first, last):
        assert facts["host"] == facts["stock"]
    assert min(first["stored after"]) > 0
    assert last["stored after"][0] == 0


def test_state_that_cannot_be_read_back_ends_all_ranks(ranks: list[Any]) -> None:
    first, last = (facts["failing"]["error"] for facts in ranks)
    assert first.startswith("StorageError: offload.storage: another rank")
    assert "was written" in last
    assert "start again from the last checkpoint" in last


def test_whatever_fails_on_one_rank_ends_all(ranks: list[Any]) -> None:
    first, last = (facts["failing alone"] for facts in ranks)
    assert [each.split(": ")[-1] for each in last] == ["not enough memory"] * 2
    assert first[0].startswith("StorageError: offload.storage: another rank cannot store its")
    assert first[1].startswith("StorageError: offload.storage: another rank has failed in its")
