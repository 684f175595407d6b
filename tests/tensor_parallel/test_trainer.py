"""Hugging Face `Trainer` and Accelerate with one model on two ranks: the training of one rank."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.tensor_parallel import TensorParallelConfig, factorise
from tests.helpers.ranks import run_ranks
from tests.tensor_parallel import trainer_worker as worker

pytestmark = pytest.mark.dist


def start(folder: Path, nproc: int, degree: int) -> list[dict[str, Any]]:
    argv = ["-m", worker.__name__, str(folder / str(nproc)), str(degree)]
    return run_ranks(argv, nproc=nproc, timeout_s=300).check().results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def starts(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """One rank, one model on two ranks, two models on two ranks each; all with the same batches."""
    return {nproc: start(folder, nproc, degree) for nproc, degree in ((1, 1), (2, 2), (4, 2))}


@pytest.mark.parametrize("nproc", [2, 4])
def test_trainer_trains_and_evaluates_as_on_one_rank(
    starts: dict[int, list[dict[str, Any]]], nproc: int
) -> None:
    (alone,) = starts[1]
    assert len(alone["losses"]) == worker.STEPS
    assert len(set(alone["losses"])) == worker.STEPS
    for facts in starts[nproc]:
        for name in ("losses", "norms", "epoch"):
            assert facts[name] == pytest.approx(alone[name], rel=2e-6), name
        for found, wanted in zip(facts["evaluations"], alone["evaluations"], strict=True):
            assert found == pytest.approx(wanted, rel=2e-6)
            assert found["samples"] == worker.EVALUATED, "each sample once"


def test_trainer_resumes_bit_for_bit(starts: dict[int, list[dict[str, Any]]]) -> None:
    for facts in starts[2]:
        assert facts["resumed"] == facts["losses"][worker.SAVED :]


def test_ranks_of_one_model_shuffle_alike_whatever_their_seeds(
    starts: dict[int, list[dict[str, Any]]],
) -> None:
    first, second = (facts["shuffled"] for facts in starts[2])
    assert first == second
    assert len({tuple(each) for each in first}) == len(first) == 6, "another order each time"
    assert {tuple(sorted(each)) for each in first} == {tuple(range(32))}


def test_checkpoint_files_are_as_deepspeed_alone_writes_them(
    starts: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    assert starts[2]
    paths = [*(folder / "2" / f"checkpoint-{worker.SAVED}").glob("global_step*/*.pt")]
    assert len(paths) == 4, "weights and optimizer of two ranks"
    for path in paths:
        assert classes_in(path)
        assert not [each for each in classes_in(path) if "lowtide" in each]
        saved = torch.load(path, weights_only=False)["ds_config"]
        assert "lowtide" in saved
        assert "tensor_parallel" not in saved


def classes_in(path: Path) -> list[str]:
    """Return what a file of `torch.save` needs to be read: modules and names in them."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith("/data.pkl"))
        code = archive.read(name)
    return [str(text) for op, text, _ in pickletools.genops(code) if op.name == "GLOBAL"]


@pytest.mark.parametrize("nproc", [1, 2, 4])
def test_trainer_saves_the_whole_low_rank_model(
    starts: dict[int, list[dict[str, Any]]], folder: Path, nproc: int
) -> None:
    from safetensors.torch import load_file

    path = folder / str(nproc) / f"checkpoint-{worker.STEPS}" / "model.safetensors"
    model = worker.model()
    block = worker.settings(1)["lowtide"]["tensor_parallel"]
    factorise(model, TensorParallelConfig(**block))
    model.load_state_dict(load_file(path))
    samples = worker.Samples(worker.EVALUATED, has_gaps=False)
    with torch.no_grad():
        loss = float(model(samples.tokens, labels=samples.labels).loss)
    assert loss == pytest.approx(starts[nproc][0]["evaluations"][-1]["loss"], rel=2e-6)


def test_accelerate_goes_by_groups_that_share_batches(
    starts: dict[int, list[dict[str, Any]]],
) -> None:
    ranks = [facts["own loop"] for facts in starts[4]]
    first, second = [[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 0]]
    assert [facts["alone"] for facts in ranks] == [first, first, second, second]
    halves = [[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]
    assert [facts["split"] for facts in ranks] == [halves[0], halves[0], halves[1], halves[1]]
    for facts in ranks:
        assert facts["batch"] == 4, "two batches of two"
        assert facts["tensors"] == list(range(11))
        assert facts["no samples"] == [0, 3]
        assert facts["objects"] == [str(each) for each in range(11)]
        assert facts["lr"] == pytest.approx([1e-4 * (1 + 3 * 2)]), "two for each of three steps"
        assert facts["dispatched"].startswith("dispatch_batches: rank 0 would read all batches")
    assert [facts["planned steps"] for facts in starts[4]] == [6] * 4
    low_rank = worker.model()
    factorise(low_rank, TensorParallelConfig(degree=1, rank=16))
    names = sorted(low_rank.state_dict())
    assert [facts["weights"] for facts in ranks] == [names, [], names, []]
