"""Reads committed checkpoints again while training goes on, so that damage is found in time."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lowtide.checkpoint.store.catalog import Entry, list_checkpoints
from lowtide.checkpoint.store.integrity import verify
from lowtide.core.errors import CheckpointError

logger = logging.getLogger("lowtide")

_NICENESS = 10


class Scrub:
    """A thread that checks this rank's share of one checkpoint every so often.

    Always the one that was not checked for longest, so that in time all of them are.

    Args:
        folders: Called for the folders that hold checkpoints.
        every_s: Time between two checks.
        rank: This rank, which reads its part of each checkpoint.
        world_size: Number of ranks that share the work.
    """

    def __init__(
        self,
        folders: Callable[[], Sequence[Path]],
        *,
        every_s: float,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.damaged: dict[str, str] = {}  # checkpoint -> what is wrong with it
        self.checked = 0
        self._folders = folders
        self._every_s = every_s
        self._part = (rank, world_size)
        self._looked_s: dict[Path, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="lowtide-checkpoint-scrub", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread, if need be in the middle of a checkpoint."""
        self._done.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while not self._done.wait(self._every_s):
            entry = self._next()
            if entry is not None:
                self._check(entry.path)

    def _next(self) -> Entry | None:
        found: list[Entry] = []
        for folder in self._folders():
            with contextlib.suppress(CheckpointError):  # not there yet
                found += [e for e in list_checkpoints(folder) if e.state == "complete"]
        there = {entry.path for entry in found}
        self._looked_s = {path: at for path, at in self._looked_s.items() if path in there}
        return min(found, key=lambda e: self._looked_s.get(e.path, 0.0), default=None)

    def _check(self, checkpoint: Path) -> None:
        self._looked_s[checkpoint] = time.monotonic()
        try:
            report = verify(checkpoint, part=self._part, threads=1)
        except CheckpointError:
            return  # it has been removed since
        if not checkpoint.is_dir():
            return  # removed in the middle of it, so what was found says nothing
        self.checked += 1
        if report.is_ok or str(checkpoint) in self.damaged:
            return
        self.damaged[str(checkpoint)] = str(report.damage[0])
        logger.warning(
            "%s: is damaged on its disk: %s; it will not be loaded, and training goes on",
            checkpoint,
            report.damage[0],
        )
