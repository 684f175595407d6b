"""Activations held in fewer bits: bytes, time per step, and what it does to the loss.

The model of examples/pretrain, small, learns bytes of the standard library's source in a plain
loop. Every setting trains from the same seeds on the same batches, so that its validation loss can
be set against stock's of the same seed, and against how far stock's seeds lie apart. Time is that
of the process, of settings that take turns step by step.

    python benchmarks/bench_activations.py [--steps 200] [--seeds 3] [--pairs 30]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowtide.hosts import torch_loop

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "pretrain"))
from model import Decoder, ModelConfig  # noqa: E402 - the folder must be known first

SEQUENCE, ROWS, LR = 64, 8, 3e-3
SETTINGS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "8 bits": {"bits": 8},
    "8 bits, nearest": {"bits": 8, "rounding": "nearest"},
    "4 bits": {"bits": 4},
    "4 bits, nearest": {"bits": 4, "rounding": "nearest"},
    "2 bits": {"bits": 2},
    "2 bits, nearest": {"bits": 2, "rounding": "nearest"},
}


def texts() -> tuple[Tensor, Tensor]:
    """Return bytes of 40 modules to learn from, and of 10 others."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = (paths[:40], paths[40:50])
    joined = [bytearray(b"".join(path.read_bytes() for path in part)) for part in parts]
    learnt, held_out = (torch.frombuffer(each, dtype=torch.uint8).long() for each in joined)
    return learnt, held_out


def windows(text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, (ROWS, SEQUENCE) each."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - SEQUENCE - 1, (ROWS,), generator=random)
    rows = text[starts[:, None] + torch.arange(SEQUENCE + 1)]
    return rows[:, :-1], rows[:, 1:]


class Run:
    """One model in training."""

    def __init__(self, setting: dict[str, Any] | None, seed: int) -> None:
        torch.manual_seed(seed)
        shape = ModelConfig(vocabulary=256, width=96, layers=3, heads=4, sequence=SEQUENCE)
        self.model = Decoder(shape)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        activations = None if setting is None else {**setting, "min_bytes": 4096}
        block = {} if activations is None else {"compression": {"activations": activations}}
        self.loop = torch_loop.attach(self.model, self.optimizer, config={"lowtide": block})

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """Train on one batch; return the processor time, in seconds."""
        begin_s = time.process_time()
        self.loop.backward(self.model(tokens, targets))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - begin_s

    @torch.no_grad()
    def validation(self, text: Tensor) -> float:
        """Return the mean loss over 20 batches, in nats per byte."""
        self.model.eval()
        losses = [self.model(*windows(text, 10**6 + index)).item() for index in range(20)]
        self.model.train()
        return statistics.fmean(losses)

    def held(self) -> dict[str, Any]:
        """Return what the last forward held."""
        found: dict[str, Any] = self.loop.session.compression.summary()["activations"]
        return found


def learn(steps: int, seeds: int) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Return each setting's validation losses by seed, and what it held."""
    learnt, held_out = texts()
    losses: dict[str, list[float]] = {name: [] for name in SETTINGS}
    held = {}
    for name, setting in SETTINGS.items():
        for seed in range(seeds):
            run = Run(setting, seed)
            for step in range(steps):
                run.step(*windows(learnt, 1000 * seed + step))
            losses[name].append(run.validation(held_out))
            if setting is not None:
                held[name] = run.held()
            run.loop.close()
    return losses, held


def step_times(pairs: int) -> dict[str, float]:
    """Return each setting's median processor time of a step, over stock's."""
    learnt, _ = texts()
    runs = {name: Run(setting, 0) for name, setting in SETTINGS.items()}
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for step in range(pairs + 5):
        batch = windows(learnt, step)
        for name, run in runs.items():
            taken_s = run.step(*batch)
            if step >= 5:
                times[name].append(taken_s)
    for run in runs.values():
        run.loop.close()
    stock_s = statistics.median(times["stock"])
    print(f"a step of stock: {1e3 * stock_s:.1f} ms of processor time")
    return {name: statistics.median(taken) / stock_s for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=30, help="timed steps of each setting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lowtide").setLevel(logging.WARNING)

    ratios = step_times(options.pairs)
    losses, held = learn(options.steps, options.seeds)
    stock = losses["stock"]
    table = Table(title=f"{options.seeds} seeds x {options.steps} steps, {torch.__version__}")
    for heading in ("", "saved MB", "held MB", "ratio", "step time", "validation loss", "- stock"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in SETTINGS:
        facts = held.get(name)
        gaps = [found - wanted for found, wanted in zip(losses[name], stock, strict=True)]
        table.add_row(
            name,
            "" if facts is None else f"{facts['saved_bytes'] / 1e6:.2f}",
            "" if facts is None else f"{facts['held_bytes'] / 1e6:.2f}",
            "" if facts is None else f"{facts['ratio']:.2f}",
            f"{ratios[name]:.2f}",
            f"{statistics.fmean(losses[name]):.4f}",
            "" if facts is None else f"{min(gaps):+.4f} to {max(gaps):+.4f}",
        )
    Console(width=100).print(table)
    spread = max(stock) - min(stock)
    print(f"stock's seeds: {', '.join(f'{each:.4f}' for each in stock)}; {spread:.4f} apart")
    left = held["8 bits"]
    print(f"of a forward pass: {left['packed']} tensors quantised, {left['shared']} found again")
    for reason, count in sorted(left["raw"].items()):
        print(f"  {count} {reason}: {left['raw_bytes'].get(reason, 0) / 1e6:.2f} MB as they are")


if __name__ == "__main__":
    main()
