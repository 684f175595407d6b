"""The section of bench_checkpoint.py about reading back."""

from __future__ import annotations

import argparse
import concurrent.futures
import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_rivals import MIB, Lowtide, Trainer

GIB = 1 << 30


def write_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """Return a committed checkpoint's only file."""
    trainer = Trainer([8 * MIB] * round(options.gib * 128), 0.01)
    lowtide = Lowtide(trainer, folder / "lowtide")
    before_update, durable = lowtide.save()
    durable()
    before_update()
    lowtide.close()
    return folder / "lowtide" / "step1" / "state.pt"


def loads_of(path: Path) -> dict[str, Callable[[], Any]]:
    """Return the ways to load a file."""
    from lowtide.checkpoint import verify
    from lowtide.checkpoint.board import Board
    from lowtide.checkpoint.files.image import load_file
    from lowtide.checkpoint.store.finding import Finder

    def verified_load() -> Any:
        finder = Finder(Board(), "full", wanted=lambda _checkpoint: [path.name])
        finder.find([path.parent.parent], None, parts=None)
        image = finder.take(path)
        return load_file(path, image, "cpu") if image is not None else None

    def plain_load() -> Any:
        return torch.load(path, map_location="cpu", weights_only=False)

    def twice() -> Any:
        verify(path.parent)
        return plain_load()

    return {"verified load": verified_load, "torch.load": plain_load, "verify, torch.load": twice}


def load_s(path: Path, load: Callable[[], Any]) -> float:
    """Seconds to load what is not cached, until every page of every tensor has been touched."""
    drop_from_cache(path)
    begin_s = time.perf_counter()
    state = load()
    for tensor in state.values():
        tensor[:: mmap.PAGESIZE // 4].sum()
    return time.perf_counter() - begin_s


def restore(options: argparse.Namespace, folder: Path) -> None:
    """Reading back: verified load against raw reads from the disk; verification of cached files.

    The verified load is what stands behind `load_checkpoint`: find, check, agree, load.
    """
    from lowtide.checkpoint import verify

    path = write_checkpoint(options, folder)
    loads = loads_of(path)
    times_s: dict[str, list[float]] = {name: [] for name in ("raw", *loads, "verify")}
    for _ in range(options.rounds + 1):
        times_s["raw"].append(raw_read_s(path))
        for name, load in loads.items():
            times_s[name].append(load_s(path, load))
        begin_s = time.perf_counter()
        verify(path.parent, threads=1)
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
