"""Started by test_faults.py: one failure mode per run, or all wrong configurations in one."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

import lowtide
from lowtide.core.errors import ConfigError
from lowtide.core.registry import plugins
from tests.core.test_config import WRONG_BLOCKS
from tests.helpers.probe_plugin import ProbePlugin
from tests.helpers.ranks import leave_result


def wrong_configs() -> None:
    """Every wrong block must be refused before a process group exists."""
    plugins.register("probe", ProbePlugin)
    found: list[Any] = []
    sources: list[Any] = [{"train_batch_size": 2, "lowtide": block} for _, block, _ in WRONG_BLOCKS]
    sources += ["/nonexistent/ds.json", "configs"]
    for source in sources:
        try:
            lowtide.initialize(model=torch.nn.Linear(2, 2), config=source)
            found.append("accepted")
        except ConfigError as error:
            found.append([str(error), torch.distributed.is_initialized()])
    leave_result(found)


def train(mode: str) -> None:
    """Train; on rank 1 at step 3 do what `mode` says."""
    model = torch.nn.Linear(4, 1)
    engine, *_ = lowtide.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "lowtide": {},
        },
    )
    for step in range(10_000):
        if mode == "interrupt":
            time.sleep(0.05)
        if step == 3 and engine.global_rank == 1:
            if mode == "raise":
                raise RuntimeError("the cosmic ray hit rank 1")
            if mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        engine.backward(engine(torch.ones(2, 4)).square().mean())
        engine.step()
        if step == 3:
            sys.stdout.write(f"rank {engine.global_rank} reached step 3, pid {os.getpid()}\n")


if __name__ == "__main__":
    if sys.argv[1] == "wrong_configs":
        wrong_configs()
    else:
        train(sys.argv[1])
