"""Which levels of storage a checkpoint goes to."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.config import CheckpointConfig
from lowtide.checkpoint.costs import Costs
from lowtide.checkpoint.interval import Interval, level_interval_s
from lowtide.checkpoint.saving import Level

logger = logging.getLogger("lowtide")

PATIENT_S = 7200.0  # ranks may come to a save at very different times


class Router:
    """Chooses the levels of each checkpoint, the same on all ranks.

    Args:
        config: The plugin's settings.
        board: Where the ranks agree.
        levels: What ``tiers`` are on this rank's node, fastest first.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        board: Board,
        levels: Sequence[Level],
    ) -> None:
        self.levels = list(levels)
        self.costs = Costs()
        self._config = config
        self._board = board
        # A script may call a level by another name: a relative one, or through a symbolic link.
        self._paths = [os.path.realpath(tier.path) for tier in config.tiers]
        self._real: dict[Path, str] = {}  # of the folders asked for: the disk is asked once
        self._count = 0
        self._last_s: dict[int, float] = {}  # when the last one was sent to an "auto" level
        self._sick: set[int] = set()  # levels that failed last time, as rank 0 knows them

    def fell_ill(self, level: Level) -> None:
        """Note that a checkpoint has just failed on `level`; a folder beside them is none."""
        if level in self.levels:
            self._sick.add(level.number)

    def recovered(self, level: Level) -> None:
        """Note that a checkpoint has just been committed on `level`."""
        if level in self.levels:
            self._sick.discard(level.number)

    def missed(self, levels: Sequence[Level]) -> None:
        """Note that a checkpoint has failed on its way to these: the next one may take its turn."""
        for level in levels:
            self._last_s.pop(level.number, None)

    def places(self, asked: Path) -> list[Path]:
        """Return where to look for what is asked for in the folder `asked`, fastest first."""
        if (real := self._real_path(asked)) not in self._paths:
            return [asked]
        number = self._paths.index(real)
        is_last = number == len(self._paths) - 1
        levels = self.levels if is_last else [self.levels[number]]
        return [level.folder for level in levels]

    def route(self, folder: Path, attempt: str) -> list[Level]:
        """Return the levels for the next checkpoint that is saved to `folder`. Collective."""
        tiers = self._config.tiers
        if not tiers or self._real_path(folder) != self._paths[-1]:
            return [Level(number=0, folder=folder, keep=self._config.keep)]
        self._count += 1
        is_auto = any(tier.every == "auto" for tier in tiers)
        due = [] if is_auto else self._due()
        if is_auto or len(due) > 1:
            # One view of the time and of what works, or two ranks would write to two places.
            due = self._board.share(f"{attempt}/levels", self._choose, timeout_s=PATIENT_S)
        return [self.levels[number] for number in due or [0]]

    def interval_s(self, number: int) -> float:
        """Return the seconds between two checkpoints of a level whose turn is "auto"."""
        tier = self._config.tiers[number]
        between_s = tier.mean_time_between_failures_s or self._config.mean_time_between_failures_s
        return level_interval_s(self.costs, number, between_s)

    def intervals_s(self) -> dict[str, float]:
        """Return those of all such levels, by their folders."""
        tiers = enumerate(self._config.tiers)
        numbers = [number for number, tier in tiers if tier.every == "auto"]
        return {str(self.levels[number].folder): self.interval_s(number) for number in numbers}

    def interval(self) -> Interval | None:
        """Return what says when Lowtide saves by itself, if it does."""
        if self._config.every_n_steps is None:
            return None
        tiers = enumerate(self._config.tiers)
        return Interval(
            self._board,
            every_n_steps=self._config.every_n_steps,
            between_failures_s=self._config.mean_time_between_failures_s,
            costs=self.costs,
            shares={n: 1 / tier.every for n, tier in tiers if isinstance(tier.every, int)},
        )

    def _real_path(self, folder: Path) -> str:
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return self._real[folder]

    def _due(self) -> list[int]:
        """Return the numbers of the levels whose turn it is."""
        now_s = time.monotonic()
        due = []
        for number, tier in enumerate(self._config.tiers):
            if isinstance(tier.every, int):
                is_due = self._count % tier.every == 0
            else:
                last_s = self._last_s.get(number, -math.inf)
                if is_due := now_s - last_s >= self.interval_s(number):
                    self._last_s[number] = now_s
            due += [number] * is_due
        return due

    def _choose(self) -> list[int]:
        """Return where the next checkpoint goes, as rank 0 knows it."""
        due = self._due()
        if len(due) > 1:
            sick = self._take_sick()
            due = [number for number in due if number not in sick] or due[-1:]
            for number in sick:
                self._last_s.pop(number, None)  # it is tried again at once
        return due

    def _take_sick(self) -> list[int]:
        """Return the levels that this checkpoint leaves out; the next one tries them again."""
        sick, self._sick = sorted(self._sick), set()
        if sick:
            folders = ", ".join(str(self.levels[number].folder) for number in sick)
            logger.warning("this checkpoint leaves out %s, which failed last time", folders)
        return sick
