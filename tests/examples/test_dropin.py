"""The drop-in examples, each started as a user would: torchrun, 2 ranks, its own JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.helpers.ranks import REPOSITORY, free_port, run_command

pytestmark = pytest.mark.dist
EXAMPLES = REPOSITORY / "examples"


def torchrun(folder: Path, *argv: str) -> list[float]:
    """Run a script in `folder` and return the losses it printed."""
    return run_script(folder, *argv)[0]


def run_script(folder: Path, *argv: str) -> tuple[list[float], str]:
    """Run a script in `folder` and return the losses it printed, and all that it printed."""
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), *argv]
    log = run_command(command, timeout_s=150, cwd=folder).check().logs[0]
    # Each step once: a rank that took itself for a world of one would print its own lines.
    steps = re.findall(r"^step (\d+) loss (\S+)$", log, flags=re.MULTILINE)
    assert [number for number, _ in steps] == sorted({n for n, _ in steps}, key=int), log[-3000:]
    return [float(loss) for _, loss in steps], log


def strict(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def check_telemetry(folder: Path, *, steps: int, micro_batches: int) -> None:
    """Both ranks' files: readable as strict JSON, all spans there, as often as they happened."""
    for rank in range(2):
        lines = (folder / f"rank{rank}.jsonl").read_text().splitlines()
        records = [strict(line) for line in lines]
        assert records[0]["kind"] == "run"
        assert (records[0]["rank"], records[0]["world_size"]) == (rank, 2)
        assert records[0]["config"]["telemetry"]["trace"] is True  # what "auto" became
        assert records[-1]["kind"] == "end"
        counts: dict[str, int] = {}
        for record in records:
            for name, span in record.get("spans", {}).items():
                counts[name] = counts.get(name, 0) + span["count"]
        expected = {"forward": steps * micro_batches, "backward": steps * micro_batches}
        assert counts == expected | {"update": steps}
        trace = strict((folder / f"trace.rank{rank}.json").read_text())["traceEvents"]
        assert {"forward", "backward", "update"} <= {event["name"] for event in trace}


def check_block_holds_auto(example: str) -> None:
    block = json.loads((EXAMPLES / example / "ds.json").read_text())["lowtide"]
    assert block["telemetry"]["trace"] == "auto"  # the value that trips Accelerate


@pytest.mark.parametrize(
    ("example", "steps", "micro_batches"),
    [("hf_trainer", 20, 2), ("accelerate", 40, 1), ("megatron_core", 30, 2)],
)
def test_example_learns_and_leaves_its_telemetry(
    tmp_path: Path, example: str, steps: int, micro_batches: int
) -> None:
    check_block_holds_auto(example)
    losses = torchrun(tmp_path, str(EXAMPLES / example / "train.py"))
    assert losses[0] > 5.0
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0
    folder = tmp_path / "runs" / example / "telemetry"
    check_telemetry(folder, steps=steps, micro_batches=micro_batches)


def test_trainer_example_trains_one_model_on_two_ranks(tmp_path: Path) -> None:
    folder = EXAMPLES / "hf_trainer"
    config = ["--config", str(folder / "low_rank.json"), "--save-every", "20"]
    losses, log = run_script(tmp_path, str(folder / "train.py"), *config)
    assert losses[-1] < losses[0] - 0.5
    (evaluated,) = re.findall(r"^evaluation loss (\S+)$", log, flags=re.MULTILINE)
    assert float(evaluated) < losses[0] - 0.5
    saved = tmp_path / "runs" / "hf_trainer" / "checkpoint-20"
    with safe_open(saved / "model.safetensors", "pt") as weights:
        shape = weights.get_slice("model.layers.0.self_attn.q_proj.down.weight").get_shape()
    assert shape == [16, 64], "whole, though each rank holds half of its columns"


def test_stock_script_is_bit_identical_with_and_without_the_switch(tmp_path: Path) -> None:
    check_block_holds_auto("stock_deepspeed")
    source = EXAMPLES / "stock_deepspeed"
    assert "lowtide" not in re.sub(r'""".*?"""', "", (source / "train.py").read_text(), flags=re.S)
    script = str(shutil.copy(source / "train.py", tmp_path))
    bare = json.loads((source / "ds.json").read_text())
    del bare["lowtide"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    config = ["--config", str(source / "ds.json"), "--steps", "15"]

    plain = torchrun(tmp_path, script, *config)
    assert not (tmp_path / "runs").exists()
    removed = ["--config", str(tmp_path / "bare.json"), "--steps", "15"]
    without_block = torchrun(tmp_path, "-m", "lowtide.run", script, *removed)
    assert not (tmp_path / "runs").exists()
    switched_on = torchrun(tmp_path, "-m", "lowtide.run", script, *config)

    assert len(plain) == 15
    assert plain[-1] < plain[0] - 1.0
    assert without_block == plain
    assert switched_on == plain
    check_telemetry(tmp_path / "runs" / "stock_deepspeed" / "telemetry", steps=15, micro_batches=2)


def test_planned_updates_print_the_losses_of_stock_and_their_lanes(tmp_path: Path) -> None:
    check_block_holds_auto("offload")
    script = str(EXAMPLES / "offload" / "planned.py")
    planned, log = run_script(tmp_path, script, "--steps", "12")
    stock, _ = run_script(tmp_path, script, "--steps", "12", "--stock")
    assert len(planned) == 12
    assert planned == stock
    drawn = re.findall(r"^(host|prefetch|device|flush|upload) .* (\d+)%$", log, flags=re.MULTILINE)
    assert {lane for lane, share in drawn if int(share) > 0} == {
        "host", "prefetch", "device", "flush", "upload",
    }  # fmt: skip
    trace = strict((tmp_path / "runs/offload/telemetry/trace.rank0.json").read_text())
    named = {event["args"].get("name") for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"offload/host", "emulated:0/prefetch", "emulated:0/flush"} <= named
    folders = ["--storage", str(tmp_path / "a"), "--storage", str(tmp_path / "b")]
    stored, log = run_script(tmp_path, script, "--steps", "6", *folders)
    assert stored == stock[:6]
    assert set(re.findall(r"^(read0|write1) .*%$", log, flags=re.MULTILINE)) == {"read0", "write1"}
    trace = strict((tmp_path / "runs/offload/telemetry/trace.rank0.json").read_text())
    named = {event["args"].get("name") for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"offload/host", "offload/read0", "offload/write1"} <= named


def test_twins_of_tensor_parallelism_learn_the_same(tmp_path: Path) -> None:
    options = ["--steps", "8", "--layers", "2", "--width", "64", "--vocabulary", "512"]
    options += ["--sequence", "64", "--max-mib", "1", "--folder", str(tmp_path / "twins")]
    log = run_command(
        ["python", str(EXAMPLES / "tensor_parallel" / "twins.py"), *options], timeout_s=300
    ).check().logs[0]  # fmt: skip
    gap = re.search(r"differ by at most ([0-9.]+)%", log)
    assert gap is not None
    assert float(gap[1]) <= 0.01
    scores = re.findall(r"(?:full rank|low rank), .*\s([0-9.]+)$", log, flags=re.MULTILINE)
    assert len(scores) == 3
    assert float(scores[1]) == pytest.approx(float(scores[2]), rel=1e-3)
    sent = dict(re.findall(r"^  (\w+_count)\s+([0-9,]+)$", log, flags=re.MULTILINE))
    assert sent["backward_all_reduce_count"] == "8", "four for each of two blocks"
