"""The host memory that copies from a device land in: slots of one chunk each, used in turn."""

from __future__ import annotations

import torch

from lowtide.checkpoint.writer import Ticket
from lowtide.core.device import Device


class Ring:
    """Slots, and who still reads them. Used by one thread at a time.

    Args:
        memory: uint8, a multiple of `chunk_bytes` long.
        chunk_bytes: Size of a slot.
    """

    def __init__(self, memory: torch.Tensor, chunk_bytes: int) -> None:
        self.memory = memory
        self._chunk_bytes = chunk_bytes
        self._free = list(range(memory.numel() // chunk_bytes))[::-1]
        self._held: list[tuple[int, Ticket, int]] = []  # slot, who reads it, its chunk there

    @classmethod
    def pinned(cls, device: Device, limit_bytes: int, chunk_bytes: int) -> Ring:
        """Allocate one of at most `limit_bytes` (but two slots) that `device` copies to fast.

        Raises:
            DeviceError, RuntimeError, MemoryError: the system cannot give the memory.
        """
        size = max(2, limit_bytes // chunk_bytes) * chunk_bytes
        return cls(device.host_empty(size, torch.uint8), chunk_bytes)

    @classmethod
    def plain(cls, chunk_bytes: int) -> Ring:
        """Allocate two slots of ordinary memory, for where there is no pinned memory."""
        return cls(torch.empty(2 * chunk_bytes, dtype=torch.uint8), chunk_bytes)

    def take(self) -> int | None:
        """Take a free slot, or return None while the writer reads all of them."""
        if not self._free:
            self._reclaim()
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Give back a slot that nobody has been told of."""
        self._free.append(slot)

    def hold(self, slot: int, ticket: Ticket, chunk: int) -> None:
        """Keep `slot` until the writer has captured `chunk` of `ticket`'s file from it."""
        self._held.append((slot, ticket, chunk))

    def slot(self, number: int) -> torch.Tensor:
        """Return the memory of a slot."""
        return self.memory[number * self._chunk_bytes : (number + 1) * self._chunk_bytes]

    def address(self, number: int) -> int:
        """Return where a slot begins."""
        return self.memory.data_ptr() + number * self._chunk_bytes

    @property
    def held(self) -> int:
        """Slots that the writer may still read, as far as is known."""
        return len(self._held)

    def _reclaim(self) -> None:
        captured: dict[int, int | None] = {}
        held, self._held = self._held, []
        for slot, ticket, chunk in held:
            if id(ticket) not in captured:
                captured[id(ticket)] = _captured_chunks(ticket)
            count = captured[id(ticket)]
            if count is None or chunk < count:
                self._free.append(slot)
            else:
                self._held.append((slot, ticket, chunk))


def _captured_chunks(ticket: Ticket) -> int | None:
    """Return how many chunks nobody reads any more; None: all, because the job has failed."""
    count = ticket.captured_chunks()
    if ticket.error is not None and ticket.wait_captured(0.0):
        return None
    return count
