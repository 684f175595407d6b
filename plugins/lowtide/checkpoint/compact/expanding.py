"""Makes a compact checkpoint loadable for all ranks, for as long as they load it."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.compact.copies import beside, expand, is_compact
from lowtide.core.errors import CheckpointError

_TIMEOUT_S = 3600.0


class Expander:
    """Expands compact checkpoints beside themselves, under a hidden name.

    Args:
        board: Where the ranks agree.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._count = 0
        self._target: Path | None = None

    def expanded(self, checkpoint: Path) -> Path:
        """Return `checkpoint`, or where rank 0 has expanded it. Collective.

        Raises:
            CheckpointError: it, or one that it refers to, is damaged; or there is no space.
        """
        if not is_compact(checkpoint):
            return checkpoint
        self._count += 1
        self._target = checkpoint.with_name(f".{checkpoint.name}.expanded")
        name = f"expand/{self._count}"
        error = self._board.share(name, lambda: self._make(checkpoint), timeout_s=_TIMEOUT_S)
        if error is not None:
            raise CheckpointError(error)
        return self._target

    def forget(self) -> None:
        """Remove what was expanded, once all ranks have loaded it. Collective."""
        target, self._target = self._target, None
        if target is None:
            return
        place = f"expand/{self._count}/loaded"
        if self._board.rank != 0:
            self._board.post(f"{place}/{self._board.rank}", [])
            return
        for rank in range(1, self._board.world_size):
            if self._board.wait(f"{place}/{rank}", timeout_s=_TIMEOUT_S) is None:
                return  # it may be reading still; the next start removes it
        shutil.rmtree(target, ignore_errors=True)

    def _make(self, checkpoint: Path) -> str | None:
        target = checkpoint.with_name(f".{checkpoint.name}.expanded")
        shutil.rmtree(target, ignore_errors=True)  # of a start that died while loading
        try:
            expand(checkpoint, target, find_base=beside(checkpoint))
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer
            return f"{checkpoint}: cannot be expanded: {error}"
        return None
