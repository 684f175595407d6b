"""What an empty ``"lowtide": {}`` block costs per optimizer step, against stock DeepSpeed.

Two engines of the same model, one stock and one with the block, live in the same process(es) and
take turns step by step (A B A B ...), so that drift of the machine hits both. Printed: median of
the pairwise ratios with a 95 % bootstrap interval, the absolute cost in microseconds, and the same
for stock against a second stock engine, which shows what the method itself can tell apart. It runs
twice: steps of about a millisecond find the microseconds, longer ones show the share.

    python benchmarks/bench_host_overhead.py [--pairs 1000] [--width 512] [--ranks 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shape:
    """Size of the model and the batch, so of a step; and how many steps are compared."""

    name: str
    width: int
    depth: int
    batch: int
    pairs: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000, help="counted steps of each engine")
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--width", type=int, default=512, help="model width; sets the step time")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--ranks", type=int, default=1, help="more ranks than cores drown it")
    parser.add_argument("--telemetry-dir", default=None, help="also write files there")
    return parser.parse_args()


def build(arguments: argparse.Namespace, shape: Shape, block: dict[str, Any] | None) -> Any:
    import torch

    import lowtide

    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(shape.depth):
        layers += [torch.nn.Linear(shape.width, shape.width), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": arguments.stage},
        "steps_per_print": 10**9,
    }
    if block is not None:
        config["lowtide"] = block
    return lowtide.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step_time_s(engine: Any, x: Any) -> float:
    begin_s = time.perf_counter()
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    return time.perf_counter() - begin_s


def compare(name: str, first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """Pairwise ratio second/first: median and 95 % bootstrap interval of the median."""
    ratios = second / first
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {
        "comparison": name,
        "ratio_median": round(float(np.median(ratios)), 5),
        "ratio_95": [round(float(low), 5), round(float(high), 5)],
        "difference_us": round(float(np.median(second - first)) * 1e6, 1),
        "step_ms": round(float(np.median(first)) * 1e3, 3),
    }


def listener_cost_us(session: Any, repeats: int = 3000) -> float:
    """Direct cost of what a block adds to one step, without the step: events and spans alone."""
    from lowtide.core.lifecycle import Event

    times = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        for event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_BACKWARD):
            session.fire(event, training=True)
        session.telemetry.add_span("forward", "host", begin_s, begin_s)
        session.telemetry.add_span("backward", "host", begin_s, begin_s)
        session.before_update()
        session.after_update()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times) * 1e6


def measure(
    arguments: argparse.Namespace, shape: Shape, block: dict[str, Any]
) -> list[dict[str, Any]]:
    """Compare stock, with the block, and a second stock engine; returns rank 0's figures."""
    import torch

    engines = [build(arguments, shape, each) for each in (None, block, None)]
    x = torch.randn(shape.batch, shape.width)
    for _ in range(arguments.warmup):
        for engine in engines:
            step_time_s(engine, x)
    times = np.empty((shape.pairs, 3))
    order = np.random.default_rng(1)  # the same on every rank: collectives must match
    for pair in range(shape.pairs):
        for index in order.permutation(3):
            times[pair, index] = step_time_s(engines[index], x)
    results = [
        compare(f"{shape.name}: lowtide {{}} / stock", times[:, 0], times[:, 1]),
        compare(f"{shape.name}: stock / stock (noise floor)", times[:, 0], times[:, 2]),
        {"events_and_spans_us_per_step": round(listener_cost_us(engines[1].lowtide), 1)},
        {
            "pairs": shape.pairs, "world_size": torch.distributed.get_world_size(),
            "stage": arguments.stage, "load": os.getloadavg()[0],
        },
    ]  # fmt: skip
    torch.distributed.barrier()
    for engine in engines:
        engine.destroy()
    return results


def main() -> None:
    arguments = parse()
    if "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(arguments.ranks), *sys.argv]
        sys.exit(subprocess.run([sys.executable, *launch], check=False).returncode)
    import torch

    block: dict[str, Any] = {}
    if arguments.telemetry_dir:
        block = {"telemetry": {"dir": arguments.telemetry_dir}}
    shapes = [
        Shape("small steps", 32, 2, 8, arguments.pairs * 5),
        Shape("steps", arguments.width, arguments.depth, arguments.batch, arguments.pairs),
    ]
    for shape in shapes:
        for result in measure(arguments, shape, block):
            if torch.distributed.get_rank() == 0:
                sys.stdout.write(json.dumps(result) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    main()
