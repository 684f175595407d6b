"""Behind an unmodified DeepSpeed, with state in files: the bits of stock."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.offload.storage_worker import MEMORY_BYTES

pytestmark = pytest.mark.dist
WAYS = ("host", "random", "auto", "lazy")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("storage")
    arguments = ["-m", "tests.offload.storage_worker", str(folder)]
    return run_ranks(arguments, nproc=2, timeout_s=300).check().results


def test_masters_moments_weights_and_losses_are_those_of_stock(ranks: list[Any]) -> None:
    for facts in ranks:
        for way in WAYS:
            assert facts[way] == facts["stock"], way


def test_saved_by_one_and_continued_by_the_other(ranks: list[Any]) -> None:
    for facts in ranks:
        for pair in ("stock random", "random stock", "lazy stock", "lazy lazy"):
            assert facts[pair] == facts["stock stock"], pair


def test_memory_holds_no_more_than_was_allowed(ranks: list[Any]) -> None:
    for facts in ranks:
        for way in WAYS:
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
    for facts in ranks:
        for way in WAYS:
            found = facts[f"{way} facts"]
            assert {"read0", "read1", "write0", "write1"} <= set(found["lanes"]), way
            assert "write1" in found["chart"]
            assert [each["folder"][-1] for each in found["summary"]] == ["a", "b"]
        assert (
            "device" in facts["auto facts"]["lanes"] or "device" in facts["random facts"]["lanes"]
        )


def test_files_have_no_names(ranks: list[Any]) -> None:
    assert [facts["left over"] for facts in ranks] == [[], []]


def test_stock_goes_on_when_taken_out(ranks: list[Any]) -> None:
    for facts in ranks:
        assert [each[:2] for each in facts["taken out"]] == [e[:2] for e in facts["stock"][:8]]


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
