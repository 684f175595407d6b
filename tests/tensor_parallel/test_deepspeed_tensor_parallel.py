"""From the JSON alone, inside an unmodified DeepSpeed: the same training on 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_command, run_ranks
from tests.tensor_parallel.deepspeed_worker import CASES

pytestmark = pytest.mark.dist
WORKER = "tests.tensor_parallel.deepspeed_worker"


def results(action: str, folder: Path, *, nproc: int, degree: int) -> list[Any]:
    return run_ranks(
        ["-m", WORKER, action, str(folder), str(degree)], nproc=nproc, timeout_s=300
    ).check().results  # fmt: skip


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the distance of all tensors in `wanted`, as one vector, over its length."""
    errors = [(found[name].double() - value.double()).norm() for name, value in wanted.items()]
    sizes = [value.double().norm() for value in wanted.values()]
    return float(torch.stack(errors).norm() / torch.stack(sizes).norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = results("matrix", folder, nproc=1, degree=1)[0]
    return facts


@pytest.mark.parametrize(("nproc", "degree"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_training_is_that_of_one_rank(
    single: dict[str, Any], folder: Path, nproc: int, degree: int
) -> None:
    ranks = results("matrix", folder, nproc=nproc, degree=degree)
    for number, case in enumerate(CASES):
        tolerance = 2e-6 if case.dtype == "fp32" else 5e-3
        expected = single[case.name]
        for facts in ranks:
            found = facts[case.name]
            assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance), case.name
            assert found["norms"] == pytest.approx(expected["norms"], rel=tolerance), case.name
        reference = torch.load(folder / f"{number}.1.1.pt")
        weights = torch.load(folder / f"{number}.{nproc}.{degree}.pt")
        assert weights.keys() == reference.keys()
        if case.dtype == "fp32":
            for layer in {name.rpartition(".")[0] for name in reference}:
                # Weight and bias are one affine map; a bias alone starts at zero, where the
                # update of a gradient that ought to vanish is rounding and nothing else.
                of_layer = {n: v for n, v in reference.items() if n.rpartition(".")[0] == layer}
                assert relative_error(weights, of_layer) <= tolerance, (case.name, layer)
        else:
            assert relative_error(weights, reference) <= 1e-3, case.name


def test_norms_are_known_where_deepspeed_tells_them(single: dict[str, Any]) -> None:
    told = [all(norm > 0 for norm in single[case.name]["norms"]) for case in CASES]
    assert told == [case.stage > 0 or case.dtype != "fp32" for case in CASES]


def test_full_rank_from_svd_computes_what_stock_computes(tmp_path: Path) -> None:
    for facts in results("stock", tmp_path, nproc=2, degree=2):
        assert facts["found"] == pytest.approx(facts["expected"], rel=2e-6)
        assert facts["logits"] <= 2e-6


def test_checkpoints_resume_at_any_degree(tmp_path: Path) -> None:
    expected = results("save", tmp_path, nproc=2, degree=2)[0]
    assert results("load", tmp_path, nproc=2, degree=2)[0] == expected, "bit for bit"
    run_command(
        ["python", "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder",
         str(tmp_path / "saved"), "--output_folder", str(tmp_path / "universal"),
         "--num_extract_workers", "1", "--num_merge_workers", "1"],
    ).check()  # fmt: skip
    (tmp_path / "latest_universal").write_text("universal")
    assert results("load", tmp_path, nproc=2, degree=2)[0] == expected, "bit for bit"
    for degree in (1, 4):
        for facts in results("load", tmp_path, nproc=degree, degree=degree):
            assert facts["losses"] == pytest.approx(expected["losses"], rel=2e-4)
            assert facts["norms"] == pytest.approx(expected["norms"], rel=5e-3)


def test_together_with_lazy_checkpoints(tmp_path: Path) -> None:
    for facts in results("lazy", tmp_path, nproc=2, degree=2):
        assert facts["found"] == facts["expected"]


def test_together_with_planned_updates(tmp_path: Path) -> None:
    for facts in results("offload", tmp_path, nproc=2, degree=2):
        assert facts["planned"] == facts["stock"], "bit for bit"
        assert len(set(facts["stock"]["losses"])) == 5


def test_faults_are_told_on_every_rank_and_leave_a_working_process(tmp_path: Path) -> None:
    wanted = {
        "degree": "ConfigError: lowtide.tensor_parallel.degree: got 3, which does not divide the 2",
        "mpu": "ConfigError: lowtide.tensor_parallel.degree: got 2, but the mpu given to "
        "initialize has 1 model-parallel ranks",
        "groups": "ModelError: model.layers.0.attention_in.down.weight joins projections that "
        "were in parameter groups 0 and 1",
        "left out": "ModelError: model.layers.0.self_attn.k_proj.weight is in no parameter group, "
        "but it is one parameter (model.layers.0.attention_in.down.weight)",
        "labels": "ModelError: lowtide.tensor_parallel: the 2 ranks of one tensor-parallel group "
        "got different labels",
        "save_pretrained": "ModelError: save_pretrained: the model is spread over ranks",
        "frozen": "ModelError: exclude_frozen_parameters: got True, allowed is False",
        "other degree": "ConfigError: lowtide.tensor_parallel.degree: got 1, but checkpoint",
        "other degree, lazy": "ConfigError: lowtide.tensor_parallel.degree: got 1, but checkpoint",
        "other activation": "ConfigError: lowtide.tensor_parallel.activation: got silu, but",
        "same again": "nothing",
        "foreign": "ModelError: a parameter of shape (101, 64) in model_parameters or in the "
        "optimizer is not one of the model's",
        "optimizer": "ModelError: lowtide.tensor_parallel: the optimizer has already made steps",
        "pattern": "ModelError: Linear: no pattern matches this model",
        "data": "ModelError: lowtide.tensor_parallel: the 2 ranks of one tensor-parallel group "
        "got different batches",
    }
    ranks = results("faults", tmp_path, nproc=2, degree=2)
    for facts in ranks:
        for fault, text in wanted.items():
            assert facts[fault].startswith(text), fault
        assert facts["own optimizer"] == ranks[0]["own optimizer"]
        assert len(set(facts["own optimizer"])) == 3
        assert facts["own loader"] == ranks[0]["own loader"], "DeepSpeed's loader goes by the mpu"
        assert len(facts["own loader"]) == 2
        assert facts["compiled"] == facts["not compiled"]
        assert facts["whole"]
