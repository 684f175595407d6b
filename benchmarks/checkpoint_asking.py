"""The section of bench_checkpoint.py about updates in the middle of a checkpoint.

One saver, an update that goes through the state in sub-groups (master and two moments each), in
turn:

- whole: the update waits until all has been captured;
- asked: each sub-group's update asks for its own memory, with the order told ahead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from checkpoint_rivals import MIB, STEP, Trainer

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.config import CHUNK_BYTES, CheckpointConfig
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.core.state import Memory, memory_of, merged

WAYS = ("none", "whole", "asked")
TENSOR_BYTES = 16 * MIB
TENSORS = 3  # of a sub-group


class SubgroupTrainer(Trainer):
    """Updates sub-group by sub-group: multiplies its tensors twice, about what Adam reads."""

    def __init__(self, total_bytes: int, iteration_s: float) -> None:
        count = max(1, total_bytes // (TENSORS * TENSOR_BYTES))
        super().__init__([TENSOR_BYTES] * TENSORS * count, iteration_s)
        tensors = list(self.state.values())
        self.groups = [tensors[i::count] for i in range(count)]

    def update_group(self, number: int) -> None:
        with torch.no_grad():
            for tensor in self.groups[number]:
                tensor.mul_(0.999).mul_(1.001)


class Iteration:
    """One iteration in one of the ways."""

    def __init__(self, trainer: SubgroupTrainer, saver: Saver, folder: Path) -> None:
        self._trainer, self._saver, self._folder = trainer, saver, folder
        self._step = 0
        self._memories = [memory_of(group) for group in trainer.groups]

    def run(self, way: str) -> dict[str, float]:
        trainer, saver, saving = self._trainer, self._saver, None
        everything = merged(np.concatenate(self._memories))
        nothing: Memory = everything[:0]
        promised = everything if way == "asked" else nothing
        request_s = time.perf_counter()
        if way != "none":
            self._step += 1
            saver.begin(
                self._folder, f"step{self._step}", step=self._step, details=STEP,
            )  # fmt: skip
            saver.add(trainer.state, "state.pt", is_stable=lambda _tensor: True)
            saving = saver.end()
        called_s = time.perf_counter()
        compute_s = trainer.forward_backward()
        begin_s = time.perf_counter()
        saver.pending.begin_update(promised)
        if len(promised):
            saver.pending.hurry(np.concatenate(self._memories))
        for number, memory in enumerate(self._memories):
            if len(promised):
                saver.pending.release(memory)
            trainer.update_group(number)
        saver.pending.end_update(is_applied=True)
        end_s = time.perf_counter()
        found = {"compute": compute_s, "update": end_s - begin_s, "iteration": end_s - request_s}
        found["blocked"] = called_s - request_s
        if saving is not None:
            found["blocked"] += sum(saving.update_waits_s)
            if not saving.wait(Stage.COMMITTED, 600):
                raise RuntimeError(str(saving.error))
            found["durable"] = saving.times_s[Stage.COMMITTED] - request_s
            facts = saving.describe()
            found |= {name: facts[f"{name}_bytes"] / MIB for name in ("direct", "hurried")}
        return found


def asking(options: argparse.Namespace, folder: Path) -> None:
    """Both ways, for iterations of several lengths and disks of several rates."""
    total_bytes = round(options.gib * 1024) * MIB
    print(f"Updates of {total_bytes / MIB:.0f} MiB in sub-groups; medians, seconds:")
    print(
        f"{'buffer':>7}{'disk':>8}{'F+B':>6}  {'way':6}{'blocked':>9}{'worst':>8}{'F+B +':>8}"
        f"{'update +':>10}{'iteration +':>13}{'durable':>9}{'in place':>10}{'hurried MiB':>13}"
    )
    for share, rate, iteration_s in [
        (4, None, 0.1), (4, None, 0.3), (4, None, 1.0),
        (4, 5e8, 1.0), (4, 2e8, 1.0), (1, None, 0.3),
    ]:  # fmt: skip
        trainer = SubgroupTrainer(total_bytes, iteration_s)
        buffer_bytes = (round(total_bytes / share / CHUNK_BYTES) + 1) * CHUNK_BYTES
        tiers = [{"path": str(folder / "t"), "bytes_per_s": rate}]
        config = CheckpointConfig.model_validate({"keep": 1, "tiers": tuple(tiers)})
        saver = Saver(config, Board(), buffer_bytes=buffer_bytes)
        while saver.writer.facts()["touched_bytes"] < buffer_bytes:
            time.sleep(0.01)
        iteration = Iteration(trainer, saver, folder / "t")
        seen: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds + 1):
            for way in WAYS:
                seen[way].append(iteration.run(way))
        saver.close(60.0)
        where = f"1/{share:g}"
        speed = "raw" if rate is None else f"{rate / 1e6:.0f} MB/s"
        for way in WAYS[1:]:
            print(f"{where:>7}{speed:>8}{iteration_s:6.1f}  {way:6}{_line(seen, way)}", flush=True)


def _line(seen: dict[str, list[dict[str, float]]], way: str) -> str:
    """Return what a way adds to the iteration without a checkpoint of the same round."""
    kept, quiet = seen[way][1:], seen["none"][1:]

    def middle(name: str) -> float:
        return statistics.median(each[name] for each in kept)

    def added(name: str) -> float:
        pairs = zip(kept, quiet, strict=True)
        return statistics.median(each[name] - without[name] for each, without in pairs)

    return (
        f"{middle('blocked'):9.3f}{max(each['blocked'] for each in kept):8.3f}"
        f"{added('compute'):8.3f}{added('update'):10.3f}{added('iteration'):13.3f}"
        f"{middle('durable'):9.3f}{middle('direct'):10.0f}{middle('hurried'):13.0f}"
    )
