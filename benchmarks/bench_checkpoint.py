"""What a checkpoint costs, against torch.save and torch.distributed.checkpoint, in one process.

A made-up trainer runs "forward and backward" (matrix products on one thread, about a second) and
then an update that changes every tensor in place. Every round goes through all rivals and through
iterations without a checkpoint, so that drift of the machine hits all of them alike; printed are
medians over the rounds, after one round to warm up. Nothing is timed without fsync.

- blocked: seconds in which the training thread could not go on: the call, and the wait before the
  update;
- stretch: how much longer forward and backward took than in the same round without a checkpoint;
- durable: from the request until everything is synced (for Lowtide: committed, with its record);
- raw: the same number of bytes written past the page cache by four threads, in the same round.

    python benchmarks/bench_checkpoint.py [--gib 1] [--rounds 7] [--folder DIR] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import mmap
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_rivals import (
    MIB,
    Dcp,
    Lowtide,
    TorchSave,
    Trainer,
    at_once,
    nothing,
    raw_write_s,
)

warnings.simplefilter("ignore")
GIB = 1 << 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="state of the rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iteration-s", type=float, default=1.0, help="forward and backward")
    parser.add_argument("--folder", default=None, help="on the disk to measure (system's temp)")
    names = [name for name, _ in SECTIONS]
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    return parser.parse_args()


# -- sections -----------------------------------------------------------------------------------


def one_iteration(trainer: Trainer, rival: Any | None) -> dict[str, float]:
    """One iteration that begins with a save; returns its times."""
    request_s = time.perf_counter()
    before_update, durable = rival.save() if rival is not None else (nothing, at_once)
    called_s = time.perf_counter()
    compute_s = trainer.forward_backward()
    begin_s = time.perf_counter()
    before_update()
    waited_s = time.perf_counter() - begin_s
    trainer.update()
    trained_s = time.perf_counter()
    durable_s = durable()
    return {
        "blocked": called_s - request_s + waited_s,
        "compute": compute_s,
        "iteration": trained_s - request_s,
        "durable": durable_s - request_s,
    }


def rivals_of(trainer: Trainer, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {"lowtide": Lowtide(trainer, folder / "lowtide")}
    (folder / "torch").mkdir()
    made["torch.save + fsync"] = TorchSave(trainer, folder / "torch")
    for way in ("stager", "thread", "process"):
        made[f"dcp async, {way}"] = Dcp(trainer, folder / way, way)
    return made


def training(options: argparse.Namespace, folder: Path) -> None:
    """One checkpoint per iteration, all rivals in turn."""
    trainer = Trainer([8 * MIB] * round(options.gib * 128), options.iteration_s)
    rivals = rivals_of(trainer, folder)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
    raw_s: list[float] = []
    broken: dict[str, str] = {}
    for _ in range(options.rounds + 1):
        raw_s.append(raw_write_s(folder, trainer.total_bytes))
        for name, rival in rivals.items():
            if name in broken:
                continue
            quiet = one_iteration(trainer, None)
            try:
                busy = one_iteration(trainer, rival)
            except Exception as error:  # noqa: BLE001 - a rival that does not start is a result too
                broken[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                continue
            busy["stretch"] = busy["compute"] - quiet["compute"]
            seen[name].append(busy)
    gib = trainer.total_bytes / GIB
    raw = statistics.median(raw_s[1:]) / gib
    print(f"A checkpoint in an iteration of {options.iteration_s:g} s, {gib:.2f} GiB, s per GiB:")
    print(f"{'':20}{'blocked':>9}{'p99':>9}{'stretch':>9}{'sum':>9}{'durable':>9}{'/ raw':>7}")
    for name, rounds in seen.items():
        if name in broken:
            print(f"{name:20}does not start here: {broken[name]}")
            continue
        kept = rounds[1:]
        blocked = sorted(each["blocked"] / gib for each in kept)
        stretch = statistics.median(each["stretch"] for each in kept) / gib
        durable = statistics.median(each["durable"] for each in kept) / gib
        middle = statistics.median(blocked)
        print(
            f"{name:20}{middle:9.4f}{blocked[-1]:9.4f}{stretch:9.3f}{middle + stretch:9.3f}"
            f"{durable:9.3f}{durable / raw:7.2f}"
        )
    print(
        f"raw, past the page cache: {raw:.3f} s/GiB (p99 is the worst of {options.rounds} rounds)"
    )
    for rival in rivals.values():
        with contextlib.suppress(Exception):
            rival.close()


def idle(options: argparse.Namespace, folder: Path) -> None:
    """Time to durable with nothing else to do, against the raw disk, in turn."""
    trainer = Trainer([8 * MIB] * round(options.gib * 128), 0.01)
    lowtide = Lowtide(trainer, folder / "lowtide")
    ratios, durables_s = [], []
    for _ in range(options.rounds + 1):
        raw_s = raw_write_s(folder, trainer.total_bytes)
        begin_s = time.perf_counter()
        before_update, durable = lowtide.save()
        durable()
        durables_s.append(time.perf_counter() - begin_s)
        before_update()
        trainer.update()
        ratios.append(durables_s[-1] / raw_s)
    lowtide.close()
    print(
        f"Idle: durable {statistics.median(durables_s[1:]):.3f} s, "
        f"{statistics.median(ratios[1:]):.2f} times raw in the same round "
        f"(from {min(ratios[1:]):.2f} to {max(ratios[1:]):.2f})"
    )


def every_iteration(options: argparse.Namespace, folder: Path) -> None:
    """Throughput with a checkpoint in every iteration, against none, in blocks in turn."""
    trainer = Trainer([8 * MIB] * round(options.gib * 128), options.iteration_s)
    lowtide = Lowtide(trainer, folder / "lowtide")
    ratios = []
    for _ in range(max(3, options.rounds // 2) + 1):
        times_s = {}
        for name in ("without", "with"):
            begin_s = time.perf_counter()
            for _ in range(8):
                before_update: Callable[[], None] = nothing
                if name == "with":
                    before_update, durable = lowtide.save()
                trainer.forward_backward()
                before_update()
                trainer.update()
            times_s[name] = time.perf_counter() - begin_s
            if name == "with":
                durable()
        ratios.append(times_s["without"] / times_s["with"])
    lowtide.close()
    rate = trainer.total_bytes / GIB / (times_s["without"] / 8)
    print(
        f"Every iteration: {100 * statistics.median(ratios[1:]):.1f} % of the throughput without "
        f"checkpoints (from {100 * min(ratios[1:]):.1f} to {100 * max(ratios[1:]):.1f}), "
        f"{rate:.2f} GiB/s asked of the disk"
    )


def many_tensors(options: argparse.Namespace, folder: Path) -> None:
    """20,000 tensors of 4 to 64 KiB against one tensor of the same size, both synced.

    The first saves of savers that were just opened are reported apart from later ones.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randint(1, 17, (20_000,), generator=generator) * 4096).tolist()
    trainers = {"small": Trainer(sizes, 0.01), "large": Trainer([sum(sizes)], 0.01)}
    calls_s: list[float] = []
    ratios: dict[str, list[float]] = {"first": [], "later": []}
    for number in range(options.rounds + 1):
        pair = {name: Lowtide(each, folder / f"{name}{number}") for name, each in trainers.items()}
        for lowtide in pair.values():
            lowtide.wait_ready()
        for which in ("first", "later", "later"):
            times_s = {}
            for name, lowtide in pair.items():
                begin_s = time.perf_counter()
                before_update, durable = lowtide.save()
                called_s = time.perf_counter() - begin_s
                times_s[name] = durable() - begin_s
                before_update()
                trainers[name].update()
                if name == "small" and number > 0:
                    calls_s.append(called_s)
            if number > 0:
                ratios[which].append(times_s["large"] / times_s["small"])
        for name, lowtide in pair.items():
            lowtide.close()
            shutil.rmtree(folder / f"{name}{number}")
    print(
        f"20,000 tensors, {sum(sizes) / MIB:.0f} MiB, to durable, against one tensor of that size: "
        f"{100 * statistics.median(ratios['first']):.0f} % of its throughput at a saver's first "
        f"save, {100 * statistics.median(ratios['later']):.0f} % at later ones; the call itself "
        f"takes {statistics.median(calls_s) * 1e3:.0f} ms"
    )


def memory(options: argparse.Namespace, folder: Path) -> None:
    """What 200 checkpoints leave behind, and what one takes beyond its buffer."""
    trainer = Trainer([MIB] * 64, 0.01)
    lowtide = Lowtide(trainer, folder / "lowtide", buffer_bytes=32 * MIB)
    facts = []
    for count in range(220):
        before_update, durable = lowtide.save()
        before_update()
        trainer.update()
        durable()
        if count in (19, 219):
            facts.append((rss_bytes(), len(os.listdir("/proc/self/fd"))))
    lowtide.close()
    print(
        f"200 saves of 64 MiB through a buffer of 32 MiB: resident memory grew by "
        f"{(facts[1][0] - facts[0][0]) / MIB:.1f} MiB, open files by {facts[1][1] - facts[0][1]}"
    )
    big = Trainer([8 * MIB] * round(options.gib * 128), 0.01)
    lowtide = Lowtide(big, folder / "big", buffer_bytes=128 * MIB)
    lowtide.wait_ready()
    start, peak = rss_bytes(), 0
    before_update, durable = lowtide.save()
    with sampling() as samples:
        before_update()
        durable()
    peak = max(samples, default=start)
    lowtide.close()
    print(
        f"{big.total_bytes / MIB:.0f} MiB through a buffer of 128 MiB: at most "
        f"{(peak - start) / MIB:.1f} MiB of memory beyond the buffer"
    )


@contextlib.contextmanager
def sampling() -> Iterator[list[int]]:
    """Collect this process's resident memory while the ``with`` body runs."""
    import threading

    samples: list[int] = []
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.005):
            samples.append(rss_bytes())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def restore(options: argparse.Namespace, folder: Path) -> None:
    """Reading back: verified load against raw reads from the disk; verification of cached files.

    The verified load is what stands behind `load_checkpoint`: find, check, agree, load. Each load
    ends when every page of every tensor has been touched.
    """
    from lowtide.checkpoint import verify
    from lowtide.checkpoint.board import Board
    from lowtide.checkpoint.files.image import load_file
    from lowtide.checkpoint.store.finding import Finder

    trainer = Trainer([8 * MIB] * round(options.gib * 128), 0.01)
    lowtide = Lowtide(trainer, folder / "lowtide")
    before_update, durable = lowtide.save()
    durable()
    before_update()
    lowtide.close()
    checkpoint = folder / "lowtide" / "step1"
    path = checkpoint / "state.pt"

    def verified_load() -> Any:
        finder = Finder(Board(), "full", wanted=lambda _checkpoint: [path.name])
        finder.find([checkpoint.parent], None, parts=None)
        image = finder.take(path)
        return load_file(path, image, "cpu") if image is not None else None

    def plain_load() -> Any:
        return torch.load(path, map_location="cpu", weights_only=False)

    def twice() -> Any:
        verify(checkpoint)
        return plain_load()

    loads = {"verified load": verified_load, "torch.load": plain_load, "verify, torch.load": twice}
    times_s: dict[str, list[float]] = {name: [] for name in ("raw", *loads, "verify")}
    for _ in range(options.rounds + 1):
        times_s["raw"].append(raw_read_s(path))
        for name, load in loads.items():
            drop_from_cache(path)
            begin_s = time.perf_counter()
            state = load()
            for tensor in state.values():
                tensor[:: mmap.PAGESIZE // 4].sum()
            times_s[name].append(time.perf_counter() - begin_s)
            del state
        begin_s = time.perf_counter()
        verify(checkpoint, threads=1)
        times_s["verify"].append(time.perf_counter() - begin_s)
    size = path.stat().st_size
    medians = {name: statistics.median(values[1:]) for name, values in times_s.items()}
    raw = size / medians["raw"]
    print(f"Read back {size / GIB:.2f} GiB that is not cached; raw {raw / 1e9:.2f} GB/s:")
    for name in loads:
        ratios = [a / b for a, b in zip(times_s["raw"][1:], times_s[name][1:], strict=True)]
        print(
            f"  {name:19} {size / medians[name] / 1e9:.2f} GB/s, "
            f"{100 * statistics.median(ratios):.0f} % of raw in the same round "
            f"(from {100 * min(ratios):.0f} to {100 * max(ratios):.0f})"
        )
    print(
        f"  verification of cached files by one thread: {size / medians['verify'] / 1e9:.1f} GB/s"
    )


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def raw_read_s(path: Path) -> float:
    """Seconds to read `path` past the page cache by four threads."""
    drop_from_cache(path)
    chunk = 4 * MIB
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = [mmap.mmap(-1, chunk) for _ in range(4)]
    for buffer in buffers:
        buffer.write(bytes(chunk))
    offsets = list(range(0, path.stat().st_size, chunk))

    def read(worker: int) -> None:
        for offset in offsets[worker::4]:
            os.preadv(descriptor, [buffers[worker]], offset)

    begin_s = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    elapsed_s = time.perf_counter() - begin_s
    os.close(descriptor)
    return elapsed_s


SECTIONS: list[tuple[str, Callable[[argparse.Namespace, Path], None]]] = [
    ("training", training),
    ("idle", idle),
    ("every_iteration", every_iteration),
    ("many_tensors", many_tensors),
    ("memory", memory),
    ("restore", restore),
]


def main() -> int:
    options = parse()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29641", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo")
    print(json.dumps({"folder": options.folder or tempfile.gettempdir(), "load": os.getloadavg()}))
    for name, section in SECTIONS:
        if name not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="lowtide-bench-", dir=options.folder) as folder:
            section(options, Path(folder))
        sys.stdout.flush()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
