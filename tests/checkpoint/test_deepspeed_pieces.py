"""DeepSpeed on 2 ranks: updates go through the state while the checkpoint is being written."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.dist
WORKER = "tests.checkpoint.pieces_worker"
CASES = ["stock 3", "offload 3", "stock 1"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("pieces")
    return run_ranks(["-m", WORKER, str(folder)], timeout_s=240).check().results


@pytest.mark.parametrize("case", CASES)
def test_files_are_of_the_request_though_the_update_begins_before_they_are_captured(
    results: list[Any], case: str
) -> None:
    for rank, facts in enumerate(each[case] for each in results):
        assert facts["error"] is None
        assert facts["committed"] is True
        assert f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in facts["files"]
        assert facts["same"] == [True] * len(facts["files"])
        # Owners asked piece by piece, and other pieces were still in place then.
        assert len(facts["left"]) >= 2
        assert facts["left"][0] > facts["left"][-1] >= 0
        assert facts["hurried_bytes"] > 0


@pytest.mark.parametrize("case", CASES)
def test_counts_say_which_way_the_bytes_went(results: list[Any], case: str) -> None:
    for facts in (each[case] for each in results):
        assert facts["staged_bytes"] >= facts["hurried_bytes"]
        assert facts["direct_bytes"] + facts["staged_bytes"] == facts["captured_bytes"]
        assert len(facts["update_waits_s"]) == 1
        summary = facts["summary"]
        assert summary["direct_bytes"] == facts["direct_bytes"]
        assert summary["hurried_bytes"] == facts["hurried_bytes"]
        assert summary["update_wait_max_s"] >= facts["update_waits_s"][0] > 0.0


def test_files_would_be_torn_if_nobody_waited(results: list[Any]) -> None:
    for facts in (each["careless"] for each in results):
        assert False in facts["same"]


def test_optimizer_has_its_own_method_back_in_the_end(results: list[Any]) -> None:
    for facts in results:
        assert [facts[case]["hooked"] for case in CASES] == [[True, False]] * len(CASES)
