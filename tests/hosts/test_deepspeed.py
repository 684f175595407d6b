"""DeepSpeed host on 2 gloo ranks: off is stock bit for bit, events come where they should.

All engines run in one start of two ranks (deepspeed_worker.py); each test reads its part.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.dist

STEPS = 4
MICRO_BATCH = ["before_forward", "after_forward", "after_backward"]
UPDATE = ["before_update", "after_update", "after_step"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of the worker found."""
    folder = tmp_path_factory.mktemp("deepspeed")
    worker = Path(__file__).with_name("deepspeed_worker.py")
    return run_ranks([str(worker), str(folder)], nproc=2, timeout_s=280).check().results


SETUPS = ["stage0", "stage1", "stage2", "stage3", "bf16"]


@pytest.mark.parametrize("setup", SETUPS)
def test_losses_and_parameters_are_stock_bit_for_bit(facts: Any, setup: str) -> None:
    for rank in facts:
        stock = rank[setup]["stock"]
        assert len(set(stock["losses"])) > 4, "losses must move for this test to mean anything"
        for variant in ("absent", "empty", "disabled", "probe"):
            assert rank[setup][variant]["losses"] == stock["losses"], variant
            assert rank[setup][variant]["digest"] == stock["digest"], variant


@pytest.mark.parametrize("setup", SETUPS)
def test_engine_without_a_block_is_the_stock_object(facts: Any, setup: str) -> None:
    for rank in facts:
        assert rank[setup]["absent"]["is_stock_class"]
        assert not rank[setup]["absent"]["has_handle"]
        assert rank[setup]["empty"]["has_handle"]
        # Same name, so that logs and isinstance checks read as they did.
        assert rank[setup]["empty"]["class"] == rank[setup]["stock"]["class"]


@pytest.mark.parametrize("setup", SETUPS)
def test_update_fires_once_per_accumulation_boundary(facts: Any, setup: str) -> None:
    expected = ["configured", "model_built", "optimizer_built"]
    for _ in range(STEPS):
        expected += MICRO_BATCH * 2 + UPDATE
    for rank in facts:
        seen = rank[setup]["seen"]
        assert [name for name, _ in seen][: len(expected)] == expected
        assert [step for name, step in seen if name == "before_update"] == [0, 1, 2, 3]
        assert [step for name, step in seen if name == "after_update"] == [1, 2, 3, 4]
        assert rank[setup]["update_data"] == [{"applied": True}] * STEPS
        spans = rank[setup]["spans"]
        assert (spans["forward"]["count"], spans["backward"]["count"]) == (8, 8)
        assert spans["update"]["count"] == STEPS


@pytest.mark.parametrize("setup", [*SETUPS, "pipeline"])
def test_parameters_change_between_before_and_after_update_only(facts: Any, setup: str) -> None:
    for rank in facts:
        sums = [c for c in rank[setup]["checksums"] if c[0] in ("after_backward", *UPDATE)]
        moved = 0
        for (_, earlier), (event, later) in itertools.pairwise(sums):
            if event == "after_update":
                moved += earlier != later
            else:
                assert earlier == later, f"parameters moved before {event}"
        updates = sum(event == "after_update" for event, _ in sums)
        assert moved == updates > 0


@pytest.mark.parametrize("setup", SETUPS)
def test_detach_leaves_no_trace_on_the_engine(facts: Any, setup: str) -> None:
    for rank in facts:
        after = rank[setup]["after_detach"]
        assert after["is_stock_class"]
        assert not after["has_handle"]
        assert after["leftover"] == []
        assert after["closed_seen"] == "closed"


def test_torch_style_backward_fires_the_same_events(facts: Any) -> None:
    for rank in facts:
        names = [name for name, _ in rank["torch_style"]["seen"]][3:]
        assert names == [*(MICRO_BATCH * 2 + UPDATE) * STEPS, "closed"]


def test_skipped_update_is_told_as_not_applied(facts: Any) -> None:
    for rank in facts:
        found = rank["overflow"]
        assert found["skipped"] == 1
        assert found["applied"] == [False, True, True, True]
        assert found["counters"] == {"lowtide.core.skipped_updates_count": 1}


def test_enable_wraps_once_and_disable_restores(facts: Any) -> None:
    for rank in facts:
        assert all(rank["enable"].values()), rank["enable"]


def test_checkpoints_are_stock_and_carry_the_resolved_block(facts: Any) -> None:
    for rank in facts:
        found = rank["checkpoint"]
        assert found["seen_save"] == [["before_save", STEPS], ["after_save", STEPS]]
        assert found["loaded"] == ["loaded", STEPS]
        assert found["step"] == STEPS
        assert len(set(found["digests"])) == 1
        assert found["resolved_stored"]


def test_scalars_reach_deepspeeds_monitor(facts: Any) -> None:
    samples = STEPS * 2 * 4 * 2  # steps, micro-batches, batch, ranks
    assert facts[0]["checkpoint"]["monitor"] == [f"{samples},1.5"]


def test_failing_listener_is_named_and_leaves_no_thread(facts: Any) -> None:
    for rank in facts:
        found = rank["failure"]
        assert found["text"] == 'plugin "probe" failed in after_backward: asked to fail'
        assert found["at_start"] == 'plugin "probe" failed in optimizer_built: asked to fail'
        assert found["threads"] == []


def test_pipeline_engine_fires_per_micro_batch_and_once_per_update(facts: Any) -> None:
    for rank in facts:
        found = rank["pipeline"]
        assert found["probe"] == found["stock"]
        assert found["class"] == "PipelineEngine"
        names = [name for name, _ in found["seen"]]
        for name in MICRO_BATCH:
            assert names.count(name) == 4, name  # 2 batches of 2 micro-batches
        assert names.count("before_update") == names.count("after_update") == 2
        # Within a batch every backward comes before the update.
        first_update = names.index("before_update")
        assert names[:first_update].count("after_backward") == 2
