"""Which levels of storage a checkpoint goes to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.config import CheckpointConfig
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

    def __init__(self, config: CheckpointConfig, board: Board, levels: Sequence[Level]) -> None:
        self.levels = list(levels)
        self._config = config
        self._board = board
        self._count = 0
        self._sick: set[int] = set()  # levels that failed last time, as rank 0 knows them

    def fell_ill(self, level: Level) -> None:
        """Note that a checkpoint has just failed on `level`."""
        self._sick.add(level.number)

    def recovered(self, level: Level) -> None:
        """Note that a checkpoint has just been committed on `level`."""
        self._sick.discard(level.number)

    def places(self, asked: Path) -> list[Path]:
        """Return where to look for what is asked for in the folder `asked`, fastest first."""
        paths = [Path(tier.path).absolute() for tier in self._config.tiers]
        if asked not in paths:
            return [asked]
        is_last = asked == paths[-1]
        levels = self.levels if is_last else [self.levels[paths.index(asked)]]
        return [level.folder for level in levels]

    def route(self, folder: Path, attempt: str) -> list[Level]:
        """Return the levels for the next checkpoint that is saved to `folder`. Collective."""
        tiers = self._config.tiers
        if not tiers or folder != Path(tiers[-1].path).absolute():
            return [Level(number=0, folder=folder, keep=self._config.keep)]
        self._count += 1
        pairs = zip(self.levels, tiers, strict=True)
        due = [level for level, tier in pairs if self._count % tier.every == 0] or self.levels[:1]
        if len(due) > 1:
            # One view of what works, or two ranks would write one checkpoint to two places.
            sick = self._board.share(f"{attempt}/sick", self._take_sick, timeout_s=PATIENT_S)
            due = [level for level in due if level.number not in sick] or due[-1:]
        return due

    def _take_sick(self) -> list[int]:
        """Return the levels that this checkpoint leaves out; the next one tries them again."""
        sick, self._sick = sorted(self._sick), set()
        if sick:
            folders = ", ".join(str(self.levels[number].folder) for number in sick)
            logger.warning("this checkpoint leaves out %s, which failed last time", folders)
        return sick
