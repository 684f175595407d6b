"""Through the DeepSpeed JSON: every ZeRO stage, checkpointing, resuming. One start of 2 ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("activations")
    arguments = ["-m", "tests.compression.activations.deepspeed_worker", str(folder)]
    return run_ranks(arguments, timeout_s=300).check().results


def test_nothing_is_imported_when_it_is_off(ranks: list[dict[str, Any]]) -> None:
    assert [facts["is_imported_when_off"] for facts in ranks] == [False, False]


@pytest.mark.parametrize(("case", "bits"), [("2 fp32", "8"), ("2 fp32", "4"), ("3 bf16", "8")])
def test_losses_end_where_those_of_stock_end(
    ranks: list[dict[str, Any]], case: str, bits: str
) -> None:
    for facts in ranks:
        runs = facts["trainings"]
        stock, found = runs[f"{case} stock"]["losses"], runs[f"{case} {bits}"]["losses"]
        assert found[0] == stock[0]
        assert found != stock
        assert stock[-1] < 0.7 * stock[0]
        assert found[-1] == pytest.approx(stock[-1], rel=0.05)
        assert runs[f"{case} {bits}"]["rng"] == runs[f"{case} stock"]["rng"]


@pytest.mark.parametrize("case", ["0 fp32", "1 bf16", "2 fp32", "3 bf16"])
def test_every_stage_holds_less(ranks: list[dict[str, Any]], case: str) -> None:
    for facts in ranks:
        runs = facts["trainings"]
        summary = runs[f"{case} 8"]["facts"]
        assert summary["packed"] >= 20
        # Attention's log-sum-exp and norms, the loss's logarithms, twice: as they were.
        # (Float32 under bf16 too, where all but attention's are too small to be looked at.)
        assert summary["raw"]["statistic"] == (2 if "bf16" in case else 12)
        assert summary["raw"]["exact"] == 2
        assert summary["live_bytes"] == 0
        quantised = summary["saved_bytes"] - sum(summary["raw_bytes"].values())
        held = summary["held_bytes"] - sum(summary["raw_bytes"].values())
        item = 2 if "bf16" in case else 4
        assert held <= quantised / item * (1 + 8 / 256) * 1.001


@pytest.mark.parametrize(
    ("stage", "way"), [(2, "torch"), (3, "torch"), (3, "reentrant"), (3, "deepspeed")]
)
def test_checkpointing_holds_the_inputs_of_blocks(
    ranks: list[dict[str, Any]], stage: int, way: str
) -> None:
    for facts in ranks:
        stock = facts["trainings"]["2 fp32 stock"]["losses"][:10]
        run = facts["trainings"][f"{stage} {way}"]
        assert run["losses"][0] == pytest.approx(stock[0], rel=1e-6)
        assert run["losses"][-1] == pytest.approx(stock[-1], rel=0.05)
        assert run["losses"][-1] < 0.9 * run["losses"][0]
        # Inputs of 2 blocks, which DeepSpeed's own way keeps by itself; of the norm and the head.
        assert run["facts"]["packed"] == (2 if way == "deepspeed" else 4)


def test_gathered_weights_are_let_go_between_forward_and_backward(
    ranks: list[dict[str, Any]],
) -> None:
    for facts in ranks:
        stock, found = facts["gathered"]["stock"], facts["gathered"]["8"]
        assert found["seen"] == stock["seen"] >= 14
        assert found["kept"] == stock["kept"] == 0


def test_a_weight_gathered_by_hand_is_gathered_again(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        stock, found = facts["by hand"]["stock"], facts["by hand"]["8"]
        assert found["facts"]["packed"] == 3
        for one, other in zip(found["grads"], stock["grads"], strict=True):
            expected = torch.tensor(other)
            assert expected.norm() > 0
            assert (torch.tensor(one) - expected).norm() < 0.02 * expected.norm()


def test_a_resumed_run_goes_on_as_the_first_one_did(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["resumed"]["found"] == facts["resumed"]["expected"]


def test_stages_of_a_pipeline_hold_less(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        stock, found = facts["pipeline"]["stock"], facts["pipeline"]["8"]
        assert found["losses"][0] == stock["losses"][0]
        assert found["losses"] != stock["losses"]
        assert found["losses"] == pytest.approx(stock["losses"], rel=1e-3)
        assert found["facts"]["packed"] >= 9
        assert found["facts"]["live_bytes"] == 0


def test_evaluation_is_that_of_stock(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["evaluated"]["8"] == facts["evaluated"]["stock"]
        assert "packed" not in facts["evaluated"]["facts"]


def test_the_example_learns_and_tells_what_is_held() -> None:
    log = run_ranks(["examples/activations/held.py", "--steps", "10"]).check().logs[0]
    losses = [float(each) for each in re.findall(r"^step \d+ loss (\S+)$", log, re.MULTILINE)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1.0
    found = re.search(
        r"^held ([0-9.]+) MB of ([0-9.]+) MB: \d+ tensors in 4 bits", log, re.MULTILINE
    )
    assert found is not None
    assert float(found[2]) > 2.5 * float(found[1])
