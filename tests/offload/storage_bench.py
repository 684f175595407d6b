"""The same optimizer state in memory and in files, and ways to let files fail."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.core.device import open_device
from lowtide.core.state import StateAuthority
from lowtide.offload.adam import Powers, adam_step
from lowtide.offload.executor import Executor
from lowtide.offload.one_update import Work
from lowtide.offload.plan import host_only_plan
from lowtide.offload.rates import PathRates
from lowtide.offload.storage.files import ScratchFile
from lowtide.offload.storage.layout import lay_out
from lowtide.offload.storage.mapping import PAGE_ELEMENTS
from lowtide.offload.storage.tier import Tier
from lowtide.offload.subgroup import ALIGNMENT, Subgroup, cuts

NUMELS = (5_000, 30_005, 20_000, 900)
MEMORY_BYTES = 12 * 22_000
BETAS = (0.9, 0.95)
EVEN = PathRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9)


class Bench:
    """The same state twice: in memory only, and mostly in files below `folder`."""

    def __init__(
        self, folder: Path, *, stall_s: float = 20.0, buffers: int = 3, direct: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        for name in ("a", "b"):
            (folder / name).mkdir()
        layout = lay_out(
            NUMELS, memory_bytes=MEMORY_BYTES, piece=2 * PAGE_ELEMENTS, buffers=buffers,
            vector=ALIGNMENT,
        )  # fmt: skip
        ways = {"a": direct, "b": False}
        self.files = [ScratchFile(folder / name, direct=way) for name, way in ways.items()]
        self.tier = Tier(self.files, layout, [EVEN, EVEN], NUMELS, stall_s=stall_s)
        self.expected = [
            tuple(torch.randn(n, generator=generator).abs() for _ in range(3)) for n in NUMELS
        ]
        self.found = [
            self.tier.tensors(i) if i in self.tier.ranges else tuple(t.clone() for t in state)
            for i, state in enumerate(self.expected)
        ]
        for flat in self.tier.ranges:
            self.tier.take(flat, self.expected[flat])
        self.authority = StateAuthority()
        self.device = open_device("emulated", memory_bytes=10**7)
        self.executor = Executor(self.device, self._subgroups(), self.authority, tier=self.tier)
        self.reference = Executor(
            open_device("cpu"),
            [
                self._subgroup(f"r/{i}/{begin}", i, begin, count, self.expected, None)
                for i, n in enumerate(NUMELS)
                for begin, count in cuts(n // ALIGNMENT * ALIGNMENT, 10**6)
            ],
            StateAuthority(),
        )
        self.gradients = [[torch.randn(n, generator=generator) for n in NUMELS] for _ in range(12)]
        self.powers, self.step = Powers(*BETAS), 0

    def _subgroups(self) -> list[Subgroup]:
        numbers = {(e.extent.flat, e.extent.begin): n for n, e in enumerate(self.tier.pieces)}
        found = []
        for flat, numel in enumerate(NUMELS):
            extents = [e for e in self.tier.layout.extents if e.flat == flat]
            spans = (
                [(e.begin, e.numel) for e in extents]
                if flat in self.tier.ranges
                else list(cuts(numel // ALIGNMENT * ALIGNMENT, 10**6))
            )
            found += [
                self._subgroup(
                    f"s/{flat}/{begin}", flat, begin, count, self.found, numbers.get((flat, begin))
                )
                for begin, count in spans
            ]
        return found

    @staticmethod
    def _subgroup(
        key: str, flat: int, begin: int, count: int, states: Any, stored: int | None
    ) -> Subgroup:
        master, exp_avg, exp_avg_sq = (t.narrow(0, begin, count) for t in states[flat])
        return Subgroup(
            key=key, group=0, flat=flat, begin=begin, master=master, exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq, weights=torch.zeros(count, dtype=torch.bfloat16), stored=stored,
        )  # fmt: skip

    def run(self, plan: Any = None) -> None:
        """Update both."""
        self.step += 1
        step = adam_step(
            self.powers.advance(self.step, *BETAS), lr=0.01, betas=BETAS, eps=1e-8,
            weight_decay=0.1,
        )  # fmt: skip
        flats = self.gradients[(self.step - 1) % len(self.gradients)]
        for executor in (self.reference, self.executor):
            buffers = executor.buffers
            works = [Work(e.part_of(flats[e.flat]), 0.5, step) for e in executor.subgroups]
            pieces = executor.pieces()
            chosen = (
                host_only_plan(pieces, buffers=buffers)
                if plan is None or executor is self.reference
                else plan
            )
            executor.run(chosen, works)

    def go_on_from_found(self) -> None:
        """Let memory have what the files have, as after an update that was broken off."""
        for expected, found in zip(self.expected, self.found, strict=True):
            for there, here in zip(expected, found, strict=True):
                there.copy_(here)

    def assert_equal(self) -> None:
        """All state and all rounded weights are those of memory."""
        self.executor.drain()
        for flat, state in enumerate(self.expected):
            for name, expected, found in zip("pmv", state, self.found[flat], strict=True):
                assert torch.equal(expected, found), f"{name} of master {flat}"
        for each in self.executor.subgroups:
            assert each.weights is not None
            assert torch.equal(each.weights, each.master.to(torch.bfloat16)), each.key

    def moves(self) -> dict[str, int]:
        """Count the last update's transfers by lane."""
        lanes = [each.lane for each in self.executor.trace.operations()]
        return {lane: lanes.count(lane) for lane in sorted(set(lanes)) if lane[-1:].isdigit()}

    def close(self) -> None:
        """Take the tier away; the tensors hold everything."""
        self.executor.close()
        self.tier.close()


class Witness:
    """A reader of live memory that looks, whenever it is asked, whether it is asked in time."""

    is_reading = True

    def __init__(self, bench: Bench) -> None:
        self.before = {e.key: [t.clone() for t in e.state()] for e in bench.executor.subgroups}
        self.left = {e.key: e for e in bench.executor.subgroups}
        self.told: list[int] = []
        self.asked: list[int] = []

    def hurry(self, memory: Any) -> None:
        self.told += memory[:, 0].tolist()

    def is_released(self, memory: Any) -> bool:
        return True

    def release(self, memory: Any) -> None:
        for key, each in self.left.items():
            assert all(map(torch.equal, each.state(), self.before[key])), f"{key} is overwritten"
        self.asked += memory[:, 0].tolist()
        for each in list(self.left.values()):
            if each.master.data_ptr() in memory[:, 0]:
                del self.left[each.key]


def fail_at(
    monkeypatch: pytest.MonkeyPatch, name: str, turn: int, *, folders: str, how: Callable[..., Any]
) -> None:
    """Replace the `turn`-th and all later reads or writes below `folders`."""
    real, count = getattr(ScratchFile, name), itertools.count()

    def wrapped(self: ScratchFile, *arguments: Any) -> int:
        if self.folder.name in folders and next(count) >= turn:
            return int(how(real, self, *arguments))
        return int(real(self, *arguments))

    monkeypatch.setattr(ScratchFile, name, wrapped)


def refuse(*_arguments: Any) -> int:
    raise OSError(5, "Input/output error")


def no_space(*_arguments: Any) -> None:
    """Say what a full file system says."""
    raise OSError(errno.ENOSPC, "No space left on device")
