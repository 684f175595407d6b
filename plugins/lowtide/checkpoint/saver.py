"""`Saver`: takes states, returns at once, and brings them to storage in the background.

Three threads of a rank have to do with a checkpoint. The training thread lays out its files
(`begin`, `add`, `end`) and later makes sure, before an update, that all bytes have been copied
(`wait_captured`). The commit thread waits for storage and agrees with the other ranks. The drain
thread brings committed checkpoints to the slower levels. Bytes are moved by the writer's own
threads, outside of Python.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.claims import Claims
from lowtide.checkpoint.config import CHUNK_BYTES, CheckpointConfig
from lowtide.checkpoint.drain import Drain
from lowtide.checkpoint.errands import Errands
from lowtide.checkpoint.files.memo import Memo
from lowtide.checkpoint.files.torch_file import Layout
from lowtide.checkpoint.keeping import Keeper
from lowtide.checkpoint.nodes.peers import Peers
from lowtide.checkpoint.nodes.placement import Nodes, find_nodes
from lowtide.checkpoint.pending import Pending
from lowtide.checkpoint.routing import Router
from lowtide.checkpoint.saving import Level, Saving, Stage, levels_of
from lowtide.checkpoint.staging import Stager
from lowtide.checkpoint.store.commit import Committer, Limits, wait_durable
from lowtide.checkpoint.store.folders import make_part_folder, remove
from lowtide.checkpoint.submit import submit, write_file
from lowtide.checkpoint.writer import Writer, open_writer
from lowtide.checkpoint.writer.plan import FileResult
from lowtide.core.errors import CheckpointError

logger = logging.getLogger("lowtide")

_GOODBYE_S = 3.0
_HISTORY = 64  # ended checkpoints that are remembered


class Saver:
    """Saves checkpoints of one engine. All ranks make the same calls in the same order.

    Args:
        config: The plugin's settings.
        board: Where the ranks of this run agree.
        buffer_bytes: Host memory for bytes on their way.
        nodes: Who is on which node; found out where a level needs it. That is collective.
        stager: Brings what is on a GPU; closed with the saver.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        board: Board,
        *,
        buffer_bytes: int,
        nodes: Nodes | None = None,
        stager: Stager | None = None,
    ) -> None:
        self.config = config
        self.board = board
        if nodes is None and any(tier.scope == "node" for tier in config.tiers):
            nodes = find_nodes(board)
        self.router = Router(config, board, levels_of(config, nodes))
        of_node = [level for level in self.router.levels if level.is_of_node]
        self.peers: Peers | None = None
        if nodes is not None and of_node:
            self.peers = Peers(board, nodes, of_node, stall_s=config.stall_timeout_s)
        self.writer: Writer = open_writer(
            buffer_bytes=buffer_bytes,
            chunk_bytes=CHUNK_BYTES,
            io=config.io,
            bytes_per_s=config.tiers[0].bytes_per_s if config.tiers else None,
        )
        # What is written at an allowed rate stands still in between, and behind a full buffer.
        self._pace_s = self.router.levels[0].pace_s if self.router.levels else 0.0
        self._queue_s = self._pace_s * (buffer_bytes // CHUNK_BYTES)
        self.stager = Stager() if stager is None else stager
        self.history: deque[Saving] = deque()
        self.current: Saving | None = None
        self.last_error: CheckpointError | None = None
        self.errands = Errands()
        levels, timeout_s = len(config.tiers), config.max_wait_s
        self.claims = Claims(board, nodes, self.errands, levels=levels, timeout_s=timeout_s)
        limits = Limits(stall_s=config.stall_timeout_s, commit_s=config.commit_timeout_s)
        self._committer = Committer(board, limits, nodes, check=self.claims.check)
        self._drain = Drain(config, self._committer, self.peers)
        self._count = 0
        self._memos: dict[str, Memo] = {}  # of the files of the checkpoint before
        self._keeper = Keeper(config, self._committer, board.token)
        self.pending = Pending(config.max_wait_s)  # not yet captured
        self._to_commit: queue.SimpleQueue[Saving | None] = queue.SimpleQueue()
        self._to_drain: queue.SimpleQueue[Saving | None] = queue.SimpleQueue()
        self._draining: list[Saving] = []  # oldest first
        self._lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._threads = [
            self._start("commit", self._to_commit, self._commit),
            self._start("drain", self._to_drain, self._bring_down),
        ]

    # -- the training thread ------------------------------------------------------------------

    def begin(
        self,
        folder: Path,
        tag: str,
        *,
        step: int,
        details: dict[str, Any],
    ) -> Saving:
        """Begin a checkpoint. Collective.

        Args:
            folder: The folder that the script saves to.
            tag: Name of the checkpoint.
            step: Optimizer steps in it.
            details: ``config`` and ``client_keys`` of its record.

        Raises:
            CheckpointError: another job saves there.
        """
        if self.current is not None:  # the save before this one ended in an exception
            self.abandon(self.current, "save_checkpoint did not return")
        self._count += 1
        attempt = f"{self.board.token}{self._count:08x}"
        levels = self.router.route(folder.absolute(), attempt)
        try:
            self.claims.take(levels, tag)
        except CheckpointError:
            self.router.missed(levels[1:])
            raise
        saving = Saving(levels, tag=tag, attempt=attempt, step=step, details=details)
        self.current = saving
        self.router.costs.begin(levels[0].number)
        return saving

    def add(self, state: Any, name: str, *, is_stable: Callable[[torch.Tensor], bool]) -> None:
        """Add the torch file `name` to the checkpoint that has begun."""
        saving = self.current
        if saving is None:
            raise CheckpointError(f"{name}: no checkpoint has begun; call begin() first")
        path, level = saving.part() / name, saving.levels[0]

        def make_folders() -> None:
            make_part_folder(saving.part(), is_owner=self._committer.leads(level))
            path.parent.mkdir(parents=True, exist_ok=True)

        try:
            self.errands.run(level.folder, make_folders, timeout_s=self.config.max_wait_s)
        except OSError as error:
            saving.give_up(CheckpointError(f"{path.parent}: cannot be made ({error.strerror})"))
        memo = saving.memos[name] = self._memos.get(name, Memo())
        layout = Layout(state, path, is_stable=is_stable, homes=self.stager.homes, memo=memo)
        if saving.error is not None:
            saving.eager_bytes += layout.finish().eager_bytes
            return
        ticket, laid_out, feed = submit(self.writer, layout, self.stager)
        saving.add(name, ticket, laid_out, feed)
        saving.eager_bytes += laid_out.eager_bytes

    def end(self, *, save_latest: bool = True) -> Saving:
        """End the checkpoint that has begun; from here on it is brought to storage."""
        saving, self.current = self.current, None
        if saving is None:
            raise CheckpointError("no checkpoint has begun; call begin() first")
        saving.save_latest = save_latest
        self._memos, saving.memos = saving.memos, {}
        with self._lock:
            self.history.append(saving)
            while len(self.history) > _HISTORY and self.history[0].has_ended:
                self.history.popleft()
        self.pending.add(saving)
        if not self.config.lazy:
            self.wait_captured()
        self._to_commit.put(saving)
        return saving

    def abandon(self, saving: Saving, why: str) -> None:
        """Give up a checkpoint that has begun and was not ended."""
        self.current = None
        self.router.costs.end(saving.levels[0].number)
        self.router.missed(saving.levels[1:])
        saving.fail(CheckpointError(f"checkpoint {saving.tag}: {why}"))
        saving.wait_cancelled()
        with contextlib.suppress(OSError):
            remove(saving.part(), saving.final())

    def save_file(self, state: Any, path: Path) -> None:
        """Write one torch file and return when it is on storage under its name."""
        stall_s = self.config.stall_timeout_s + self._pace_s + self._queue_s
        write_file(self.writer, state, path, stall_s=stall_s)

    def wait_captured(self) -> float:
        """Make sure that no memory of the model is needed any more; called before every update.

        Returns:
            Seconds waited.
        """
        return self.pending.wait()

    # -- everyone -----------------------------------------------------------------------------

    def used_folders(self) -> list[Path]:
        """Return the folders that hold this run's checkpoints."""
        with self._lock:
            used = [level.folder for saving in self.history for level in saving.levels]
        return list(dict.fromkeys([*(level.folder for level in self.router.levels), *used]))

    def is_busy(self) -> bool:
        """Whether a checkpoint is still on its way."""
        with self._lock:
            return any(not saving.has_ended for saving in self.history)

    def wait(self, stage: Stage, timeout_s: float | None = None) -> bool:
        """Wait until every checkpoint has reached `stage` or failed.

        Returns:
            Whether the newest one has reached it.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            waiting = list(self.history)
        self.wait_captured()  # else the next update would have to come first
        is_there = False
        for saving in waiting:
            left_s = None if end_s is None else max(0.0, end_s - time.monotonic())
            is_there = saving.wait(stage, left_s)
        return is_there

    def close(self, timeout_s: float) -> bool:
        """Finish what is on its way, then end all threads. Idempotent.

        Returns:
            Whether everything was finished in time.
        """
        if os.getpid() != self._owner_pid or not self._threads:
            return True
        end_s = time.monotonic() + timeout_s
        if self.current is not None:
            self.abandon(self.current, "the run ended before save_checkpoint returned")
        self.wait(Stage.DRAINED, timeout_s)
        late = [saving for saving in self.history if not saving.has_ended]
        for saving in late:
            saving.fail(
                CheckpointError(
                    f"checkpoint {saving.tag}: not complete within {timeout_s:g} s of the end of "
                    f"the run (lowtide.checkpoint.close_timeout_s)"
                )
            )
        if late:
            self.board.close()
        threads, self._threads = self._threads, []
        self._to_commit.put(None)
        self._to_drain.put(None)
        for thread in threads:  # they are daemons: one that hangs in a system call is left behind
            thread.join(max(1.0, end_s - time.monotonic()) if not late else 1.0)
        if not late:
            self._say_goodbye()
        self._drain.close()
        if self.peers is not None:
            self.peers.close()
        self.claims.close()
        self.stager.close(timeout_s=1.0)
        self.writer.close(timeout_s=1.0)
        return not late

    def _say_goodbye(self) -> None:
        """Let rank 0, whose process may hold the store, stay until the others have heard all."""
        if not self.history or self.board.world_size == 1:
            return
        with contextlib.suppress(CheckpointError):
            if self.board.rank != 0:
                self.board.post(f"closed/{self.board.rank}", [])
                return
            end_s = time.monotonic() + _GOODBYE_S
            for rank in range(1, self.board.world_size):
                left_s = max(0.0, end_s - time.monotonic())
                self.board.wait(f"closed/{rank}", timeout_s=left_s)

    # -- the commit thread and the drain thread -------------------------------------------------

    def _start(
        self,
        name: str,
        waiting: queue.SimpleQueue[Saving | None],
        work: Callable[[Saving], None],
    ) -> threading.Thread:
        def run() -> None:
            while (saving := waiting.get()) is not None:
                try:
                    work(saving)
                except CheckpointError as error:
                    self._failed(saving, error)
                except Exception as error:  # noqa: BLE001 - must not end the thread in silence
                    text = f"checkpoint {saving.tag}: {type(error).__name__}: {error}"
                    self._failed(saving, CheckpointError(text))

        thread = threading.Thread(target=run, name=f"lowtide-checkpoint-{name}", daemon=True)
        thread.start()
        return thread

    def _commit(self, saving: Saving) -> None:
        level = saving.levels[0]
        try:
            self._commit_on(level, saving)
        finally:
            self.router.costs.end(level.number)
        saving.advance(Stage.COMMITTED)
        if len(saving.levels) > 1 or level.copies:
            with self._lock:
                self._draining.append(saving)
            self._to_drain.put(saving)
        else:
            saving.advance(Stage.DRAINED)
        self._prune(level, saving)

    def _commit_on(self, level: Level, saving: Saving) -> None:
        results: list[FileResult] = []
        stall_s = self.config.stall_timeout_s + self._pace_s
        self._keeper.clean(saving.levels, saving.tag)
        try:
            if saving.error is not None:
                raise saving.error
            for part in saving.parts:
                what = f"checkpoint {saving.tag}, {part.name}"
                part.wait_fed()  # training may take its time; from then on the disk's counts
                results += wait_durable(part.ticket, what=what, stall_s=stall_s)
            make_part_folder(saving.part(), is_owner=False)  # a rank may have no file at all
            saving.settle()
            if saving.error is not None:  # it was torn
                raise saving.error
            vote = self._committer.vote(saving, level, results)
            saving.advance(Stage.DURABLE)
        except CheckpointError as error:
            saving.give_up(error)
            vote = {"error": str(saving.error)}
        except OSError as error:
            saving.give_up(CheckpointError(f"checkpoint {saving.tag}: {error}"))
            vote = {"error": str(saving.error)}
        try:
            self._committer.decide(saving, level, vote)
        except CheckpointError:
            self.router.fell_ill(level)
            self._prune(level, saving)  # on a full disk nothing else would ever make room
            raise
        self.router.recovered(level)
        self._keeper.committed(level, saving.tag)

    def _bring_down(self, saving: Saving) -> None:
        try:
            above = saving.levels[0]
            self._replicate(saving, above)
            for level in saving.levels[1:]:
                try:
                    is_there = self._bring(saving, above, level)
                finally:
                    self._prune(level, saving)
                if is_there:
                    self._replicate(saving, level)
                    above = level
            saving.advance(Stage.DRAINED)
        finally:
            with self._lock:
                self._draining.remove(saving)

    def _bring(self, saving: Saving, above: Level, level: Level) -> bool:
        """Bring it down one level; tell whether it is there, or was left out."""
        if not self._drain.agree(saving, level, is_superseded=self._is_superseded(saving, level)):
            return False
        costs, begin_s, took_s = self.router.costs, time.perf_counter(), None
        costs.begin(level.number)
        try:
            self._drain.bring(saving, above, level)
            took_s = time.perf_counter() - begin_s
        finally:
            costs.end(level.number, took_s)
        return True

    def _is_superseded(self, saving: Saving, level: Level) -> bool:
        """Tell whether a newer checkpoint waits to be brought to the same level."""
        with self._lock:
            return any(level in each.levels for each in self._draining if each is not saving)

    def _replicate(self, saving: Saving, level: Level) -> None:
        is_superseded = level.copies > 0 and self._is_superseded(saving, level)
        if level.copies and self._drain.replicate(saving, level, is_superseded=is_superseded):
            self._keeper.replicated(level, saving.tag)
            self._prune(level, saving)

    def _failed(self, saving: Saving, error: CheckpointError) -> None:
        self.last_error = error
        self.router.missed(saving.levels[1:])
        saving.fail(error)
        if self.board.rank == 0:
            logger.warning("%s; training goes on", error)

    def _prune(self, level: Level, saving: Saving) -> None:
        with self._lock:
            in_use = [each.tag for each in self._draining]
        self._keeper.prune(level, saving.tag, in_use)
