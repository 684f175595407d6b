"""Behind Megatron-core's own CPU offload: the bits of stock, whatever is updated where and when.

One start of 2 ranks; Megatron believes that the CPU is a GPU (`tests.helpers.pretend_gpu`).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytest.importorskip("megatron.core.package_info")

pytestmark = pytest.mark.dist
STEPS = 30
CASES = [
    "fp32, every rank all",
    "fp32 masters on the GPU too",
    "bf16",
    "bf16, half on the host, one AdamW, no clipping",
    "fp16 with skipped steps",
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron_offload")
    result = run_ranks(["-m", "tests.offload.megatron_worker", str(folder)], timeout_s=400)
    return result.check().results


@pytest.mark.parametrize("plan", ["random", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_losses_norms_weights_and_state_are_those_of_stock(
    ranks: list[dict[str, Any]], name: str, plan: str
) -> None:
    for facts in ranks:
        case = facts["cases"][name]
        log, state = case["stock"]
        assert len(log) == STEPS
        for number, (found, wanted) in enumerate(zip(case[plan][0], log, strict=True)):
            assert found == wanted, f"step {number}"
        assert case[plan][1] == state
        assert case["tails"] > 0  # elements that are left to torch's kernel


def test_state_in_files_gives_the_bits_of_stock(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        case = facts["cases"]["fp16 with skipped steps"]
        assert case["stored"] == case["stock"]
        assert {"read0", "read1", "write0", "write1", "device"} <= set(case["stored lanes"])
        summary = case["stored summary"]
        assert summary["host_memory_bytes"] <= 12 * 7000
        assert sum(each["stored_bytes"] for each in summary["storage"]) > 12 * 5000
        assert summary["storage_moves"]["pieces"] > 0


def test_whatever_fails_on_one_rank_ends_all(ranks: list[dict[str, Any]]) -> None:
    first, last = (facts["failing alone"] for facts in ranks)
    assert [each.split(": ")[-1] for each in last] == ["not enough memory"] * 3
    assert first[0].startswith("ConfigError: lowtide.offload.storage: a rank has no optimizer")
    assert first[1].startswith("StorageError: offload.storage: another rank cannot store its")
    assert first[2].startswith("StorageError: offload.storage: another rank has failed in its")


@pytest.mark.parametrize("name", CASES)
def test_updates_are_planned_and_run_on_host_and_device(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for facts in ranks:
        case = facts["cases"][name]
        applied = [is_applied for is_applied, *_ in case["stock"][0]]
        assert ("fp16" in name) == (False in applied)
        assert case["random updates"] == case["auto updates"] == sum(applied)
        assert set(case["random lanes"]) == {"host", "prefetch", "device", "flush", "upload"}
        assert case["random away"][0] > 0, "some state stays on the device between steps"


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        *itertools.product(["stock", "planned"], repeat=2),
        ("stock", "stored"),
        ("stored", "stock"),
        ("stored", "stored"),
    ],
)
def test_saved_by_one_and_continued_by_the_other(
    ranks: list[dict[str, Any]], writer: str, reader: str
) -> None:
    for facts in ranks:
        log, _ = facts["resume"][f"{writer} to {reader}"]
        assert log == facts["cases"]["bf16"]["stock"][0][10:16]
        assert facts["resume"][f"{writer} to {reader}"] == facts["resume"]["stock to stock"]


@pytest.mark.parametrize("name", ["stock", "planned", "stored"])
def test_loading_into_a_run_that_goes_on(ranks: list[dict[str, Any]], name: str) -> None:
    for facts in ranks:
        found = facts["resume"][f"{name}, loaded into itself"]
        assert found == facts["resume"]["stock to stock"]
        assert facts["resume"][f"{name} away after saving"] == 0
        assert facts["resume"].get(f"{name} updates after loading", 6) == 6


@pytest.mark.parametrize("way", ["state", "state_dict", "update_fp32_param_by_new_param"])
def test_readers_find_the_newest_state_on_the_host(ranks: list[dict[str, Any]], way: str) -> None:
    for facts in ranks:
        assert min(facts["readers"]["away"]) > 0  # else the test proves nothing
        assert facts["readers"][way] == [0, True]


def test_an_update_begins_when_all_gradients_have_come(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["readers"]["pending"] == [0] * len(facts["readers"]["pending"])
        assert len(facts["readers"]["pending"]) > 4


def test_closing_gives_megatron_its_optimizer_back(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        assert facts["readers"]["changed"]
        assert facts["readers"]["restored"]
        stock, planned = facts["readers"]["goes on"]
        assert stock == planned


def test_no_group_of_ranks_stays_behind(ranks: list[dict[str, Any]]) -> None:
    """Of runs with storage: one to its end, one each that a rank ended early."""
    assert [facts["groups"] for facts in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        ("bare", ["ConfigError", "AdamW keeps its state", "optimizer_cpu_offload=True"]),
        ("off", ["ConfigError", "FP32Optimizer keeps its state", "optimizer_cpu_offload=True"]),
        ("fraction", ["ConfigError", "optimizer_offload_fraction is 0.0", "set it to 1.0"]),
        ("sgd", ["ConfigError", "torch.optim.sgd.SGD", 'OptimizerConfig.optimizer="adam"']),
        ("adam", ["ConfigError", "torch.optim.adam.Adam", "allowed is torch.optim.AdamW"]),
        ("beta1", ["ConfigError", "adam_beta1 is 0.5", "more than 0.5"]),
        ("fused", ["ConfigError", "fused=False, allowed is True", "set it so"]),
        ("amsgrad", ["ConfigError", "amsgrad=True, allowed is False"]),
        ("maximize", ["ConfigError", "maximize=True, allowed is False"]),
        ("replaced", ["ConfigError", "has replaced the parameters", "use_distributed_optimizer"]),
        ("two", ["ConfigError", "made 2 optimizers", "allowed is 1"]),
        ("fsdp", ["ConfigError", "use_megatron_fsdp is True, allowed is False"]),
        ("moved", ["HostError", "has no _init_sub_optimizers", "install megatron-core 0.16.1"]),
        ("no gradient", ["HostError", "shape (257, 20) has never had a gradient", "freeze"]),
    ],
)
def test_refusal_says_what_and_what_to_do(
    ranks: list[dict[str, Any]], attempt: str, parts: list[str]
) -> None:
    text = ranks[0]["refusals"][attempt]
    for part in parts:
        assert part in text
    assert ranks[0]["refusals"]["good"] == "no error"
