"""The folders that a run saves in are its own: another job that comes there is told.

The first save to a folder claims it, on all ranks with one outcome; after that nobody but a thread
that renews the claim, and the commit, has to do with it. A job that only loads claims nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.errands import Errands
from lowtide.checkpoint.nodes.placement import Nodes
from lowtide.checkpoint.routing import PATIENT_S
from lowtide.checkpoint.saving import Level
from lowtide.checkpoint.store import claim as store
from lowtide.checkpoint.store.claim import CLAIM_FILE, Claim, Holder
from lowtide.core.errors import CheckpointError

logger = logging.getLogger("lowtide")
T = TypeVar("T")

_MOST = 8  # folders claimed at once, beside the levels: some scripts name a new one at each save
_KEPT_ANSWERS = 64
_GOODBYE_S = 1.0


class Claims:
    """The claims of one run.

    Args:
        board: Where the ranks agree.
        nodes: Who is on which node, where there are levels of which each has its own.
        errands: Does what may hang; the saver's, so that nobody waits twice for what does.
        levels: How many levels of storage there are.
        timeout_s: How long a file system may take.
    """

    def __init__(
        self, board: Board, nodes: Nodes | None, errands: Errands, *, levels: int, timeout_s: float
    ) -> None:
        self._board = board
        self._nodes = nodes
        self._most = _MOST + levels
        self._timeout_s = timeout_s
        self._errands = errands
        self._known: dict[Path, None] = {}  # claimed, or not to be: the same on all ranks
        self._mine: dict[Path, Claim] = {}  # where this rank leads
        self._count = 0

    def take(self, levels: Sequence[Level], tag: str) -> None:
        """Claim the folders in which `tag` comes to lie on `levels`. Collective.

        Raises:
            CheckpointError: another job that may be alive saves in one of them.
        """
        wanted = {(level.folder / tag).parent: level for level in levels}
        new = {folder: level for folder, level in wanted.items() if folder not in self._known}
        if new:
            refusal = self._agree(new)
            if refusal is not None:
                self._let_go(new)
                raise CheckpointError(refusal)
        for folder in wanted:  # the last used last
            self._known.pop(folder, None)
            self._known[folder] = None
        self._let_go(list(self._known)[: max(0, len(self._known) - self._most)])

    def check(self, folder: Path) -> None:
        """Make sure that `folder` is this run's still; on the rank that leads there.

        Raises:
            OSError: another job has it now, or that cannot be known.
        """
        claim = self._mine.get(folder)
        other = None if claim is None else claim.check()
        if other is not None:
            raise FileExistsError(_in_use(folder, other))

    def warn(self, levels: Iterable[Level]) -> None:
        """Say it, where another job seems to save in the folders of `levels`."""
        for level in levels:
            if self._leads(level):
                look = functools.partial(self._warn, level.folder)
                with contextlib.suppress(OSError):
                    self._errands.run(level.folder, look, timeout_s=self._timeout_s)

    def close(self) -> None:
        """Let go of everything."""
        self._let_go(list(self._known))

    def _leads(self, level: Level) -> bool:
        if level.is_of_node and self._nodes is not None:
            return self._nodes.is_leader
        return self._board.rank == 0

    def _agree(self, folders: dict[Path, Level]) -> str | None:
        """Claim `folders` on the ranks that lead there; return on all why that cannot be."""
        self._count += 1
        place = f"claims/{self._count}"
        is_of_node = any(level.is_of_node for level in folders.values())
        leaders = [ranks[0] for ranks in self._nodes.ranks] if is_of_node and self._nodes else [0]
        refusal = None
        if self._board.rank in leaders:
            mine = [(folder, level) for folder, level in folders.items() if self._leads(level)]
            told = [self._claim(folder, level) for folder, level in mine]
            refusal = next((text for text in told if text is not None), None)
            if self._board.rank != 0:
                self._board.post(f"{place}/{self._board.rank}", [refusal])

        def collect() -> str | None:
            texts = [refusal]
            for rank in leaders:
                if rank != 0:
                    texts += self._board.wait(f"{place}/{rank}", timeout_s=PATIENT_S) or []
                    self._board.forget(f"{place}/{rank}")
            return next((text for text in texts if text is not None), None)

        answer: str | None = self._board.share(place, collect, timeout_s=PATIENT_S)
        if self._board.rank == 0 and self._count > _KEPT_ANSWERS:
            self._board.forget(f"claims/{self._count - _KEPT_ANSWERS}")
        return answer

    def _claim(self, folder: Path, level: Level) -> str | None:
        """Claim one folder; return why that cannot be. Where nothing can be written, so be it."""
        own = Holder.of_this_process(self._board.token)
        path = folder / CLAIM_FILE

        def take(dead: Holder | None = None) -> Holder | None:
            folder.mkdir(parents=True, exist_ok=True)
            other, claim = store.shared.take(folder, own, self, dead=dead)
            if claim is not None:
                self._mine[folder] = claim
            return other

        try:
            other = self._do(level, take)
            if other is not None and other.is_alive() is None:
                seen = other
                if not self._do(level, lambda: store.watch(path, seen), more_s=store.WATCH_S):
                    other = self._do(level, lambda: take(seen))
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer
            logger.warning("%s: cannot be claimed for this job: %s", folder, error)
            return None
        return None if other is None else _in_use(folder, other)

    def _do(self, level: Level, work: Callable[[], T], *, more_s: float = 0.0) -> T:
        answers: list[T] = []
        timeout_s = self._timeout_s + more_s
        self._errands.run(level.folder, lambda: answers.append(work()), timeout_s=timeout_s)
        return answers[0]

    def _let_go(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            self._known.pop(folder, None)
            claim = self._mine.pop(folder, None)
            if claim is not None:
                give_back = functools.partial(store.shared.give_back, claim, self)
                with contextlib.suppress(OSError):
                    self._errands.run(folder, give_back, timeout_s=_GOODBYE_S)

    def _warn(self, folder: Path) -> None:
        other = store.find_other(folder / CLAIM_FILE)
        if other is not None:
            logger.warning("%s", _in_use(folder, other))


def _in_use(folder: Path, other: Holder) -> str:
    return (
        f"{folder}: another job saves its checkpoints there ({other}), and each would overwrite "
        f"the other's; save to another folder, or end that job. If it has ended already, remove "
        f"{folder / CLAIM_FILE}"
    )
