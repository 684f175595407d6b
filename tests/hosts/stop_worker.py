"""Started by test_stop.py: an ordinary DeepSpeed script; only its JSON knows of stopping."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

import lowtide
from tests.helpers.ranks import leave_result

STEPS = 12
SIGNAL_STEP = 5


def overwrite(engine: Any, folder: Path) -> dict[str, Any]:
    """Save under one name twice; the second time nothing can be written."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    record = folder / "last" / "lowtide.json"
    engine.save_checkpoint(folder, tag="last")
    torch.distributed.barrier()
    is_recorded = [record.exists()]
    torch.distributed.barrier()
    engine.checkpoint_engine.save = fail
    try:
        engine.save_checkpoint(folder, tag="last")
    except OSError as error:
        return {"recorded": [*is_recorded, record.exists()], "error": str(error)}
    return {}


def main(mode: str, folder: Path) -> None:
    lowtide.enable()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    stop: dict[str, Any] = {"run_dir": str(folder), "save_dir": str(folder / "ckpt")}
    if mode == "tell":
        stop["then"] = "tell"
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"torch_adam": True, "lr": 0.01}},
            "zero_optimization": {"stage": 1},
            "lowtide": {"stop": stop},
        },
    )
    if mode == "client_state":
        own = {"epoch": 3} if engine.global_rank == 0 else {}  # rank 0's view must do for all
        engine.save_checkpoint(folder / "ckpt", client_state=own)
    if mode == "overwritten":
        leave_result(overwrite(engine, folder / "ckpt"))
        return
    if mode == "again":
        engine.load_checkpoint(folder / "ckpt")
    if mode in ("resume", "damaged"):
        path, _ = engine.load_checkpoint(folder / "ckpt")
        leave_result({"path": path, "step": engine.global_steps})
        return
    for step in range(STEPS):
        if step == SIGNAL_STEP and engine.global_rank == 1 and mode != "uninterrupted":
            os.kill(os.getpid(), signal.SIGUSR1)  # one signal on one rank
        for micro in range(2):
            x = torch.full((2, 4), 1.0 + step + 0.1 * micro + engine.global_rank)
            engine.backward(engine(x).square().mean())
            engine.step()
            leave_result({"step": engine.global_steps, "micro": micro})
        if mode == "tell" and engine.lowtide.stop.requested:
            engine.save_checkpoint(folder / "mine", client_state={"epoch": 3})
            reason = engine.lowtide.stop.reason
            leave_result({"step": engine.global_steps, "reason": reason})
            return
    engine.destroy()
    sys.stdout.write(json.dumps("reached the end") + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
