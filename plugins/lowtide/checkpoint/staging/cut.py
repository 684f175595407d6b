"""A plan with its device pieces cut at the bounds of chunks, so that each fits into one slot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.checkpoint.writer.plan import FilePlan
from lowtide.core.device import Device

SMALL_BYTES = 1 << 18  # a link takes no longer for so much than for beginning a copy


@dataclass(frozen=True)
class Transfer:
    """The device pieces of one chunk: those from `first` to before `end`, among all of them."""

    chunk: int
    first: int
    end: int


class Cut:
    """The pieces of a plan; those on a device get their address when they have landed.

    Args:
        plan: The plan, or the beginning of it.
        chunk_bytes: Size of a chunk of the file.
    """

    def __init__(self, plan: FilePlan, chunk_bytes: int) -> None:
        self.plan = plan
        self._chunk_bytes = chunk_bytes
        begin = plan.offsets.astype(np.int64)
        end = begin + plan.lengths.astype(np.int64)
        numbers = np.fromiter(plan.elsewhere, np.int32, len(plan.elsewhere))
        is_staged = np.isin(plan.entries, numbers)
        first = begin // chunk_bytes
        counts = np.where(is_staged, (end - 1) // chunk_bytes - first + 1, 1)
        of = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        cut_begin = np.where(nth == 0, begin[of], (first[of] + nth) * chunk_bytes)
        cut_end = np.where(nth == counts[of] - 1, end[of], (first[of] + nth + 1) * chunk_bytes)
        self._offsets = cut_begin.astype(np.uint64)
        self._lengths = (cut_end - cut_begin).astype(np.uint64)
        self._addresses = plan.addresses[of]  # one that was cut is replaced when it lands
        self._entries = plan.entries[of]
        self._skips = cut_begin - begin[of]
        self._staged = np.flatnonzero(is_staged[of])
        self._chunks = cut_begin[self._staged] // chunk_bytes
        self._inside = self._places(numbers)

    def _places(self, numbers: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return where each device piece belongs in its slot.

        As in its chunk of the file; but small neighbours on one device follow each other without
        what the file has between them, so that they can be copied together.
        """
        begin = self._offsets[self._staged].astype(np.int64) - self._chunks * self._chunk_bytes
        lengths = self._lengths[self._staged].astype(np.int64)
        if not len(begin):
            return begin
        known: dict[Device, int] = {}
        devices = [known.setdefault(w.device, len(known)) for w in self.plan.elsewhere.values()]
        of_entry = np.zeros(int(numbers.max()) + 1, np.int64)
        of_entry[numbers] = devices
        device = of_entry[self._entries[self._staged]]
        is_small = lengths <= SMALL_BYTES
        follows = np.zeros(len(begin), bool)
        follows[1:] = (
            (is_small[1:] & is_small[:-1])
            & (self._chunks[1:] == self._chunks[:-1])
            & (device[1:] == device[:-1])
        )
        first = np.maximum.accumulate(np.where(follows, 0, np.arange(len(begin))))
        before = np.cumsum(lengths) - lengths
        return begin[first] + before - before[first]

    def transfer(self, first: int, *, is_partial: bool) -> Transfer | None:
        """Return what begins at device piece `first`; None if nothing does, or not all is known."""
        if first == len(self._staged):
            return None
        chunk = int(self._chunks[first])
        if is_partial and (chunk + 1) * self._chunk_bytes > self.plan.size_bytes:
            return None
        return Transfer(chunk, first, int(np.searchsorted(self._chunks, chunk, "right")))

    def moves(self, transfer: Transfer) -> Iterator[tuple[Device, torch.Tensor, int]]:
        """Yield the device, its bytes, and where they belong in the slot."""
        of_chunk = slice(transfer.first, transfer.end)
        for piece, at in zip(self._staged[of_chunk], self._inside[of_chunk].tolist(), strict=True):
            where = self.plan.elsewhere[int(self._entries[piece])]
            skip, length = int(self._skips[piece]), int(self._lengths[piece])
            yield where.device, where.memory[skip : skip + length], at

    def land(self, transfer: Transfer, address: int) -> None:
        """Note that a chunk's device pieces are in the slot at `address`."""
        of_chunk = slice(transfer.first, transfer.end)
        inside = self._inside[of_chunk].astype(np.uint64)
        self._addresses[self._staged[of_chunk]] = np.uint64(address) + inside

    def inherit(self, before: Cut, landed: int) -> None:
        """Take over the addresses of what has `landed` of a shorter plan of the same file."""
        pieces = self._staged[:landed]
        self._addresses[pieces] = before._addresses[pieces]

    def is_all(self, landed: int) -> bool:
        """Tell whether that many device pieces are all of them."""
        return landed == len(self._staged)

    def known(self, landed: int) -> int:
        """Return how many pieces there are before the first that has not landed."""
        return len(self._entries) if self.is_all(landed) else int(self._staged[landed])

    def beginning(self, count: int, owners: list[Any]) -> FilePlan:
        """Return the plan of the first `count` pieces, none of which is on a device any more."""
        size = int(self._offsets[count - 1] + self._lengths[count - 1]) if count else 0
        return FilePlan(
            path=self.plan.path,
            size_bytes=size,
            offsets=self._offsets[:count],
            lengths=self._lengths[:count],
            # A copy: the writer in Python keeps the array, and later ones are still written here.
            addresses=self._addresses[:count].copy(),
            entries=self._entries[:count],
            literals=self.plan.literals,
            patches=self.plan.patches,
            owners=owners,
        )
