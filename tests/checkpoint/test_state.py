"""Reading checkpoints without ranks: against DeepSpeed's own converters, and export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.state import export, load_state, open_state, safetensors_file
from lowtide.core.errors import CheckpointError
from tests.helpers.ranks import run_ranks

WORKER = "tests/checkpoint/reshard_worker.py"
NAMES = [
    ["embed.weight", "first.weight", "last.weight"],
    ["gain", "first.bias", "norm.weight", "norm.bias"],
]
ONE_GROUP = [["gain", "embed.weight", "first.weight", "first.bias", "norm.weight", "norm.bias",
              "last.weight"]]  # fmt: skip
TIED = ("head.weight", "embed.weight")

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that 3 ranks saved, and what stock makes of them."""
    folder = tmp_path_factory.mktemp("state")
    run_ranks([WORKER, str(folder), "save", "contents"], nproc=3, timeout_s=250).check()
    return folder


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


CASES = ["w3_z1_fp32", "w3_z1_bf16", "w3_z2_fp32", "w3_z2_bf16", "w3_z3_fp32", "w3_z3_bf16",
         "z2_fp16", "order", "unfrozen", "llama"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_load_state_is_what_zero_to_fp32_gives(root: Path, case: str) -> None:
    stock = torch.load(root / case / "stock.pt")
    ours = load_state(root / case / "tag")
    names = [*ours]
    if "z1" in case:  # stock forgets the frozen parameters of stage 1
        assert "frozen.weight" not in stock
        names = [name for name in names if not name.startswith("frozen.")]
        weights = torch.load(root / case / "truth.pt")["weights"]
        assert same(ours["frozen.weight"], weights["frozen.weight"])
    assert names == [*stock]
    assert [name for name in names if not same(ours[name], stock[name])] == []
    if case == "llama":
        assert ours["lm_head.weight"] is ours["model.embed_tokens.weight"]
    else:
        assert ours[TIED[0]] is ours[TIED[1]]


@pytest.mark.parametrize("case", ["w3_z1_bf16", "w3_z2_fp32", "w3_z3_bf16"])
def test_optimizer_states_are_what_ds_to_universal_gives(root: Path, case: str) -> None:
    for kind in ("exp_avg", "exp_avg_sq"):
        ours = load_state(root / case, kind=kind)  # through the file latest
        assert {*ours} == {*NAMES[0], *NAMES[1], TIED[0]}
        for name in [*NAMES[0], *NAMES[1]]:
            path = root / case / "universal" / "zero" / name / f"{kind}.pt"
            stock = torch.load(path, weights_only=False)
            stock = stock["param"] if isinstance(stock, dict) else stock
            assert torch.equal(ours[name].reshape(-1), stock.reshape(-1)), (kind, name)
            assert ours[name].abs().sum() > 0


def test_load_state_reads_stage_0(root: Path) -> None:
    weights = torch.load(root / "z0_fp32" / "truth.pt")["weights"]
    ours = load_state(root / "z0_fp32")
    assert {*ours} == {*weights, TIED[0]}
    assert all(same(ours[name], weights[name]) for name in weights)
    assert ours[TIED[0]] is ours[TIED[1]]
    with pytest.raises(CheckpointError, match=r'no state "exp_avg".*"fp32".*\[3, 4\].*give names='):
        load_state(root / "z0_fp32", kind="exp_avg")
    named = load_state(root / "z0_fp32", kind="exp_avg", names=NAMES)
    assert named["first.weight"].shape == (13, 7)
    with pytest.raises(CheckpointError, match=r'"last.weight" has shape .* give names='):
        load_state(root / "z0_fp32", kind="exp_avg", names=[NAMES[0][::-1], NAMES[1]])


def test_stage_0_gives_masters_when_weights_have_16_bits(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[7\] per group\) instead of names; give names="):
        load_state(root / "z0_bf16")
    weights = torch.load(root / "z0_bf16" / "truth.pt")["weights"]
    ours = load_state(root / "z0_bf16", names=ONE_GROUP)
    for name in ONE_GROUP[0]:
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name].bfloat16(), weights[name])
    assert not torch.equal(ours["first.weight"], weights["first.weight"].float())


@pytest.mark.parametrize("case", ["w3_z2_bf16", "w3_z3_fp32", "order"])
def test_any_interval_is_the_same_part_of_the_whole(root: Path, case: str) -> None:
    state = open_state(root / case)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in state.parameters.items():
        kinds = state.kinds if parameter.group is not None else ("fp32",)
        for kind in kinds:
            whole = state.tensor(name, kind).reshape(-1)
            for _ in range(8):
                begin, end = sorted(
                    torch.randint(0, parameter.numel + 1, (2,), generator=generator).tolist()
                )
                assert torch.equal(state.read(name, kind, begin, end), whole[begin:end])
                out = torch.full((end - begin,), -7.0, dtype=torch.float64)
                state.read_into(out, name, kind, begin)
                assert torch.equal(out, whole[begin:end].double())
    with pytest.raises(CheckpointError, match='"gain" has elements 0 to 1, not 0 to 2'):
        state.read("gain", "fp32", 0, 2)
    with pytest.raises(CheckpointError, match=r'no parameter "irst.weight".*"first.weight"'):
        state.read("irst.weight", "fp32", 0, 2)
    with pytest.raises(CheckpointError, match=r'no state "momentum".*"exp_avg"'):
        state.read("first.weight", "momentum", 0, 2)
    assert {float(state.scalars(name)["step"]) for group in NAMES for name in group} == {3.0}


def test_only_files_that_hold_the_interval_are_opened(root: Path) -> None:
    prefix, suffix = "bf16_zero_pp_rank_", "_mp_rank_00_optim_states.pt"
    state = open_state(root / "w3_z3_bf16")
    numel = state.parameters["embed.weight"].numel
    state.read("embed.weight", "exp_avg", numel - 1, numel)
    optimizers = [name for name in state.files.opened if name.endswith(suffix)]
    assert optimizers == [f"{prefix}0{suffix}", f"{prefix}2{suffix}"]
    # Rank 0's file says how everything is laid out; of the others, only what was asked for.
    assert len(state.files.opened) == 3


def test_zero_stages_differ_only_in_layout(root: Path) -> None:
    for precision in ("fp32", "bf16"):
        for kind in ("fp32", "exp_avg"):
            one, two, three = (
                load_state(root / f"w3_z{stage}_{precision}", kind=kind) for stage in (1, 2, 3)
            )
            assert one.keys() == two.keys() == three.keys()
            for name in one:
                assert torch.allclose(one[name].double(), two[name].double(), atol=1e-4)
                assert torch.allclose(one[name].double(), three[name].double(), atol=1e-4)


def read_back(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """Read an export with the safetensors library."""
    from safetensors import safe_open

    tensors, metadata = {}, []
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata.append(file.metadata())
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors, metadata


@pytest.mark.parametrize("case", ["w3_z1_bf16", "w3_z2_fp32", "w3_z3_bf16", "z0_fp32"])
def test_export_is_read_by_safetensors(
    root: Path, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_CHUNK_ELEMENTS", 5)
    wanted = load_state(root / case)
    assert export(root / case, tmp_path) == [tmp_path / "model.safetensors"]
    tensors, metadata = read_back(tmp_path)
    assert tensors.keys() == wanted.keys() - {TIED[0]}  # once
    assert all(same(tensors[name], wanted[name]) for name in tensors)
    assert metadata == [{"format": "pt", TIED[0]: TIED[1]}]
    data = (tmp_path / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    for name, tensor in tensors.items():  # so that a loader may map it
        assert (begin + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_export_in_shards_has_an_index_and_the_dtype(root: Path, tmp_path: Path) -> None:
    wanted = load_state(root / "w3_z3_bf16")
    written = export(root / "w3_z3_bf16", tmp_path, dtype=torch.float16, max_shard_bytes=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors, metadata = read_back(tmp_path)
    assert [path.name for path in written][-1] == "model.safetensors.index.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in written)
    assert {*index["weight_map"].values()} == {path.name for path in written[:-1]}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert len(written) > 3
    assert all(found["format"] == "pt" for found in metadata)
    for name, tensor in tensors.items():
        is_floating = wanted[name].is_floating_point()
        assert same(tensor, wanted[name].half() if is_floating else wanted[name])
    from safetensors.torch import load_file

    for path in written[:-1]:
        inside = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == {
            *inside
        }
        assert len(inside) == 1 or sum(t.nbytes for t in inside.values()) <= 200


def test_export_refuses_to_mix_with_an_older_one(root: Path, tmp_path: Path) -> None:
    export(root / "w3_z2_bf16", tmp_path)
    export(root / "w3_z2_bf16", tmp_path)  # the same again is fine
    with pytest.raises(CheckpointError, match=r'another export.*"model.safetensors"'):
        export(root / "w3_z2_bf16", tmp_path, max_shard_bytes=200)
    with pytest.raises(CheckpointError, match="max_shard_bytes is 0"):
        export(root / "w3_z2_bf16", tmp_path, max_shard_bytes=0)
    with pytest.raises(CheckpointError, match=r"dtype torch.int8"):
        export(root / "w3_z2_bf16", tmp_path, dtype=torch.int8)


def test_failed_export_leaves_the_older_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(root / "w3_z2_bf16", tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file, "_chunks", fail)
    with pytest.raises(OSError, match="No space"):
        export(root / "w3_z2_bf16", tmp_path, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 3000])
def test_from_pretrained_reads_an_export(root: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    transformers = pytest.importorskip("transformers")
    export(root / "llama", tmp_path, max_shard_bytes=max_shard_bytes)
    shutil.copy(root / "llama" / "config.json", tmp_path)
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stock = torch.load(root / "llama" / "stock.pt")
    assert {*model.state_dict()} == {*stock}
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())


def edited(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    found = torch.load(folder / name, weights_only=False)
    edit(found)
    torch.save(found, folder / name)


OPTIMIZER_1 = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


def other_step(found: Any) -> None:
    for state in found["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] = state["step"] + 1


WIDER = {"first.weight": torch.Size([999])}
REFUSED: list[tuple[str, str, Callable[[Path], None]]] = [
    ("missing rank", r"written by 3 ranks.*ranks \[0, 2\]", lambda f: (f / OPTIMIZER_1).unlink()),
    (
        "rank too many",
        r"written by 3 ranks.*ranks \[0, 1, 2, 3\].*overwritten",
        lambda f: shutil.copy(f / OPTIMIZER_1, f / OPTIMIZER_1.replace("rank_1", "rank_3")),
    ),
    (
        "two prefixes",
        "with and without the prefix bf16_",
        lambda f: shutil.copy(f / OPTIMIZER_1, f / OPTIMIZER_1.replace("bf16_", "")),
    ),
    (
        "tensor parallel",
        "tensor, pipeline or expert parallelism.*ds_to_universal",
        lambda f: shutil.copy(f / MODEL, f / "mp_rank_01_model_states.pt"),
    ),
    (
        "pipeline layer",
        "layer_00-model_states.pt: is a file of tensor, pipeline or expert",
        lambda f: shutil.copy(f / MODEL, f / "layer_00-model_states.pt"),
    ),
    ("no model", "model_states.pt: is missing.*optim_states", lambda f: (f / MODEL).unlink()),
    ("experts", r"model parallelism \(num_experts\)",
     lambda f: edited(f, MODEL, lambda m: m.update(num_experts=[4]))),
    ("two stages of a pipe", r"model parallelism \(pp_degree 2\)",
     lambda f: edited(f, MODEL, lambda m: m["checkpoint_parallel_dimensions"].update(pp_degree=2))),
    ("no list of shapes", "not laid out as DeepSpeed 0.19 does it",
     lambda f: edited(f, MODEL, lambda m: m.pop("param_shapes"))),
    ("other shape", "a layout that Lowtide does not know",
     lambda f: edited(f, MODEL, lambda m: m["param_shapes"][0].update(WIDER))),
    ("garbage", r"rank_1_mp_rank_00_optim_states.pt: cannot be read",
     lambda f: (f / OPTIMIZER_1).write_bytes(b"PK\x03\x04garbage")),
    ("other step", r"rank 1 is at step .*4.*rank 0 at step .*3.*mixes two",
     lambda f: edited(f, OPTIMIZER_1, other_step)),
    ("other stage", r"its zero_stage is 1, that of rank 0 is .*2.*mixes two",
     lambda f: edited(f, OPTIMIZER_1, lambda m: m["optimizer_state_dict"].update(zero_stage=1))),
]  # fmt: skip


@pytest.mark.parametrize(("text", "damage"), [row[1:] for row in REFUSED],
                         ids=[row[0] for row in REFUSED])  # fmt: skip
def test_what_cannot_be_read_is_refused(
    root: Path, tmp_path: Path, text: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "tag"
    shutil.copytree(root / "w3_z2_bf16" / "tag", folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=text):
        load_state(folder)


def test_a_folder_without_a_checkpoint_says_what_it_wants(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give the folder of one tag"):
        open_state(tmp_path)
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match='names "global_step9", which is no checkpoint'):
        open_state(tmp_path)


def test_every_module_can_be_imported_first() -> None:
    script = """
import importlib, pkgutil, sys
import lowtide.checkpoint as package
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    for known in [m for m in sys.modules if m.startswith(package.__name__)]:
        del sys.modules[known]
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
