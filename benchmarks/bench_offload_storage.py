"""Optimizer state in files against DeepSpeed's own NVMe offload, in turn, in one process.

ZeRO-3 engines with bfloat16 and clipping step in turn on the same data:

- stock, with everything in memory: what storage costs at all
- stock NVMe: ``offload_optimizer: {"device": "nvme"}`` with ``pipeline_read`` and
  ``pipeline_write``, on the first path; left out, and said so, where DeepSpeed's ``async_io`` does
  not build
- storage, in turn: ``"offload": {"storage": ...}`` with one buffer, so that reads, updates and
  writes follow each other
- storage: the same with all lanes, on the first path, and on all of them where there are several

Host memory for optimizer state, seconds of ``engine.step`` and of whole iterations, bytes that the
process moved to and from block devices meanwhile (``/proc/self/io``; a tmpfs is none), the update's
lower bound (the slowest of reads, writes and host at the rates that the planner believes in), and
whether the 16-bit weights are stock's bit for bit. Medians over the rounds, after two to warm up.

    python benchmarks/bench_offload_storage.py [--path DIR]... [--params 60e6] [--memory 0.35]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_offload import config_of
from rich.console import Console
from rich.table import Table

warnings.simplefilter("ignore")
BUFFERS = 12  # of stock NVMe, one tensor of a sub-group each; with fewer its pipeline fails
PIECES = 40  # so that buffers are a small part of the state


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", action="append", help="a folder; else a new one in the current")
    parser.add_argument("--params", type=float, default=60e6)
    parser.add_argument("--memory", type=float, default=0.35, help="share of state kept in memory")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def storage(options: argparse.Namespace, paths: list[str], **settings: Any) -> dict[str, Any]:
    memory_bytes = options.memory * 12 * options.params
    chosen = {"paths": paths, "host_memory_bytes": memory_bytes, **settings}
    piece = int(options.params) // PIECES
    block = {"device": "cpu", "subgroup_params": piece, "storage": chosen}
    return config_of({"device": "cpu"}, lowtide={"offload": block})


def contenders(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    paths = options.path
    found = {"stock, all in memory": config_of({"device": "cpu"})}
    try:
        AsyncIOBuilder().load()
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        console.print(f"stock NVMe is left out: async_io does not load ({error})")
    else:
        nvme = {
            "device": "nvme", "nvme_path": paths[0], "pipeline_read": True,
            "pipeline_write": True, "buffer_count": BUFFERS,
        }  # fmt: skip
        aio = {"block_size": 1 << 20, "queue_depth": 32, "intra_op_parallelism": 1}
        aio |= {"single_submit": False, "overlap_events": True}
        found["stock NVMe"] = config_of(nvme, aio=aio)
    found["storage, in turn"] = storage(options, paths[:1], buffers=1)
    found["storage"] = storage(options, paths[:1])
    if len(paths) > 1:
        found[f"storage, {len(paths)} paths"] = storage(options, paths)
    return found


def build(params: float, config: dict[str, Any]) -> Any:
    import deepspeed

    import lowtide

    torch.manual_seed(0)
    width, layers = 1024, max(1, round(params / 1024**2))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    start: Callable[..., Any] = lowtide.initialize if "lowtide" in config else deepspeed.initialize
    return start(model=model, model_parameters=model.parameters(), config=config)[0]


def moved() -> tuple[int, int]:
    """Return bytes read from and written to block devices by this process so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def iterate(engine: Any, x: torch.Tensor) -> tuple[float, ...]:
    """Return (step s, iteration s, bytes read, bytes written)."""
    begin_s, before = time.perf_counter(), moved()
    engine.backward(engine(x).float().square().mean())
    step_s = time.perf_counter()
    engine.step()
    end_s, after = time.perf_counter(), moved()
    return end_s - step_s, end_s - begin_s, after[0] - before[0], after[1] - before[1]


def host_bytes(engine: Any) -> float:
    """Return the host memory for masters, moments, float32 gradients and staging."""
    if hasattr(engine, "lowtide"):
        return float(engine.lowtide.offload.summary()["host_memory_bytes"])
    numels = [each.numel() for each in engine.optimizer.fp16_partitioned_groups_flat]
    if engine.optimizer.swap_optimizer:
        return 4.0 * BUFFERS * max(numels)
    return 16.0 * sum(numels)


def row_of(name: str, engine: Any, times: list[tuple[float, ...]], base_s: float) -> list[str]:
    step_s, iteration_s, read, written = (statistics.median(e) for e in zip(*times, strict=True))
    cells = [
        name,
        f"{host_bytes(engine) / 1e6:.0f}",
        f"{step_s:.3f}",
        f"{base_s / step_s:.2f}",
        f"{iteration_s:.3f}",
    ]
    cells += [f"{read / 1e6:.0f}", f"{written / 1e6:.0f}"]
    plan = engine.lowtide.offload.plan() if hasattr(engine, "lowtide") else None
    if plan is None or not plan.lower_bound_s:
        return [*cells, "", "", "", ""]
    tier = engine.lowtide.offload.summary()["storage"]
    stored = sum(each["stored_bytes"] for each in tier)
    return [
        *cells, f"{stored / 1e6:.0f}", f"{plan.makespan_s or 0.0:.3f}",
        f"{plan.lower_bound_s:.3f}", f"{step_s / plan.lower_bound_s:.2f}",
    ]  # fmt: skip


def compare(options: argparse.Namespace, console: Console) -> None:
    engines = {
        name: build(options.params, config) for name, config in contenders(options, console).items()
    }
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in engines}
    for turn in range(options.rounds + 2):
        for name, engine in engines.items():
            found = iterate(engine, x)
            if turn >= 2:
                times[name].append(found)
    rival = next((n for n in ("stock NVMe", "storage, in turn") if n in engines), "")
    base_s = statistics.median(each[0] for each in times[rival])
    state = 12 * options.params
    table = Table(
        title=f"ZeRO-3, {options.params / 1e6:.0f}M parameters, {state / 1e6:.0f} MB of state, "
        f"{options.memory:.0%} of it in memory, {torch.get_num_threads()} thread(s)"
    )
    columns = [
        "",
        "host MB",
        "step s",
        f"x {rival}",
        "iteration s",
        "read MB",
        "written MB",
        "stored MB",
    ]
    for column in [*columns, "predicted s", "bound s", "x bound", "stock's bits"]:
        table.add_column(column, justify="right")
    weights = {
        name: [each.clone() for each in engine.optimizer.fp16_partitioned_groups_flat]
        for name, engine in engines.items()
    }
    for name, engine in engines.items():
        is_same = all(map(torch.equal, weights[name], weights["stock, all in memory"]))
        table.add_row(*row_of(name, engine, times[name], base_s), str(is_same))
    console.print(table)
    for name, engine in engines.items():
        if hasattr(engine, "lowtide"):
            for path in engine.lowtide.offload.summary()["storage"]:
                kind = "direct" if path["is_direct"] else "through the page cache"
                console.print(
                    f"{name}: {path['stored_bytes'] / 1e6:.0f} MB on one path, {kind}, measured "
                    f"at the start: reads {path['read_bytes_per_s'] / 1e9:.2f} GB/s, writes "
                    f"{path['write_bytes_per_s'] / 1e9:.2f} GB/s"
                )
    last = list(engines)[-1]
    console.print(f"\n{last}, the last update:\n{engines[last].lowtide.offload.chart(80)}")
    for engine in engines.values():
        engine.destroy()


def main() -> None:
    """Print one table."""
    options, console = parse(), Console(width=160)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with tempfile.TemporaryDirectory(prefix="storage-", dir=".") as folder:
        options.path = options.path or [folder]
        compare(options, console)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
