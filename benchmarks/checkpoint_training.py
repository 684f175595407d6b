"""The sections of bench_checkpoint.py about writing while, or without, training goes on."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_rivals import (
    MIB,
    Dcp,
    DeepSpeedWriter,
    Lowtide,
    TorchSave,
    Trainer,
    at_once,
    nothing,
    raw_write_s,
)

GIB = 1 << 30


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


def rivals_of(trainer: Trainer, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return what makes each rival; one that does not start here raises."""

    def inside(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    return {
        "lowtide": lambda: Lowtide(trainer, inside("lowtide")),
        "torch.save + fsync": lambda: TorchSave(trainer, inside("torch")),
        "dcp async, stager": lambda: Dcp(trainer, inside("stager"), "stager"),
        "dcp async, thread": lambda: Dcp(trainer, inside("thread"), "thread"),
        "dcp async, process": lambda: Dcp(trainer, inside("process"), "process"),
        "deepspeed fast": lambda: DeepSpeedWriter(trainer, inside("fast"), is_decoupled=False),
        "deepspeed decoupled": lambda: DeepSpeedWriter(trainer, inside("apart"), is_decoupled=True),
    }


class Entrant:
    """A rival and what was seen of it; one that breaks takes no further part."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.seen: list[dict[str, float]] = []
        self.broken = ""
        self._rival: Any = None
        with self._noting():
            self._rival = make()

    @contextlib.contextmanager
    def _noting(self) -> Any:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a rival that does not start is a result too
            self.broken = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

    def take_turn(self, trainer: Trainer) -> None:
        """One iteration without and one with a checkpoint."""
        if self.broken:
            return
        quiet = one_iteration(trainer, None)
        with self._noting():
            busy = one_iteration(trainer, self._rival)
            busy["stretch"] = busy["compute"] - quiet["compute"]
            self.seen.append(busy)

    def line(self, gib: float, raw_s: float) -> str:
        """Return its row of the table, per GiB; the first round was to warm up."""
        if self.broken:
            return f"does not start here: {self.broken}"
        kept = self.seen[1:]
        blocked = sorted(each["blocked"] / gib for each in kept)
        stretch = statistics.median(each["stretch"] for each in kept) / gib
        durable = statistics.median(each["durable"] for each in kept) / gib
        middle = statistics.median(blocked)
        return (
            f"{middle:9.4f}{blocked[-1]:9.4f}{stretch:9.3f}{middle + stretch:9.3f}"
            f"{durable:9.3f}{durable / raw_s:7.2f}"
        )

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._rival.close()


def training(options: argparse.Namespace, folder: Path) -> None:
    """One checkpoint per iteration, all rivals in turn."""
    trainer = Trainer([8 * MIB] * round(options.gib * 128), options.iteration_s)
    entrants = {name: Entrant(make) for name, make in rivals_of(trainer, folder).items()}
    raw_s: list[float] = []
    for _ in range(options.rounds + 1):
        raw_s.append(raw_write_s(folder, trainer.total_bytes))
        for entrant in entrants.values():
            entrant.take_turn(trainer)
    gib = trainer.total_bytes / GIB
    raw = statistics.median(raw_s[1:]) / gib
    print(f"A checkpoint in an iteration of {options.iteration_s:g} s, {gib:.2f} GiB, s per GiB:")
    print(f"{'':20}{'blocked':>9}{'p99':>9}{'stretch':>9}{'sum':>9}{'durable':>9}{'/ raw':>7}")
    for name, entrant in entrants.items():
        print(f"{name:20}{entrant.line(gib, raw)}")
        entrant.close()
    print(
        f"raw, past the page cache: {raw:.3f} s/GiB (p99 is the worst of {options.rounds} rounds)"
    )


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
