"""Behind an unmodified DeepSpeed: the bits of stock, whatever is updated where and when."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.dist
WORKER = "tests.offload.deepspeed_worker"


def results(folder: Path, *arguments: str, nproc: int = 2, timeout_s: float = 300) -> list[Any]:
    run = run_ranks(["-m", WORKER, str(folder), *arguments], nproc=nproc, timeout_s=timeout_s)
    return run.check().results


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results(tmp_path_factory.mktemp("matrix"), "matrix", "short", "24")


def assert_equal_to_stock(ranks: list[Any], *, has_skips: bool = True) -> None:
    for facts in ranks:
        for name, case in facts.items():
            for way in ("random", "auto"):
                if way in case:
                    assert case[way] == case["stock"], f"{name}, {way} plan"
            updates = case["random updates"]
            assert updates > len(case["stock"]) // 2
            if has_skips:
                assert ("fp16" in name) == (updates < len(case["stock"])), "some are skipped"


def test_masters_moments_weights_and_losses_are_those_of_stock(matrix: list[Any]) -> None:
    assert_equal_to_stock(matrix)


def test_plans_of_the_matrix_use_host_and_device(matrix: list[Any]) -> None:
    seen = {lane for facts in matrix for case in facts.values() for lane in case["random lanes"]}
    assert seen >= {"host", "prefetch", "device", "flush", "upload"}


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 4])
def test_other_numbers_of_ranks(tmp_path: Path, nproc: int) -> None:
    assert_equal_to_stock(results(tmp_path, "matrix", "short", "16", nproc=nproc))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_every_setting_over_many_steps(tmp_path: Path, nproc: int) -> None:
    steps = os.environ.get("LOWTIDE_OFFLOAD_STEPS")
    if steps is None:
        pytest.skip("72 settings take long: set LOWTIDE_OFFLOAD_STEPS=200")
    assert_equal_to_stock(
        results(tmp_path, "matrix", "full", steps, nproc=nproc, timeout_s=7200), has_skips=False
    )


def test_saved_by_one_and_continued_by_the_other(tmp_path: Path) -> None:
    for facts in results(tmp_path, "resume"):
        for stage in (3, 2):
            expected = facts[f"{stage} stock stock"]
            for pair in ("stock ours", "ours stock", "ours ours"):
                assert facts[f"{stage} {pair}"] == expected, f"ZeRO {stage}, {pair}"


def test_gradients_and_state_are_read_and_changed_as_in_stock(tmp_path: Path) -> None:
    for facts in results(tmp_path, "access"):
        for stage in (3, 2):
            assert facts[f"{stage} ours"] == facts[f"{stage} stock"]


def test_together_with_lazy_checkpoints(tmp_path: Path) -> None:
    for facts in results(tmp_path, "checkpoint"):
        for stage in (3, 2):
            assert facts[f"{stage} both"] == facts[f"{stage} stock"]
            assert facts[f"{stage} both read"] == facts[f"{stage} stock read"]


def test_what_one_rank_does_alone_holds_nobody_up(tmp_path: Path) -> None:
    ranks = results(tmp_path, "trouble")
    for facts in ranks:
        for name in ("reads", "fails", "moves", "overflows"):
            assert facts[f"{name} ours"] == facts[f"{name} stock"], name
        assert "device" in facts["reads lanes"]
        assert facts["fails lanes"] == ["host", "upload"] or facts["fails lanes"] == ["host"]

    assert ranks[-1]["overflows on device"] > 0


def test_switches(tmp_path: Path) -> None:
    for facts in results(tmp_path, "switches"):
        stock = facts["stock"]
        for name in ("off", "cpu", "fraction 0", "fraction 1", "no memory"):
            assert facts[name] == stock, name
        taken_out = facts["taken out"]  # looked at once more, half way
        assert [each[:2] for each in taken_out] == [each[:2] for each in stock]
        assert taken_out[-1] == stock[-1]
        assert facts["off is stock class"] is True
        assert facts["off class"] == facts["stock class"]
        assert facts["taken out is stock"] is True
        for name in ("cpu", "fraction 0", "no memory"):
            host, staged, resident = facts[f"{name} plan"]
            assert host > 0
            assert (staged, resident) == (0, 0)
        assert facts["fraction 1 plan"][0] == 0
        assert facts["fraction 1 plan"][1] > 0
        assert facts["cpu telemetry"]["lowtide.offload.update_s"] > 0
