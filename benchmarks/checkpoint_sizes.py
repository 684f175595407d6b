"""The sections of bench_checkpoint.py about many tensors, and about memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint_rivals import MIB, Lowtide, Trainer


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
