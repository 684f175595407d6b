"""One checkpoint on its way: what it consists of, how far it has come, what went wrong."""

from __future__ import annotations

import enum
import functools
import operator
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.compact.copies import CompactConfig
from lowtide.checkpoint.config import CHUNK_BYTES, NODE, CheckpointConfig, TierConfig
from lowtide.checkpoint.files.memo import Memo, versions
from lowtide.checkpoint.files.torch_file import TorchFile
from lowtide.checkpoint.nodes.placement import Nodes
from lowtide.checkpoint.staging.feed import Feed
from lowtide.checkpoint.store.folders import part_folder
from lowtide.checkpoint.writer import Ticket
from lowtide.core.errors import CheckpointError
from lowtide.core.state import Memory, outside


class Stage(str, enum.Enum):
    """How far a checkpoint has come. Each stage includes those before it."""

    REQUESTED = "requested"  # save_checkpoint has returned; the bytes are still where they were
    CAPTURED = "captured"  # this rank's bytes are in host memory or on storage: training may go on
    DURABLE = "durable"  # this rank's files are on the first level, synced
    COMMITTED = "committed"  # all ranks' are, and the checkpoint bears its name and record
    DRAINED = "drained"  # it is committed on every level it was meant for
    FAILED = "failed"


CANCEL_S = 5.0
_ORDER = [Stage.REQUESTED, Stage.CAPTURED, Stage.DURABLE, Stage.COMMITTED, Stage.DRAINED]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of storage for one checkpoint.

    Attributes:
        number: Position in ``tiers``; 0 for a folder that is not a tier.
        folder: The folder that holds checkpoints.
        keep: How many to keep there, or None.
        bytes_per_s: Highest rate of this rank, or None.
        is_of_node: Whether each node has a folder of its own there.
        copies: How many other nodes keep this node's files too.
        compact: How checkpoints are made small there, or None.
    """

    number: int
    folder: Path
    keep: int | None = None
    bytes_per_s: float | None = None
    is_of_node: bool = False
    copies: int = 0
    compact: CompactConfig | None = None

    @property
    def pace_s(self) -> float:
        """How long the rate alone may keep anything from moving: one chunk."""
        return 0.0 if self.bytes_per_s is None else CHUNK_BYTES / self.bytes_per_s

    @classmethod
    def of_tier(cls, number: int, tier: TierConfig, keep: int | None, *, node: int = 0) -> Level:
        """Return the level that a ``tiers`` entry describes, on the node of number `node`."""
        return cls(
            number=number,
            folder=Path(tier.path.replace(NODE, str(node))).absolute(),
            keep=tier.keep if tier.keep is not None else keep,
            bytes_per_s=tier.bytes_per_s,
            is_of_node=tier.scope == "node",
            copies=tier.copies,
            compact=tier.compact,
        )


def levels_of(config: CheckpointConfig, nodes: Nodes | None) -> list[Level]:
    """Return the levels in ``tiers`` as they are on this rank's node."""
    node, is_alone = (0, True) if nodes is None else (nodes.number, len(nodes.ranks) == 1)
    levels = [
        Level.of_tier(number, tier, config.keep, node=node)
        for number, tier in enumerate(config.tiers)
    ]
    return [replace(level, copies=0) if is_alone else level for level in levels]


@dataclass
class _Part:
    name: str
    ticket: Ticket
    watched: list[torch.Tensor]  # read later
    versions: list[int]  # of these, at the request
    feed: Feed | None  # brings what is on a device, if anything is
    memory: Memory  # of the host, that is read later

    @property
    def total_bytes(self) -> int:
        """Size of the file; the ticket does not know yet what has not come from a device."""
        known = 0 if self.feed is None else self.feed.total_bytes
        return max(known, self.ticket.progress().total_bytes)

    def wait_captured(self, timeout_s: float) -> bool:
        """See `Ticket.wait_captured`."""
        waiting: Feed | Ticket = self.ticket if self.feed is None else self.feed
        return waiting.wait_captured(timeout_s)

    def wait_fed(self) -> None:
        """Wait until nobody reads device memory for it any more.

        Raises:
            CheckpointError: device memory cannot be copied.
        """
        if self.feed is not None:
            self.feed.wait_over()
            if self.feed.error is not None:
                raise self.feed.error

    def cancel(self) -> None:
        """See `Ticket.cancel`."""
        self.ticket.cancel()
        if self.feed is not None:
            self.feed.cancel()


class Saving:
    """One checkpoint of this rank. Made by `Saver.begin`.

    Args:
        levels: Where it goes, first level first.
        tag: Its name.
        attempt: 16 hexadecimal digits, the same on all ranks and never used twice.
        step: Optimizer steps in it.
        details: Further arguments of its record.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        tag: str,
        attempt: str,
        step: int,
        details: dict[str, Any],
    ) -> None:
        self.levels = list(levels)
        self.tag = tag
        self.attempt = attempt
        self.step = step
        self.details = details
        self.save_latest = True
        self.memos: dict[str, Memo] = {}  # of its files by name, while they are laid out
        self.parts: list[_Part] = []
        self.error: CheckpointError | None = None
        self.blocked_s = 0.0
        self.eager_bytes = 0
        self.update_waits_s: list[float] = []  # of each update that came before all was captured
        self.times_s: dict[Stage, float] = {Stage.REQUESTED: time.perf_counter()}
        self.superseded: list[str] = []  # levels that a newer checkpoint went to instead
        self.is_replicated: bool | None = None  # whether every rank's files have their copies
        self.replica_error: str | None = None
        self._stage = Stage.REQUESTED
        self._changed = threading.Condition()
        self._settling = threading.Lock()
        self._is_updating = False  # then promised memory changes, behind `release`
        self._limit_s = self._left_s = 0.0  # that the update may wait, and may still wait

    @property
    def stage(self) -> Stage:
        """How far it has come."""
        return self._stage

    @property
    def has_ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self._stage in (Stage.DRAINED, Stage.FAILED) or (
            self._stage is Stage.COMMITTED and self.error is not None
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of this rank's files."""
        return sum(part.total_bytes for part in self.parts)

    def final(self, level: Level | None = None) -> Path:
        """Return the folder it has once it is complete."""
        return (level or self.levels[0]).folder / self.tag

    def part(self, level: Level | None = None) -> Path:
        """Return the folder it is written in."""
        return part_folder(self.final(level), self.attempt)

    def add(self, name: str, ticket: Ticket, laid_out: TorchFile, feed: Feed | None = None) -> None:
        """Add a file that is being written."""
        watched, known = list(laid_out.lazy), list(laid_out.versions)
        self.parts.append(_Part(name, ticket, watched, known, feed, laid_out.live_memory()))

    def advance(self, stage: Stage) -> None:
        """Note that it has reached `stage`; a failed one stays failed."""
        with self._changed:
            if self.has_ended or _ORDER.index(stage) <= _ORDER.index(self._stage):
                return
            self._stage = stage
            self.times_s[stage] = time.perf_counter()
            self._changed.notify_all()

    def give_up(self, error: CheckpointError) -> None:
        """Stop writing it; the first reason counts. It has failed once the other ranks know."""
        with self._changed:
            self.error = self.error or error
        for part in self.parts:
            part.cancel()

    def fail(self, error: CheckpointError) -> None:
        """End it. What is committed stays so on its first level."""
        self.give_up(error)
        with self._changed:
            if self._stage not in (Stage.COMMITTED, Stage.DRAINED, Stage.FAILED):
                self._stage = Stage.FAILED
                self.times_s[Stage.FAILED] = time.perf_counter()
            self._changed.notify_all()

    def wait(self, stage: Stage, timeout_s: float | None = None) -> bool:
        """Wait until it has reached `stage` or has failed; tell whether it has reached it."""

        def is_there() -> bool:
            is_failed = self._stage is Stage.FAILED
            return not is_failed and _ORDER.index(self._stage) >= _ORDER.index(stage)

        with self._changed:
            self._changed.wait_for(lambda: self.has_ended or is_there(), timeout_s)
            return is_there()

    def wait_captured(self, timeout_s: float) -> None:
        """Wait until none of the live memory is needed any more; the checkpoint may fail of it.

        Called before an update, which may go on afterwards in every case.
        """
        self._begin_wait(timeout_s)
        for part in self.parts:
            if not self._has_released(part, part.wait_captured):
                break
        self._end_wait()
        self.settle()

    def begin_update(self, promised: Memory, timeout_s: float) -> None:
        """Wait until none of the live memory but the promised is needed any more.

        From here on that memory changes too, but only behind `release`. What is on a device, nobody
        promises for.
        """
        self._begin_wait(timeout_s)
        self.settle(is_updating=True)
        for part in self.parts:
            loose = outside(part.memory, promised)
            wait = functools.partial(part.ticket.wait_released, loose)
            if not self._has_released(part, wait if part.feed is None else part.wait_captured):
                break
        self._end_wait()

    def is_released(self, memory: Memory) -> bool:
        """Tell whether this memory, which was promised, is not needed any more."""
        return self.error is not None or all(
            part.feed is not None or part.ticket.wait_released(memory, 0.0) for part in self.parts
        )

    def release(self, memory: Memory) -> None:
        """Wait until this memory is not needed any more; the checkpoint may fail of it."""
        for part in self.parts:
            wait = functools.partial(part.ticket.wait_released, memory)
            if part.feed is None and not self._has_released(part, wait):
                break
        self._end_wait()

    def hurry(self, memory: Memory) -> None:
        """Have this memory copied before the rest."""
        for part in self.parts:
            part.ticket.hurry(memory)

    def end_update(self) -> None:
        """Note that an update was not applied, so that nothing has changed."""
        with self._settling:
            for part in self.parts:
                part.versions = versions(part.watched)
            self._is_updating = False

    def add_wait(self, waited_s: float) -> None:
        """Count time that the training has waited for the copy."""
        self.blocked_s += waited_s
        if self.update_waits_s:
            self.update_waits_s[-1] += waited_s

    def _begin_wait(self, timeout_s: float) -> None:
        if not self._is_updating:  # else it is the end of an update that has its limit already
            self._limit_s = self._left_s = timeout_s
            self.update_waits_s.append(0.0)

    def _has_released(self, part: _Part, wait: Callable[[float], bool]) -> bool:
        """Wait for `part` in the time that is left; if that is too little, give it all up."""
        begin_s = time.monotonic()
        is_over = wait(max(0.0, self._left_s))
        self._left_s -= time.monotonic() - begin_s
        if part.feed is not None and part.feed.error is not None:
            self.give_up(part.feed.error)
        elif not is_over:
            self.give_up(
                CheckpointError(
                    f"checkpoint {self.tag}: {part.name} was not copied within {self._limit_s:g} "
                    f"s, so the update goes on without it; storage is too slow for "
                    f"lowtide.checkpoint.host_buffer_bytes: raise it, save less often, or "
                    f"raise max_wait_s"
                )
            )
        return self.error is None

    def _end_wait(self) -> None:
        if self.error is not None:
            # What is being copied just now. A write that hangs in the kernel may go on: its pages
            # stay, and nobody will look at what it wrote.
            self.wait_cancelled()

    def wait_cancelled(self) -> None:
        """Wait for what is being copied just now, after it was given up."""
        end_s = time.monotonic() + CANCEL_S
        for part in self.parts:
            part.wait_captured(max(0.0, end_s - time.monotonic()))

    def settle(self, *, is_updating: bool = False) -> None:
        """Note that everything is captured, if it is, and make sure that nothing is torn.

        Every update waits for `wait_captured`, so whoever comes here first comes before the update;
        or it says `is_updating`, and this looks for the last time: from then on an update changes
        memory that has been captured.
        """
        with self._settling:
            if is_updating and not self._is_updating and self.error is None:
                self._check_versions()
                self._is_updating = True
            if self.error is not None:
                for part in self.parts:  # or the model's tensors would live as long as its history
                    part.watched = []
            if self._stage is not Stage.REQUESTED or self.error is not None:
                return
            if all(part.ticket.is_captured for part in self.parts):
                if not self._is_updating:
                    self._check_versions()
                for part in self.parts:
                    part.watched = []
                if self.error is None:
                    self.advance(Stage.CAPTURED)

    def _check_versions(self) -> None:
        for part in self.parts:
            changed = sum(map(operator.ne, versions(part.watched), part.versions))
            if changed:
                self.give_up(
                    CheckpointError(
                        f"checkpoint {self.tag}: {changed} tensors of {part.name} were changed "
                        f"between save_checkpoint and the update, so the copy may be torn and is "
                        f"not used; set lowtide.checkpoint.lazy to false, or change them after "
                        f'engine.lowtide.checkpoint.wait("captured")'
                    )
                )

    def describe(self) -> dict[str, Any]:
        """Return what is known about it as plain JSON."""
        begin_s = self.times_s[Stage.REQUESTED]
        progress = [part.ticket.progress() for part in self.parts]
        return {
            "tag": self.tag,
            "step": self.step,
            "stage": self.stage.value,
            "path": str(self.final()),
            "levels": [str(level.folder) for level in self.levels],
            "bytes": self.total_bytes,
            "captured_bytes": sum(each.captured_bytes for each in progress),
            "written_bytes": sum(each.written_bytes for each in progress),
            "direct_bytes": sum(each.direct_bytes for each in progress),
            "staged_bytes": sum(each.staged_bytes for each in progress),
            "hurried_bytes": sum(each.hurried_bytes for each in progress),
            "update_waits_s": list(self.update_waits_s),
            "blocked_s": self.blocked_s,
            "after_s": {stage.value: at_s - begin_s for stage, at_s in self.times_s.items()},
            "superseded": self.superseded,
            "is_replicated": self.is_replicated,
            "replica_error": self.replica_error,
            "error": None if self.error is None else str(self.error),
        }
