"""Behind an unmodified DeepSpeed on 2 ranks: stock reads what we write, we what stock writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint import list_checkpoints, verify
from tests.checkpoint.test_torch_file import assert_same
from tests.helpers.ranks import environment, run_ranks

pytestmark = pytest.mark.dist
WORKER = "tests.checkpoint.deepspeed_worker"
STAGES = ["0", "1", "2", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def stages(folder: Path) -> list[Any]:
    return run_ranks(["-m", WORKER, str(folder), "stages"], timeout_s=240).check().results


@pytest.fixture(scope="module")
def others(folder: Path) -> list[Any]:
    return run_ranks(["-m", WORKER, str(folder), "others"], timeout_s=240).check().results


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_bit_for_bit_as_with_stock(stages: list[Any], stage: str) -> None:
    for rank in range(2):
        facts = stages[rank][stage]
        assert facts["lazy"] == facts["stock"]
        assert facts["committed"] is True


@pytest.mark.parametrize("stage", STAGES)
def test_stock_and_lazy_load_each_others_files(stages: list[Any], stage: str) -> None:
    for rank in range(2):
        facts = stages[rank][stage]
        expected = facts["stock in stock"]
        for pair in ("stock in lazy", "lazy in stock", "lazy in lazy"):
            extra = {name: expected[name] for name in ("path", "loads from memory")}
            assert {**facts[pair], **extra} == expected, pair
        # The model's file, and this rank's part of the optimizer; stock files have no checksums.
        loads = [facts[f"{pair} in lazy"]["loads from memory"] for pair in ("stock", "lazy")]
        assert loads == [0, 1 if stage == "0" else 2]
        # Buffers and what the script owns are of the moment of the save, not of the capture.
        assert expected["calls"] == 6
        assert expected["client_state"] == {"average": "tensor([1., 1., 1.])", "note": "mine"}


@pytest.mark.parametrize("stage", STAGES)
def test_files_hold_what_stock_files_hold(stages: list[Any], folder: Path, stage: str) -> None:
    assert stages
    stock, lazy = folder / stage / "stock/global_step3", folder / stage / "lazy/global_step3"
    names = sorted(path.name for path in stock.iterdir())
    assert names
    extra = {"lowtide.json", "manifest-00000.json", "manifest-00001.json"}
    assert {path.name for path in lazy.iterdir()} == {*names, *extra}
    for name in names:
        expected = torch.load(stock / name, weights_only=False)
        found = torch.load(lazy / name, weights_only=False, mmap=True)
        for state in (expected, found):
            state.pop("ds_config", None)  # ours has the block in it
        assert plain(found) == plain(expected)
        if stage != "3":  # whose padding is memory that nobody has written to
            assert_same(tensors(found), tensors(expected))
    assert verify(lazy).is_ok


def tensors(value: Any) -> Any:
    """Return the tensors of a state in the order in which they are met."""
    if isinstance(value, torch.Tensor):
        return [value.detach().contiguous()]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors(each)]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return []


def plain(value: Any) -> Any:
    """Return a state's structure, with shapes for tensors."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape))
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if not hasattr(value, "__dict__") else type(value).__name__


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_zero_to_fp32_reads_both_alike(stages: list[Any], folder: Path, stage: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    assert stages
    stock = get_fp32_state_dict_from_zero_checkpoint(str(folder / stage / "stock"))
    lazy = get_fp32_state_dict_from_zero_checkpoint(str(folder / stage / "lazy"))
    assert_same(dict(lazy), dict(stock))


def test_ds_to_universal_reads_both_alike(stages: list[Any], folder: Path) -> None:
    assert stages
    for name in ("stock", "lazy"):
        source, target = folder / "2" / name / "global_step3", folder / f"universal-{name}"
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(source), "--output_folder", str(target)]
        command += ["--inject_missing_state"]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True)
    stock = sorted((folder / "universal-stock/zero").rglob("*.pt"))
    assert len(stock) >= 15  # five parameters, three states each
    for path in stock:
        other = folder / "universal-lazy/zero" / path.relative_to(folder / "universal-stock/zero")
        assert_same(
            tensors(torch.load(other, weights_only=False)),
            tensors(torch.load(path, weights_only=False)),
        )


def test_single_file_is_written_at_once(stages: list[Any]) -> None:
    assert all(stages[0][stage]["16 bit"] for stage in ("0", "1", "2"))


def test_all_ranks_fall_back_to_the_newest_whole_one(others: list[Any]) -> None:
    for facts in others:
        assert facts["fallback"]["fallback"] == 2


def test_nothing_is_loaded_when_all_are_damaged(others: list[Any]) -> None:
    for facts in others:
        assert facts["fallback"]["all damaged"] is None


def test_damaged_checkpoint_that_was_asked_for_raises_on_all_ranks(others: list[Any]) -> None:
    for facts in others:
        text = facts["fallback"]["explicit"]
        assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in text
        assert "are not what was written" in text
        assert "Name another tag" in text


def test_folder_that_cannot_be_written_is_told_and_training_goes_on(others: list[Any]) -> None:
    for facts in others:
        assert facts["fault"]["warn"] == "went on"
        assert "cannot be made (Not a directory)" in facts["fault"]["warn error"]


def test_folder_that_is_none_fails_on_all_ranks_and_none_waits(others: list[Any]) -> None:
    for facts in others:
        is_there, error = facts["naming"]["taken"]
        assert not is_there
        assert "rank 0: " in error
        assert "rank 1: " in error


def test_copying_the_scripts_of_deepspeed_keeps_no_save(others: list[Any]) -> None:
    for facts in others:
        assert facts["naming"]["scripts"] == [True, True]


@pytest.mark.parametrize("tag", ["run/a/step1", "7"])
def test_tag_may_be_a_path_or_a_number(others: list[Any], folder: Path, tag: str) -> None:
    for facts in (each["naming"] for each in others):
        wanted = folder / "naming" / "tags" / tag / "mp_rank_00_model_states.pt"
        assert facts[f"{tag} as latest"] == facts[f"{tag} by its name"] == str(wanted)


def test_tag_that_names_no_folder_is_refused_on_all_ranks(others: list[Any]) -> None:
    for facts in others:
        assert len(facts["naming"]["refused"]) == 5
        for text in facts["naming"]["refused"]:
            assert "does not begin with a dot" in text


def test_tag_that_is_not_there_is_told(others: list[Any]) -> None:
    for facts in others:
        assert 'holds no checkpoint with the tag "step9"' in facts["naming"]["missing"]


def test_level_by_another_name_is_the_level(others: list[Any], folder: Path) -> None:
    for facts in (each["naming"] for each in others):
        assert facts["alias"] == ["fast", "slow"]
        assert facts["alias loads"].startswith(str(folder / "naming" / "levels" / "fast" / "t"))


@pytest.mark.parametrize("case", ["2 to 3", "3 to 2", "3 to 3"])
def test_model_alone_comes_from_other_stages(others: list[Any], case: str) -> None:
    for facts in (each["model only"] for each in others):
        assert facts[f"{case[0]} has learnt"] is True  # or nothing could be told apart
        assert facts[case] is True
        assert facts[f"{case} steps"] == 0
        if case != "3 to 3":
            assert 'the buffers "extra"' in facts[f"{case} strict"]


def test_on_error_raise_ends_the_training(others: list[Any]) -> None:
    for facts in others:
        assert facts["fault"]["raise"].startswith("raised")
        assert "cannot be made" in facts["fault"]["raise"]


def test_lowtide_saves_by_itself_on_levels_with_retention(others: list[Any]) -> None:
    for facts in others:
        assert facts["interval"]["fast"] == ["global_step10", "global_step8"]
        assert facts["interval"]["slow"] == ["global_step4", "global_step8"]
        assert facts["interval"]["auto"] == [10]


def test_resume_takes_the_newest_of_all_levels(others: list[Any]) -> None:
    for facts in others:
        resumed = facts["interval"]["resumed"]
        assert (resumed["step"], resumed["client_state"]) == (10, {"note": "at 10"})


def test_small_copies_are_expanded_and_loaded(others: list[Any]) -> None:
    for facts in (each["compact"] for each in others):
        assert facts["from fast"]["loads from memory"] == 2
        extra = {name: facts["from fast"][name] for name in ("path", "loads from memory")}
        assert {**facts["from slow"], **extra} == facts["from fast"]
        assert "mp_rank_00_model_states.pt.compact" in facts["files"]
        assert facts["slow"] == ["global_step3"]  # what was expanded is gone again


@pytest.mark.parametrize("kind", ["pipeline", "moe"])
def test_pipelines_and_experts_resume_alike_in_stock_and_lazy(others: list[Any], kind: str) -> None:
    for facts in (each[kind] for each in others):
        assert facts["committed"] is True
        assert facts["stock"] == facts["lazy"] == facts["losses"][-len(facts["stock"]) :]
        assert "lowtide.json" in facts["files"]


def test_script_that_just_ends_leaves_a_complete_checkpoint(
    others: list[Any], folder: Path
) -> None:
    assert others
    (entry,) = list_checkpoints(folder / "last")
    assert entry.state == "complete"
    assert verify(entry.path).is_ok
