"""Two ways for a chunk's device bytes to get into a slot: by a lane, or by the calling thread."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch

from lowtide.checkpoint.staging.cut import Transfer
from lowtide.checkpoint.staging.feed import Feed
from lowtide.checkpoint.staging.ring import Ring
from lowtide.core.device import Device, DeviceEvent, Lane
from lowtide.core.errors import DeviceError

LANE = "checkpoint"


class Mover(ABC):
    """Copies chunks of a file into slots of its ring."""

    ring: Ring | None = None

    @abstractmethod
    def open_ring(self, feed: Feed) -> Ring:
        """Return the ring; allocate it first where it is not there yet.

        Raises:
            DeviceError, RuntimeError, MemoryError: there is no memory.
        """

    @abstractmethod
    def issue(self, feed: Feed, transfer: Transfer, slot: torch.Tensor) -> list[DeviceEvent]:
        """Begin to copy a chunk; it is there when all events that this returns are done.

        Raises:
            DeviceError, RuntimeError: it cannot be copied; no copy into `slot` is under way.
        """


class LaneMover(Mover):
    """Has one lane of each device copy, behind what was queued there before the save.

    Args:
        pinned_bytes: Most that the ring has.
        chunk_bytes: Size of a slot.
    """

    def __init__(self, pinned_bytes: int, chunk_bytes: int) -> None:
        self._pinned_bytes = pinned_bytes
        self._chunk_bytes = chunk_bytes
        self._packing: dict[Device, torch.Tensor | None] = {}

    def open_ring(self, feed: Feed) -> Ring:
        """See `Mover.open_ring`."""
        if self.ring is None:
            device = next(iter(feed.events))
            self.ring = Ring.pinned(device, self._pinned_bytes, self._chunk_bytes)
        return self.ring

    def issue(self, feed: Feed, transfer: Transfer, slot: torch.Tensor) -> list[DeviceEvent]:
        """See `Mover.issue`."""
        last: dict[str, DeviceEvent] = {}  # a lane keeps order, so its last event is enough
        try:
            for device, sources, at in _together(feed.issue(transfer)):
                lane = device.lane(LANE)
                if device not in feed.joined:
                    lane.wait(feed.events[device])
                    feed.joined.add(device)
                for source in self._packed(device, lane, sources):
                    target = slot[at : at + source.numel()]
                    last[lane.name] = lane.copy(target, source, label="checkpoint")
                    at += source.numel()
        except BaseException:
            self.recover(feed)
            raise
        return list(last.values())

    def let_go(self) -> None:
        """Let go of all memory."""
        self.ring = None
        self._packing.clear()

    def _packed(
        self, device: Device, lane: Lane, sources: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Have `sources` put side by side on their device, if there are several and there is room.

        The next ones go to the same place, after this has been copied: a lane keeps order.
        """
        if len(sources) == 1:
            return sources
        if device not in self._packing:
            try:
                fresh = device.empty(self._chunk_bytes, torch.uint8)
            except (DeviceError, RuntimeError):  # then one by one
                self._packing[device] = None
            else:
                lane.wait(device.record_event("packing"))  # it may still be in use on our stream
                self._packing[device] = fresh
        memory = self._packing[device]
        if memory is None:
            return sources
        packed = memory[: sum(source.numel() for source in sources)]
        lane.run(_pack, packed, *sources, label="checkpoint pack")
        return [packed]

    def recover(self, feed: Feed) -> None:
        """Wait until no copy for `feed` is under way, and return failed lanes to service."""
        for device in feed.events:
            with contextlib.suppress(DeviceError, RuntimeError):  # the device may be closed, or ill
                device.lane(LANE).clear()


class CallerMover(Mover):
    """Copies in the calling thread, which blocks meanwhile; the slots are those of the lanes.

    Args:
        lanes: Whose ring is used, if there is one.
        chunk_bytes: Size of a slot.
    """

    def __init__(self, lanes: LaneMover, chunk_bytes: int) -> None:
        self._lanes = lanes
        self._chunk_bytes = chunk_bytes

    def open_ring(self, feed: Feed) -> Ring:  # noqa: ARG002 - as in Mover
        """See `Mover.open_ring`; without pinned memory two slots of ordinary memory do."""
        if self._lanes.ring is not None and (self.ring is None or self.ring.held == 0):
            self.ring = self._lanes.ring
        if self.ring is None:
            self.ring = Ring.plain(self._chunk_bytes)
        return self.ring

    def issue(self, feed: Feed, transfer: Transfer, slot: torch.Tensor) -> list[DeviceEvent]:
        """See `Mover.issue`."""
        with torch.no_grad():
            for _, sources, at in _together(feed.issue(transfer)):
                source = torch.cat(sources) if len(sources) > 1 else sources[0]
                slot[at : at + source.numel()].copy_(source)
        return []


def _together(
    moves: Iterable[tuple[Device, torch.Tensor, int]],
) -> Iterator[tuple[Device, list[torch.Tensor], int]]:
    """Join moves from one device that follow each other in the slot."""
    run: list[torch.Tensor] = []
    of: Device | None = None
    begin = end = 0
    for device, source, at in moves:
        if of is not None and (device is not of or at != end):
            yield of, run, begin
            run = []
        if not run:
            of, begin = device, at
        run.append(source)
        end = at + source.numel()
    if of is not None:
        yield of, run, begin


def _pack(packed: torch.Tensor, *sources: torch.Tensor) -> None:
    with torch.no_grad():
        torch.cat(sources, out=packed)
