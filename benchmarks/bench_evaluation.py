"""Evaluation: statistics of many items, and what the key costs a training run.

Statistics: tables and a comparison of two runs, from rows in files, as `lowtide eval` makes them.
Each part runs in a process of its own, so that its memory is its own.

Training: the model of examples/pretrain, small, in a plain loop. The cost of one evaluation is its
own time and what the step after it takes longer than others, in processor time; divided by the
time of the steps between two evaluations.

    python benchmarks/bench_evaluation.py [--items 100000] [--steps 60] [--every 200]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "pretrain"))


def write_rows(path: Path, items: int, seed: int, skill: float) -> None:
    """Write rows of two tasks: right or wrong in clusters of five, and F1 of single items."""
    from lowtide.evaluation.rows import Row

    random = np.random.default_rng(seed)
    shared = {"settings_hash": "s", "model": f"m{seed}", "model_hash": f"h{seed}", "seed": 0}
    difficulty = np.random.default_rng(0).normal(size=items)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(items):
            is_first = index % 2 == 0
            right = difficulty[index] + random.normal() < skill
            precision, recall = random.random(), random.random()
            f1 = 2 * precision * recall / (precision + recall)
            scores = (
                {"correct": float(right)}
                if is_first
                else {"precision": precision, "recall": recall, "f1": f1}
            )
            detail: dict[str, Any] = {"grader": "exact"} if is_first else {
                "length_tokens": 100, "f1": f1, "needle_positions": [0.5]}  # fmt: skip
            row = Row(
                task="open" if is_first else "long", kind="open" if is_first else "longctx",
                item=f"i{index}", item_hash="x", scores=scores, detail=detail, provenance={},
                cluster=f"c{index // 10}" if is_first else f"i{index}", time_s=0.0,
                duration_s=0.0, output="an answer", target="an answer", **shared,
            )  # fmt: skip
            file.write(row.to_json() + "\n")


def measured(part: str, folder: Path) -> dict[str, float]:
    """Run one part in a process of its own; return times in seconds and memory in bytes."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(part: str, folder: Path) -> None:
    """Do one part and print what it took."""
    from lowtide.evaluation import compare, figures, read_rows

    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    if part == "report":
        found = len(figures(read_rows(folder / "a.jsonl")))
    else:
        rows = read_rows(folder / "a.jsonl"), read_rows(folder / "b.jsonl")
        found = len(compare(*rows, every_metric=True))
    print(
        json.dumps(
            {
                "figures": found, "wall_s": time.perf_counter() - begin_s,
                "cpu_s": time.process_time() - begin_cpu_s,
                "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )  # fmt: skip


def training(steps: int, every: int) -> dict[str, float]:
    """Return processor times, in seconds, of steps, evaluations, and steps after evaluations."""
    import torch
    from model import Decoder, ModelConfig

    from lowtide.hosts import torch_loop

    folder = Path(tempfile.mkdtemp(prefix="lowtide-bench-"))
    source = b"".join(p.read_bytes() for p in sorted(Path(os.__file__).parent.glob("a*.py")))
    (folder / "held_out.txt").write_bytes(source[:200_000])
    task = {"name": "held_out", "kind": "loss", "file": "held_out.txt", "window": 128}
    (folder / "suite.json").write_text(json.dumps({"format": 1, "tasks": [task]}))
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocabulary=256, width=128, layers=4, heads=4, sequence=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    block = {"suite": str(folder / "suite.json"), "every_n_steps": 10**6}
    loop = torch_loop.attach(model, optimizer, config={"lowtide": {"evaluation": block}})
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()

    def step(number: int) -> float:
        random = torch.Generator().manual_seed(number)
        starts = torch.randint(len(text) - 129, (8,), generator=random)
        rows = text[starts[:, None] + torch.arange(129)]
        begin_s = time.process_time()
        loop.backward(model(rows[:, :-1], rows[:, 1:]))
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begin_s

    for number in range(5):
        step(number)
    windows = text[: 64 * 128].reshape(64, 128)
    plain, after, evaluations, bare = [], [], [], []
    for number in range(steps):
        plain.append(step(number))
        begin_s = time.process_time()
        figures = loop.session.evaluation.evaluate()
        evaluations.append(time.process_time() - begin_s)
        if "held_out/loss" not in figures:
            raise RuntimeError("the evaluation failed")
        begin_s = time.process_time()
        with torch.no_grad():
            for at in range(0, 64, 8):
                model.eval()
                model(windows[at : at + 8])
                model.train()
        bare.append(time.process_time() - begin_s)
        after.append(step(number + steps))
        plain.append(step(number + 2 * steps))
    loop.close()
    middle = {
        "step_s": statistics.median(plain), "evaluation_s": statistics.median(evaluations),
        "after_s": statistics.median(after), "bare_s": statistics.median(bare),
    }  # fmt: skip
    extra_s = middle["evaluation_s"] + middle["after_s"] - middle["step_s"]
    return middle | {"share": extra_s / (every * middle["step_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--part", choices=("report", "compare"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        work(options.part, options.folder)
        return
    logging.getLogger("lowtide").setLevel(logging.ERROR)
    console = Console(width=100)
    table = Table(title=f"{options.items} rows, 10,000 resamples", title_justify="left")
    for name in ("part", "figures", "wall s", "CPU s", "peak MB", "goal"):
        table.add_column(name, justify="left" if name in ("part", "goal") else "right")
    with tempfile.TemporaryDirectory(prefix="lowtide-bench-") as name:
        folder = Path(name)
        write_rows(folder / "a.jsonl", options.items, 1, 0.5)
        write_rows(folder / "b.jsonl", options.items, 2, 0.53)
        for part in ("report", "compare"):
            found = measured(part, folder)
            is_met = found["cpu_s"] < 60 and found["memory_bytes"] < 1 << 30
            table.add_row(
                part, f"{found['figures']:.0f}", f"{found['wall_s']:.1f}",
                f"{found['cpu_s']:.1f}", f"{found['memory_bytes'] / 1e6:.0f}",
                f"CPU < 60 s, < 1 GiB: {'met' if is_met else 'NOT met'}",
            )  # fmt: skip
    console.print(table)
    found = training(options.steps, options.every)
    share = found["share"]
    console.print(
        f"training, plain loop: step {found['step_s'] * 1e3:.1f} ms, evaluation of 64 windows of "
        f"128 bytes {found['evaluation_s'] * 1e3:.1f} ms (its forward passes alone "
        f"{found['bare_s'] * 1e3:.1f} ms), step after it {found['after_s'] * 1e3:.1f} ms "
        "(processor time, medians)"
    )
    console.print(
        f"at every {options.every} steps that is {share:.2%} of the run; goal of at most 1 %: "
        f"{'met' if share <= 0.01 else 'NOT met'}"
    )


if __name__ == "__main__":
    main()
