"""Which checkpoint to load: verified, and the same on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.catalog import Entry, list_checkpoints
from lowtide.checkpoint.integrity import verify
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import find_damage, find_missing_parts

_VERIFY_TIMEOUT_S = 3600.0
_USABLE = ("complete", "unverified")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint to load.

    Attributes:
        folder: The folder that holds it, or None where there is none to load.
        name: The name of its own folder, what DeepSpeed calls its tag.
        skipped: One line about each newer one that cannot be used.
    """

    folder: Path | None = None
    name: str | None = None
    skipped: list[str] = field(default_factory=list)


class Finder:
    """Chooses checkpoints for all ranks of a run.

    Args:
        board: Where the ranks agree.
        mode: How much is read of a checkpoint before it is chosen.
    """

    def __init__(self, board: Board, mode: Literal["full", "fast", "off"]) -> None:
        self._board = board
        self._mode = mode
        self._count = 0

    def find(self, folders: Sequence[Path], tag: str | None, *, parts: int | None) -> Found:
        """Find the checkpoint to load. Collective.

        Without a tag that is what ``latest`` names, if it is whole; else the newest that is.

        Args:
            folders: Where to look, the fastest level first.
            tag: The name that the script asks for, or None.
            parts: Number of ranks of which each needs a part of its own, where that is so.

        Raises:
            CheckpointError: the one that was asked for is damaged.
        """
        self._count += 1
        place = f"find{self._count}"
        candidates = self._board.share(f"{place}/list", lambda: _candidates(folders, tag))
        skipped: list[str] = []
        for number, (folder, name, is_recorded) in enumerate(candidates):
            needed = None if is_recorded else parts
            damage = self._check(Path(folder) / name, f"{place}/{number}", needed)
            if damage is None:
                return Found(folder=Path(folder), name=name, skipped=skipped)
            skipped.append(f"checkpoint {Path(folder) / name} is not used: {damage}")
        if tag is not None and skipped:
            raise CheckpointError(
                f"{'; '.join(skipped)}. Name another tag, or none to load the newest that is whole"
            )
        return Found(skipped=skipped)

    def _check(self, checkpoint: Path, place: str, parts: int | None) -> str | None:
        """Let every rank check its share; return what rank 0 heard."""
        damage = self._damage(checkpoint, parts)
        if self._board.rank != 0:
            self._board.post(f"{place}/of/{self._board.rank}", [damage])
            answer: str | None = self._board.share(place, str, timeout_s=_VERIFY_TIMEOUT_S)
            return answer
        heard = [damage]
        for rank in range(1, self._board.world_size):
            name = f"{place}/of/{rank}"
            found = self._board.wait(name, timeout_s=_VERIFY_TIMEOUT_S)
            heard.append(found[0] if found else f"rank {rank} did not answer")
            self._board.forget(name)
        worst = next((text for text in heard if text is not None), None)
        self._board.share(place, lambda: worst)
        return worst

    def _damage(self, checkpoint: Path, parts: int | None) -> str | None:
        if not checkpoint.is_dir():
            return f"rank {self._board.rank} cannot see it"
        missing = find_missing_parts(checkpoint, world_size=parts) if parts is not None else None
        if missing is not None:
            return missing
        if self._mode == "off":
            return find_damage(checkpoint)
        share = (self._board.rank, self._board.world_size)
        report = verify(checkpoint, mode=self._mode, part=share)
        return str(report.damage[0]) if report.damage else None


def _candidates(folders: Sequence[Path], tag: str | None) -> list[tuple[str, str, bool]]:
    """Return (folder, name, has a record), what is to be tried first first."""
    found: list[tuple[Any, Entry, Path]] = []
    for number, folder in enumerate(folders):
        entries: list[Entry] = []
        with contextlib.suppress(CheckpointError):  # a level that is not there yet
            entries = list_checkpoints(folder)
        for entry in entries:
            if tag is None and entry.state not in _USABLE:
                continue
            if tag is not None and tag not in (entry.tag, entry.path.name):
                continue
            if entry.state in ("abandoned", "in progress", "trash"):
                continue
            step = -1 if entry.step is None else entry.step
            key = (not entry.is_latest if tag is None else False, -step, number, -entry.time_s)
            found.append((key, entry, folder))
    found.sort(key=lambda each: each[0])
    return [(str(folder), e.path.name, e.state != "unverified") for _, e, folder in found]
