"""Run on 2 ranks by test_deepspeed_pieces.py: updates while a checkpoint is being written.

Rank 0 has the native writer, rank 1 the one in Python.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

import lowtide
from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.pending import Pending
from lowtide.checkpoint.plugin import CheckpointPlugin
from lowtide.checkpoint.saving import Saving
from lowtide.checkpoint.writer.python_writer import PythonWriter
from tests.helpers.ranks import leave_result

WIDTH, LAYERS = 1024, 6  # of a rank: 36 MiB of optimizer state, and the buffer has 16
OFFLOAD = {"device": "cpu", "subgroup_params": 1 << 20}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


def build(stage: int, folder: Path, block: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = Net()
    # Slower than a step: most of a checkpoint has not been written when its update begins.
    tiers = [{"path": str(folder), "bytes_per_s": 12.0 * MIB}]
    checkpoint = {"tiers": tiers, "host_buffer_bytes": 16 * MIB, "max_wait_s": 60.0}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "sub_group_size": 2 * WIDTH * WIDTH,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu"},
        },
        "steps_per_print": 1000000,
        "lowtide": {"checkpoint": checkpoint, **block},
    }
    halves: Any = [list(model.layers[: LAYERS // 2]), list(model.layers[LAYERS // 2 :])]
    groups = [{"params": [layer.weight for layer in half]} for half in halves]
    return lowtide.initialize(model=model, model_parameters=groups, config=config)[0]


def train(engine: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(engine.global_steps + 10 * dist.get_rank())
    for _ in range(steps):
        loss = engine(torch.randn(1, WIDTH, generator=generator).bfloat16())
        engine.backward(loss)
        engine.step()


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, (list, tuple)) else []


def is_same(path: Path, expected: bytes) -> bool:
    found, wanted = (
        tensors(torch.load(each, weights_only=False)) for each in (path, io.BytesIO(expected))
    )
    same = [torch.equal(a.view(-1), b.view(-1)) for a, b in zip(found, wanted, strict=True)]
    return bool(same) and all(same)


class Watch:
    """Copies what is saved at the request; notes how far the capture is when owners ask."""

    def __init__(self, patch: pytest.MonkeyPatch, *, is_careless: bool = False) -> None:
        self.copies: dict[str, bytes] = {}
        self.left: list[int] = []
        add, release = CheckpointPlugin.add, Pending.release

        def copying_add(plugin: Any, state: Any, path: Path) -> bool:
            copy = io.BytesIO()
            torch.save(state, copy)
            self.copies[path.name] = copy.getvalue()
            return add(plugin, state, path)

        def noting_release(pending: Any, memory: Any) -> None:
            for saving in pending._savings:
                state = saving.describe()
                self.left.append(state["bytes"] - state["captured_bytes"])
            if not is_careless:
                release(pending, memory)

        patch.setattr(CheckpointPlugin, "add", copying_add)
        patch.setattr(Pending, "release", noting_release)
        if is_careless:
            patch.setattr(Pending, "hurry", lambda *_: None)
            patch.setattr(Saving, "wait_captured", lambda *_: None)


def facts_of(stage: int, folder: Path, block: dict[str, Any], **watch: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        engine = build(stage, folder, block)
        train(engine, 2)
        seen = Watch(patch, **watch)
        engine.save_checkpoint(str(folder), tag="here")
        train(engine, 1)
        plugin = engine.lowtide.checkpoint
        facts = dict(plugin.status()[-1])
        facts["left"] = seen.left
        facts["committed"] = plugin.wait("committed", 60)
        facts["summary"] = plugin.summary()
        mine = [n for n in seen.copies if (folder / "here" / n).is_file()]
        facts["files"] = sorted(mine)
        facts["same"] = [is_same(folder / "here" / name, seen.copies[name]) for name in mine]
        is_hooked = "_optimizer_step" in engine.optimizer.__dict__
        optimizer = engine.optimizer
        engine.destroy()
        facts["hooked"] = [is_hooked, "_optimizer_step" in optimizer.__dict__]
    dist.barrier()
    return facts


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            make = lambda *, bytes_per_s, **options: PythonWriter(  # noqa: E731
                bytes_per_s=bytes_per_s or 0.0, direct=True, queue_depth=8, **options
            )
            patch.setattr("lowtide.checkpoint.saver.open_writer", make)
        facts = {
            "stock 3": facts_of(3, folder / "stock3", {}),
            "offload 3": facts_of(3, folder / "offload3", {"offload": OFFLOAD}),
            "stock 1": facts_of(1, folder / "stock1", {}),
            "careless": facts_of(3, folder / "careless", {}, is_careless=True),
        }
    leave_result(facts)


if __name__ == "__main__":
    main()
