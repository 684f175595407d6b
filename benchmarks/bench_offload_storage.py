"""Optimizer state in files against DeepSpeed's own NVMe offload, and on paths that change.

1. Against DeepSpeed's NVMe offload: ZeRO-3 engines with bfloat16 and clipping step in turn, in one
process, on the same data:

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

2. Two folders of the first path, throttled to `FAST` and `SLOW` bytes per second and direction,
which change places half way: seconds of ``engine.step`` before, right after, and at the end, where
pieces follow the rates (``"adapt"``) and where they do not, each in a run of its own, and with the
fewest buffers in place of as many as are chosen for such rates; the least
that moving the bytes of one update takes at these rates; and the shares of the paths.

    python benchmarks/bench_offload_storage.py [--path DIR]... [--params 60e6] [--memory 0.35]
        [--only rivals|swap]
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_offload import config_of
from rich.console import Console
from rich.table import Table

from lowtide.offload.storage.files import ScratchFile

warnings.simplefilter("ignore")
BUFFERS = 12  # of stock NVMe, one tensor of a sub-group each; with fewer its pipeline fails
PIECES = 40  # so that buffers are a small part of the state
FAST, SLOW = 0.6e9, 0.15e9
BEFORE, AFTER = 8, 20  # updates before and after the paths change places
FEWEST_BUFFERS = 5  # with which the fast path waits for a slow one's piece


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", action="append", help="a folder; else a new one in the current")
    parser.add_argument("--params", type=float, default=60e6)
    parser.add_argument("--memory", type=float, default=0.35, help="share of state kept in memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(SECTIONS), default=None)
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
                    f"{name}: {path['stored_bytes'] / 1e6:.0f} MB on one path, {kind}, last "
                    f"measured: reads {path['read_bytes_per_s'] / 1e9:.2f} GB/s, writes "
                    f"{path['write_bytes_per_s'] / 1e9:.2f} GB/s"
                )
    last = list(engines)[-1]
    console.print(f"\n{last}, the last update:\n{engines[last].lowtide.offload.chart(80)}")
    for engine in engines.values():
        engine.destroy()


@contextmanager
def throttled(rates: dict[str, float]) -> Iterator[None]:
    """Let each read and write take as long as the rate of its folder's name says, at least."""
    real = {name: getattr(ScratchFile, name) for name in ("read", "write")}

    def slowed(name: str) -> Callable[..., int]:
        def transfer(self: ScratchFile, data: torch.Tensor, *arguments: Any) -> int:
            end_s = time.perf_counter() + data.nbytes / rates.get(self.folder.name, math.inf)
            crc = int(real[name](self, data, *arguments))
            time.sleep(max(0.0, end_s - time.perf_counter()))
            return crc

        return transfer

    try:
        for name in real:
            setattr(ScratchFile, name, slowed(name))
        yield
    finally:
        for name, function in real.items():
            setattr(ScratchFile, name, function)


def run_swapped(
    options: argparse.Namespace, *, adapt: bool, buffers: Any = "auto"
) -> tuple[list[str], list[float]]:
    """Return a row of the table, and the seconds of each update."""
    folders = [Path(options.path[0]) / name for name in ("one", "two")]
    for each in folders:
        each.mkdir(exist_ok=True)
    rates = {"one": FAST, "two": SLOW}
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    with throttled(rates):
        engine = build(
            options.params,
            storage(options, list(map(str, folders)), adapt=adapt, buffers=buffers),
        )
        step_s = [iterate(engine, x)[0] for _ in range(BEFORE)]
        first = [each["share"] for each in engine.lowtide.offload.summary()["storage"]]
        rates |= {"one": SLOW, "two": FAST}
        step_s += [iterate(engine, x)[0] for _ in range(AFTER)]
    summary, plan = engine.lowtide.offload.summary(), engine.lowtide.offload.plan()
    nbytes = sum(each["stored_bytes"] for each in summary["storage"])
    bound_s = nbytes * (1 - plan.carried / len(plan.stored_order)) / (FAST + SLOW)
    last = [each["share"] for each in summary["storage"]]
    before_s, end_s = (statistics.median(e) for e in (step_s[BEFORE - 5 : BEFORE], step_s[-5:]))
    engine.destroy()
    shares = ["/".join(f"{each:.2f}" for each in found) for found in (first, last)]
    name = "follows the rates" if adapt else "stays"
    return [
        f"{name}, {plan.buffers} buffers",
        *(f"{each:.3f}" for each in (before_s, step_s[BEFORE], end_s, bound_s)),
        f"{end_s / bound_s:.2f}", *shares,
        f"{summary['storage_moves']['bytes'] / 1e6:.0f}",
    ], step_s  # fmt: skip


def swap(options: argparse.Namespace, console: Console) -> None:
    table = Table(
        title=f"Paths of {FAST / 1e9:g} and {SLOW / 1e9:g} GB/s per direction that change places "
        f"after {BEFORE} of {BEFORE + AFTER} updates"
    )
    columns = ["", "step s before", "right after", "at the end", "bound s", "x bound"]
    for column in [*columns, "shares before", "at the end", "moved MB"]:
        table.add_column(column, justify="right")
    found = {}
    for adapt, buffers in ((False, "auto"), (True, "auto"), (True, FEWEST_BUFFERS)):
        row, found[row[0]] = run_swapped(options, adapt=adapt, buffers=buffers)
        table.add_row(*row)
    console.print(table)
    for name, step_s in found.items():
        console.print(f"{name}, every step s: {' '.join(f'{each:.2f}' for each in step_s)}")


SECTIONS: dict[str, Callable[[argparse.Namespace, Console], None]] = {
    "rivals": compare,
    "swap": swap,
}


def main() -> None:
    """Print the tables."""
    options, console = parse(), Console(width=160)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with tempfile.TemporaryDirectory(prefix="storage-", dir=".") as folder:
        options.path = options.path or [folder]
        for name, section in SECTIONS.items():
            if options.only in (None, name):
                section(options, console)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
