"""Megatron-core host: one start of 2 ranks, many checks on what it left."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytest.importorskip("megatron.core.package_info")

pytestmark = pytest.mark.dist
STEPS = 3
FORWARD = ["before_forward", "after_forward"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron")
    result = run_ranks(["tests/hosts/megatron_worker.py", str(folder)], timeout_s=180).check()
    return result.results


def names(facts: dict[str, Any]) -> list[str]:
    return [event for event, _, _ in facts["events"]]


@pytest.mark.parametrize("mode", ["data", "pipeline"])
def test_losses_and_parameters_are_bit_identical_when_attached(
    ranks: list[dict[str, Any]], mode: str
) -> None:
    for facts in ranks:
        stock, attached = facts[mode]["losses"]
        assert stock == attached
        assert len(stock) == (2 * STEPS if facts[mode]["is_last"] else 0)
        assert facts[mode]["digests"][0] == facts[mode]["digests"][1]


def test_events_come_in_order_when_data_parallel(ranks: list[dict[str, Any]]) -> None:
    micro_batch = [*FORWARD, "after_backward"]
    step = [*micro_batch, *micro_batch, "before_update", "after_update", "after_step"]
    start = ["configured", "model_built", "optimizer_built"]
    for facts in ranks:
        assert names(facts["data"]) == [*start, *step * STEPS]
        assert [e[1] for e in facts["data"]["events"][3:11]] == [0, 0, 0, 1, 1, 1, None, None]
        assert facts["data"]["events"][10][2] is True
        assert facts["data"]["step"] == STEPS


def test_events_follow_the_schedule_when_pipeline_parallel(ranks: list[dict[str, Any]]) -> None:
    update = ["before_update", "after_update", "after_step"]
    # The first stage runs one micro-batch ahead, the last one alternates.
    first = [*FORWARD, *FORWARD, "after_backward", "after_backward", *update]
    last = [*FORWARD, "after_backward", *FORWARD, "after_backward", *update]
    for facts, step in zip(ranks, (first, last), strict=True):
        assert names(facts["pipeline"])[3:] == step * STEPS
        backward = [e[1] for e in facts["pipeline"]["events"] if e[0] == "after_backward"]
        assert backward == [0, 1] * STEPS


def test_spans_are_recorded_once_per_micro_batch_and_update(ranks: list[dict[str, Any]]) -> None:
    spans = ranks[0]["pipeline"]["spans"]
    counts = {name: entry["count"] for name, entry in spans.items()}
    assert counts == {"forward": 2 * STEPS, "backward": 2 * STEPS, "update": STEPS}


@pytest.mark.parametrize("mode", ["data", "pipeline"])
def test_close_leaves_no_trace(ranks: list[dict[str, Any]], mode: str) -> None:
    for facts in ranks:
        assert facts[mode]["trace_differs_while_attached"]  # else the comparison proves nothing
        assert facts[mode]["trace_after_close"]
        assert facts[mode]["events_after_close"] == 0


def test_before_update_fires_before_any_parameter_changes(ranks: list[dict[str, Any]]) -> None:
    digests = ranks[0]["update"]["digests"]
    assert digests["before_update"] == digests["start"]
    assert digests["after_update"] != digests["start"]


def test_after_backward_sees_the_gradients_of_its_micro_batch(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks[0]["update"]["gradients"][:2]
    assert 0 < first != second > 0


def test_skipped_update_fires_after_update_alone(ranks: list[dict[str, Any]]) -> None:
    facts = ranks[0]["update"]
    assert facts["skip_result"] == [False, None, None]
    last = ["after_step", None, None]
    assert facts["skip"] == [["after_backward", 1, None], ["after_update", None, False], last]
    assert facts["skip_unchanged"]
    assert facts["skip_step"] == 2
    assert facts["skip_counters"]["lowtide.core.skipped_updates_count"] == 1
    assert facts["skip_update_spans"]["count"] == 1


def test_update_events_fire_when_the_loop_takes_step_apart(ranks: list[dict[str, Any]]) -> None:
    expected = [["before_update", None, None], ["after_update", None, True]]
    expected.append(["after_step", None, None])
    assert ranks[0]["update"]["apart"] == expected


def test_evaluation_fires_forward_only_and_says_so(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["update"]["evaluation"] == FORWARD * 2
    assert ranks[0]["update"]["evaluation_training"] is False


def test_save_and_load_contexts_fire_around_the_loops_own_files(
    ranks: list[dict[str, Any]],
) -> None:
    facts = ranks[0]["checkpoint"]
    seen, data = facts["saved"]
    assert seen == [["before_save", STEPS], ["after_save", STEPS]]
    assert {entry["tag"] for entry in data} == {"a"}
    assert all(entry["path"].endswith("rank0.pt") for entry in data)
    assert facts["failed"] == "before_save"  # a save that failed is never announced as done
    assert facts["loaded"] == ["loaded", STEPS]


def test_plain_torch_optimizer_and_structured_outputs_work(ranks: list[dict[str, Any]]) -> None:
    events = ranks[0]["torch"]
    step = [*FORWARD, "after_backward", "before_update", "after_update", "after_step"]
    assert [event for event, _, _ in events][3:] == [*step, *step, "closed"]
    assert [number for _, number, _ in events if number is not None] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        ("no_block", ["ConfigError", '"lowtide" block', "add one"]),
        ("no_method", ["HostError", "object has no method step", "get_megatron_optimizer"]),
        ("mixed", ["HostError", "chunk 1", "overlap_moe_expert_parallel_comm", "switch it off"]),
        ("graphed", ["HostError", "chunk 0", "full_iteration"]),
        ("listener", ["PluginError", '"probe"', "optimizer_built"]),
        ("twice", ["HostError", "already", "close that loop"]),
        ("moved", ["HostError", "MegatronOptimizer.moved", "megatron-core"]),
    ],
)
def test_refusal_says_what_and_what_to_do(
    ranks: list[dict[str, Any]], attempt: str, parts: list[str]
) -> None:
    text = ranks[0]["errors"][attempt]
    for part in parts:
        assert part in text


def test_failed_attach_leaves_no_hook(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["errors"]["left_behind"] == "0"
