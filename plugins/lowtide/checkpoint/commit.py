"""Two-phase commit of one checkpoint on one level of storage, off the training's communication.

Phase 1: every rank syncs its files and its manifest, then posts its vote. Phase 2: rank 0 has all
votes, writes the completion record, gives the folder its name, moves ``latest``, and posts the
outcome. Whatever dies in between leaves a hidden folder without a name: no reader takes it for a
checkpoint, except one that already holds its record, and that one is whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.folders import publish, remove, write_latest
from lowtide.checkpoint.manifest import Manifest, write_manifest
from lowtide.checkpoint.plan import FileResult
from lowtide.checkpoint.saving import Level, Saving
from lowtide.checkpoint.writer import Ticket
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import write_record

logger = logging.getLogger("lowtide")

_LOOK_S = 0.25  # between two looks at a ticket's progress


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long things may take, in seconds."""

    stall_s: float
    commit_s: float


def wait_durable(ticket: Ticket, *, what: str, stall_s: float) -> list[FileResult]:
    """Wait until a ticket's files are on storage.

    Raises:
        CheckpointError: they cannot be written, or nothing has moved for `stall_s`.
    """
    while not ticket.wait_durable(_LOOK_S):
        if ticket.error is not None:
            break
        idle_s = ticket.progress().idle_s
        if idle_s > stall_s:
            ticket.cancel()
            raise CheckpointError(
                f"{what}: no byte has been written for {idle_s:.0f} s "
                f"(lowtide.checkpoint.stall_timeout_s); the storage hangs"
            )
    return ticket.results()


class Committer:
    """Brings checkpoints from "written by this rank" to "complete for all".

    Args:
        board: Where ranks vote.
        limits: How long things may take.
    """

    def __init__(self, board: Board, limits: Limits) -> None:
        self._board = board
        self._limits = limits
        self._outcomes: list[str] = []  # posts of rank 0 that nobody needs any more, soon

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._board.rank

    def agree(self, saving: Saving, level: Level, *, go: bool) -> bool:
        """Return rank 0's `go` on every rank: whether `saving` is brought to `level`."""
        name = f"{saving.attempt}/{level.number}/go"
        timeout_s = self._limits.commit_s
        is_going: bool = self._board.share(name, lambda: go, timeout_s=timeout_s)
        if self._board.rank == 0:
            self._forget_later(name)
        return is_going

    def vote(self, saving: Saving, level: Level, results: list[FileResult]) -> dict[str, Any]:
        """Write this rank's manifest and return its vote."""
        part = saving.part(level)
        rank = self._board.rank
        manifest = Manifest.of_results(
            part, results, attempt=saving.attempt, rank=rank, step=saving.step
        )
        name, size_bytes, crc32 = write_manifest(part, manifest)
        files = {name: sums.size_bytes for name, sums in manifest.files.items()}
        return {"manifest": name, "size_bytes": size_bytes, "crc32": crc32, "files": files}

    def decide(self, saving: Saving, level: Level, vote: Mapping[str, Any]) -> None:
        """Post this rank's vote and wait for the outcome, which rank 0 brings about.

        Args:
            saving: The checkpoint.
            level: The level that it is to be committed on.
            vote: What `vote` returned, or ``{"error": text}``.

        Raises:
            CheckpointError: it is not committed; says which rank lacks what.
        """
        place = f"{saving.attempt}/{level.number}"
        if self._board.rank == 0:
            outcome = self._conclude(saving, level, dict(vote), place)
            self._board.post(f"{place}/outcome", outcome)
            self._forget_later(f"{place}/outcome")
        else:
            self._board.post(f"{place}/vote/{self._board.rank}", vote)
            # Rank 0 may wait for a slower rank for as long as that may take.
            timeout_s = 2 * self._limits.commit_s + self._limits.stall_s
            outcome = self._board.wait(f"{place}/outcome", timeout_s=timeout_s)
        if outcome is None:
            outcome = {"error": f"rank 0 did not say whether it is complete within {timeout_s} s"}
        if "error" in outcome:
            raise CheckpointError(f"checkpoint {saving.tag} in {level.folder}: {outcome['error']}")

    def _conclude(
        self, saving: Saving, level: Level, own: dict[str, Any], place: str
    ) -> dict[str, Any]:
        votes = {0: own}
        missing: list[int] = []
        for rank, vote in self._collect(place):
            if vote is None:
                missing.append(rank)
            else:
                votes[rank] = vote
        errors = [f"rank {rank}: {v['error']}" for rank, v in votes.items() if "error" in v]
        if missing:
            ranks = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            errors.append(f"no word from rank {ranks} within {self._limits.commit_s:g} s")
        if not errors:
            try:
                self._complete(saving, level, votes)
            except OSError as error:
                errors.append(f"rank 0: {error}")
        if errors:
            if not missing:  # else somebody may still write there; a later start removes it
                remove(saving.part(level), saving.final(level))
            return {"error": "; ".join(errors[:4])}
        return {"committed": saving.attempt}

    def _collect(self, place: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
        end_s = time.monotonic() + self._limits.commit_s
        for rank in range(1, self._board.world_size):
            name = f"{place}/vote/{rank}"
            left_s = max(0.0, end_s - time.monotonic())
            yield rank, self._board.wait(name, timeout_s=left_s)
            self._board.forget(name)

    def _complete(self, saving: Saving, level: Level, votes: dict[int, dict[str, Any]]) -> None:
        part, final = saving.part(level), saving.final(level)
        files: dict[str, int] = {}
        manifests: dict[str, dict[str, int]] = {}
        for vote in votes.values():
            files |= vote["files"]
            manifests[vote["manifest"]] = {
                "size_bytes": vote["size_bytes"],
                "crc32": vote["crc32"],
            }
        write_record(
            part,
            step=saving.step,
            world_size=self._board.world_size,
            files=files,
            attempt=saving.attempt,
            tag=saving.tag,
            manifests=manifests,
            **saving.details,
        )
        publish(part, final)
        if saving.save_latest:
            write_latest(level.folder, saving.tag)

    def _forget_later(self, name: str) -> None:
        # The others read an outcome within moments, but nobody says when they have.
        self._outcomes.append(name)
        if len(self._outcomes) > 16:
            self._board.forget(self._outcomes.pop(0))
