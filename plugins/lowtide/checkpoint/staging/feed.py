"""One file some of whose tensors are on a device: what is known, has landed, has been told."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowtide.checkpoint.staging.cut import Cut, Transfer
from lowtide.checkpoint.writer import Ticket
from lowtide.checkpoint.writer.plan import FilePlan
from lowtide.core.device import Device, DeviceEvent
from lowtide.core.errors import CheckpointError

if TYPE_CHECKING:
    from lowtide.checkpoint.staging.stager import Stager


class State(enum.Enum):
    """Who brings a file's device bytes to the writer."""

    LANE = "lane"  # the stager's thread
    CALLER = "caller"  # the training thread, when it waits next: the lane has failed
    OVER = "over"  # nobody: all is told, or given up


class Feed:
    """A file on its way. Made by `Stager.open`.

    `state`, `is_cancelled` and what `put` gives are guarded by the stager's lock. The rest belongs
    to whichever thread moves the file just now.
    """

    def __init__(self, stager: Stager, ticket: Ticket, chunk_bytes: int) -> None:
        self.ticket = ticket
        self.state = State.LANE
        self.is_cancelled = False
        self.error: CheckpointError | None = None  # why it was given up here
        self.path: Path | None = None
        self.total_bytes = 0  # of the file, as far as it is known
        self.events: dict[Device, DeviceEvent] = {}  # the training stream at the save
        self.joined: set[Device] = set()  # whose lanes wait for these events
        self._stager = stager
        self._chunk_bytes = chunk_bytes
        self._given: tuple[FilePlan, bool] | None = None
        self._cut: Cut | None = None
        self._is_partial = True
        self._issued = self._landed = self._told = 0  # device pieces, device pieces, pieces
        self._is_told = False
        self._owners: list[Any] = []  # of the slots that its chunks are in

    # -- the training thread ------------------------------------------------------------------

    def put(self, plan: FilePlan, *, is_partial: bool) -> None:
        """Give the file's plan, or a longer beginning of it."""
        self._stager.put(self, plan, is_partial=is_partial)

    def wait_captured(self, timeout_s: float) -> bool:
        """Wait until nobody reads the file's live memory any more, on no device; see `Ticket`."""
        return self._stager.wait_captured(self, timeout_s)

    # -- any thread ---------------------------------------------------------------------------

    def cancel(self) -> None:
        """Give up; reads no memory, and does not wait for who does."""
        self._stager.cancel(self)

    def wait_over(self, timeout_s: float | None = None) -> bool:
        """Wait until nobody reads device memory for this file any more."""
        return self._stager.wait_over(self, timeout_s)

    # -- for the stager -----------------------------------------------------------------------

    def give(self, plan: FilePlan, *, is_partial: bool) -> None:
        """Keep a plan for `adopt`; under the stager's lock."""
        self._given = (plan, is_partial)
        self.path, self.total_bytes = plan.path, plan.size_bytes

    @property
    def has_news(self) -> bool:
        """Whether `adopt` will find something."""
        return self._given is not None

    def adopt(self) -> None:
        """Take the plan that was given last; under the stager's lock."""
        if self._given is None:
            return
        (plan, self._is_partial), self._given = self._given, None
        cut, before = Cut(plan, self._chunk_bytes), self._cut
        if before is not None:
            cut.inherit(before, self._landed)
        self._cut = cut

    def next_transfer(self) -> Transfer | None:
        """Return the chunk to be copied next, or None if none is known."""
        if self._cut is None:
            return None
        return self._cut.transfer(self._issued, is_partial=self._is_partial)

    def issue(self, transfer: Transfer) -> list[tuple[Device, torch.Tensor, int]]:
        """Note that a chunk is being copied; return what to copy (see `Cut.moves`)."""
        self._issued = transfer.end
        return [] if self._cut is None else list(self._cut.moves(transfer))

    def land(self, transfer: Transfer, address: int, owner: Any) -> None:
        """Note that it has been copied to `address`, in memory that `owner` keeps."""
        if self._cut is not None:
            self._cut.land(transfer, address)
            self._landed = transfer.end
            if not any(owner is each for each in self._owners):
                self._owners.append(owner)

    def rewind(self) -> None:
        """Forget what was issued and has not landed."""
        self._issued = self._landed

    def tell(self) -> None:
        """Tell the writer as much of the file as has landed.

        Raises:
            ValueError, CheckpointError: the writer does not take it.
        """
        cut = self._cut
        if cut is None or self._is_told:
            return
        count = cut.known(self._landed)
        is_all = cut.is_all(self._landed) and not self._is_partial
        if count == self._told and not is_all:
            return
        owners = [cut.plan.owners, *self._owners]
        self.ticket.extend(cut.beginning(count, owners), is_partial=not is_all)
        self._told, self._is_told = count, is_all

    @property
    def is_told(self) -> bool:
        """Whether the writer knows all of the file."""
        return self._is_told

    def end(self) -> None:
        """Let go of all tensors; under the stager's lock."""
        self.state = State.OVER
        self._given = self._cut = None
        self._owners = []
        self.events, self.joined = {}, set()
