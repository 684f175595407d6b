"""Two-phase commit of one checkpoint on one level of storage, off the training's communication.

Phase 1: every rank syncs its files and its manifest, then posts its vote. Phase 2: rank 0 has all
votes, writes the completion record, gives the folder its name, moves ``latest``, and posts the
outcome. Whatever dies in between leaves a hidden folder without a name: no reader takes it for a
checkpoint, except one that already holds its record, and that one is whole.

On a level of which each node has its own, phase 2 is done by each node's leader for the files of
its ranks, and rank 0 answers for all leaders. A failure is taken back by every leader that hears of
it. One that does not (it died) leaves a part whose record says that there are others of the same
attempt: whoever does not find those does not take it for a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.errands import Errands
from lowtide.checkpoint.nodes.placement import Nodes
from lowtide.checkpoint.saving import Level, Saving
from lowtide.checkpoint.store.folders import publish, remove, write_latest
from lowtide.checkpoint.store.manifest import Manifest, write_manifest
from lowtide.checkpoint.writer import Ticket
from lowtide.checkpoint.writer.plan import FileResult
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import read_record, sync_folder, write_record

logger = logging.getLogger("lowtide")

_KEPT_OUTCOMES = 64
_LOOK_S = 0.25  # between two looks at a ticket's progress


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long things may take, in seconds."""

    stall_s: float
    commit_s: float


def wait_durable(ticket: Ticket, *, what: str, stall_s: float) -> list[FileResult]:
    """Wait until a ticket's files are on storage.

    Raises:
        CheckpointError: they cannot be written, or nothing has moved for `stall_s` while this
            waited: before, its turn may not have come.
    """
    begin_s = time.monotonic()
    while not ticket.wait_durable(_LOOK_S):
        if ticket.error is not None:
            break
        idle_s = min(ticket.progress().idle_s, time.monotonic() - begin_s)
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
        nodes: Who is on which node, where there are levels of which each has its own.
        check: Raises where another job has taken the folder over that a checkpoint comes to.
    """

    def __init__(
        self,
        board: Board,
        limits: Limits,
        nodes: Nodes | None = None,
        *,
        check: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._board = board
        self._limits = limits
        self._nodes = nodes
        self._check = check
        self._errands = Errands()
        self._late: list[tuple[Path, Path, list[str]]] = []  # failed, some rank said nothing yet
        self._outcomes: list[str] = []  # posts of rank 0 that nobody needs any more, soon

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._board.rank

    def leads(self, level: Level) -> bool:
        """Tell whether this rank does for `level` what is done once for its folder."""
        if level.is_of_node and self._nodes is not None:
            return self._nodes.is_leader
        return self._board.rank == 0

    def agree(self, saving: Saving, level: Level, *, go: bool, what: str = "go") -> bool:
        """Return rank 0's `go` on every rank: whether `saving` is brought to `level`."""
        name = f"{saving.attempt}/{level.number}/{what}"
        timeout_s = self._limits.commit_s
        is_going: bool = self._board.share(name, lambda: go, timeout_s=timeout_s)
        if self._board.rank == 0:
            self._forget_later(name)
        return is_going

    def report_copies(self, saving: Saving, level: Level, error: str | None) -> str | None:
        """Tell rank 0 whether this rank's files have their copies; return what it heard of all."""
        place = f"{saving.attempt}/{level.number}/copied"
        timeout_s = 2 * self._limits.commit_s + self._limits.stall_s
        if self._board.rank != 0:
            self._board.post(f"{place}/{self._board.rank}", {"error": error})
            answer: str | None = self._board.share(place, str, timeout_s=timeout_s)
            return answer
        errors = [] if error is None else [f"rank 0: {error}"]
        for rank, told in self._collect(place, range(1, self._board.world_size)):
            text = "said nothing" if told is None else told["error"]
            errors += [] if text is None else [f"rank {rank}: {text}"]
        answer = "; ".join(errors[:4]) if errors else None
        self._board.share(place, lambda: answer)
        self._forget_later(place)
        return answer

    def vote(self, saving: Saving, level: Level, results: list[FileResult]) -> dict[str, Any]:
        """Write this rank's manifest and return its vote."""
        part = saving.part(level)
        rank = self._board.rank
        for folder in {folder for result in results for folder in result.path.parents}:
            if part in folder.parents:  # the names in `part` itself are synced with the manifest
                sync_folder(folder)
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
        # Rank 0 may wait for a slower rank for as long as that may take.
        nodes = self._nodes if level.is_of_node else None
        timeout_s = (2 if nodes is None else 3) * self._limits.commit_s + self._limits.stall_s
        if self._board.rank == 0:
            outcome = self._conclude(saving, level, dict(vote), place)
            self._board.post(f"{place}/outcome", outcome)
            self._forget_later(f"{place}/outcome")
        else:
            self._board.post(f"{place}/vote/{self._board.rank}", vote)
            if nodes is not None and nodes.is_leader:
                self._follow(saving, level, place, timeout_s)
            outcome = self._board.wait(f"{place}/outcome", timeout_s=timeout_s)
        if nodes is not None and nodes.is_leader and outcome is not None:
            self._end_on_node(saving, level, outcome, nodes)
        if outcome is None:
            outcome = {"error": f"rank 0 did not say whether it is complete within {timeout_s} s"}
        if "error" in outcome:
            raise CheckpointError(f"checkpoint {saving.tag} in {level.folder}: {outcome['error']}")

    def _conclude(
        self, saving: Saving, level: Level, own: dict[str, Any], place: str
    ) -> dict[str, Any]:
        self._remove_late()
        votes = {0: own}
        missing: list[int] = []
        for rank, vote in self._collect(f"{place}/vote", range(1, self._board.world_size)):
            if vote is None:
                missing.append(rank)
            else:
                votes[rank] = vote
        errors = [f"rank {rank}: {v['error']}" for rank, v in votes.items() if "error" in v]
        if missing:
            ranks = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            errors.append(f"no word from rank {ranks} within {self._limits.commit_s:g} s")
        if level.is_of_node and self._nodes is not None and not errors:
            errors = self._lead(saving, level, votes, place, self._nodes)
        elif not errors:
            try:
                self._complete(saving, level, votes.values())
                self._move_latest(saving, level)
            except OSError as error:
                errors.append(f"rank 0: {error}")
        if errors:
            part, final = saving.part(level), saving.final(level)
            if missing and not level.is_of_node:  # they may still write there
                names = [f"{place}/vote/{rank}" for rank in missing]
                self._late.append((part, final, names))
            elif not level.is_of_node:
                with contextlib.suppress(OSError):  # where it hangs, the others hear of it
                    work = functools.partial(remove, part, final)
                    self._errands.run(part, work, timeout_s=self._limits.stall_s)
            return {"error": "; ".join(errors[:4]), "missing": missing}
        return {"committed": saving.attempt}

    def _lead(
        self,
        saving: Saving,
        level: Level,
        votes: Mapping[int, dict[str, Any]],
        place: str,
        nodes: Nodes,
    ) -> list[str]:
        """Have all leaders complete their nodes' folders; return what went wrong."""
        leaders = [ranks[0] for ranks in nodes.ranks if ranks[0] != self._board.rank]
        for ranks in nodes.ranks:
            self._board.post(f"{place}/node/{ranks[0]}", [votes[rank] for rank in ranks])
        done = self._complete_on_node(saving, level, [votes[rank] for rank in nodes.mine])
        errors = [f"rank 0: {done['error']}"] if "error" in done else []
        for rank, told in self._collect(f"{place}/done", leaders):
            if told is None:
                errors.append(
                    f"no word from rank {rank}, the leader of its node, within "
                    f"{self._limits.commit_s:g} s"
                )
            elif "error" in told:
                errors.append(f"rank {rank}: {told['error']}")
        for ranks in nodes.ranks:
            self._board.forget(f"{place}/node/{ranks[0]}")
        return errors

    def _follow(self, saving: Saving, level: Level, place: str, timeout_s: float) -> None:
        """Complete this node's folder once rank 0 says that all ranks' files are there."""
        votes = self._board.wait(
            f"{place}/node/{self._board.rank}",
            timeout_s=timeout_s,
            until=lambda: self._board.look(f"{place}/outcome") is not None,
        )
        if votes is not None:
            done = self._complete_on_node(saving, level, votes)
            self._board.post(f"{place}/done/{self._board.rank}", done)

    def _complete_on_node(
        self, saving: Saving, level: Level, votes: Iterable[Mapping[str, Any]]
    ) -> dict[str, Any]:
        try:
            self._complete(saving, level, votes)
        except FileNotFoundError as error:
            return {"error": f'{error}; if all nodes see that folder, set "scope" to "shared"'}
        except OSError as error:
            return {"error": str(error)}
        return {}

    def _end_on_node(
        self, saving: Saving, level: Level, outcome: Mapping[str, Any], nodes: Nodes
    ) -> None:
        """Move this node's ``latest``, or take back what was done here."""
        part, final = saving.part(level), saving.final(level)
        if "error" not in outcome:
            self._move_latest(saving, level)
            return
        record = read_record(final)
        if record is not None and record.get("attempt") == saving.attempt:
            remove(final, final)
        if not set(outcome.get("missing", [])) & set(nodes.mine):
            remove(part, final)

    def _move_latest(self, saving: Saving, level: Level) -> None:
        if not saving.save_latest:
            return
        try:
            write_latest(level.folder, saving.tag)
        except OSError as error:  # it is complete all the same, and will be found
            logger.warning("%s: latest cannot be moved: %s", level.folder, error)

    def _collect(
        self, place: str, ranks: Iterable[int]
    ) -> Iterator[tuple[int, dict[str, Any] | None]]:
        end_s = time.monotonic() + self._limits.commit_s
        for rank in ranks:
            name = f"{place}/{rank}"
            left_s = max(0.0, end_s - time.monotonic())
            told = self._board.wait(name, timeout_s=left_s)
            yield rank, told
            if told is not None:
                self._board.forget(name)

    def _remove_late(self) -> None:
        """Remove failed checkpoints whose last ranks have come at last; a later start the others.

        Else a disk that is always too slow would fill up with them.
        """
        late, self._late = self._late, []
        for part, final, names in late:
            if any(self._board.look(name) is None for name in names):
                self._late.append((part, final, names))
                continue
            for name in names:
                self._board.forget(name)
            remove(part, final)

    def _complete(self, saving: Saving, level: Level, votes: Iterable[Mapping[str, Any]]) -> None:
        part, final = saving.part(level), saving.final(level)
        self._check(final.parent)
        files: dict[str, int] = {}
        manifests: dict[str, dict[str, int]] = {}
        for vote in votes:
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
            node=self._node_of(level),
            **saving.details,
        )
        publish(part, final)

    def _node_of(self, level: Level) -> tuple[int, int] | None:
        if self._nodes is None or not level.is_of_node:
            return None
        return self._nodes.number, len(self._nodes.ranks)

    def _forget_later(self, name: str) -> None:
        # The others read an outcome within moments, but nobody says when they have.
        self._outcomes.append(name)
        if len(self._outcomes) > _KEPT_OUTCOMES:
            self._board.forget(self._outcomes.pop(0))
