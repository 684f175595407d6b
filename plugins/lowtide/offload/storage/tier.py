"""One rank's stored optimizer state: where each piece lives, and the buffers it passes through.

Between two updates a stored piece is in its file, or still in the buffer that it was updated in.
`drain` writes the latter too, so that the memory-mapped tensors of the masters hold everything.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor

from lowtide.offload.storage.layout import Extent
from lowtide.offload.storage.piece import fill, part_of
from lowtide.offload.storage.transfers import Transfers

logger = logging.getLogger("lowtide")


class Tier(Transfers):
    """The stored pieces of one rank, for those who read and replace whole masters."""

    def in_memory_bytes(self) -> int:
        """Return the host memory of state and buffers, without the page cache."""
        stranded = sum(each.nbytes for each in self.pieces if each.path is None)
        buffers = self.layout.buffers * self.layout.buffer_bytes
        return self.layout.kept_bytes + buffers + stranded

    def stored_bytes(self) -> list[int]:
        """Return how much state each path holds."""
        found = [0] * len(self.files)
        for each in self.pieces:
            if each.path is not None:
                found[each.path] += each.nbytes
        return found

    def facts(self) -> dict[str, object]:
        """Return, for reports, the host memory in use, what each path holds, rates and moves.

        Rates are the last ones measured.
        """
        total = sum(self.stored_bytes()) or 1
        paths = [
            {
                "folder": str(file.folder),
                "stored_bytes": nbytes,
                "share": nbytes / total,
                "is_direct": file.is_direct,
                "is_left_out": j in self._left_out,
                **dataclasses.asdict(rate),
            }
            for j, (file, rate, nbytes) in enumerate(
                zip(self.files, self.rates, self.stored_bytes(), strict=True)
            )
        ]
        moves = {"pieces": self.moved_pieces, "bytes": self.moved_bytes}
        return {
            "host_memory_bytes": self.in_memory_bytes(),
            "storage": paths,
            "storage_moves": moves,
        }

    # -- from path to path --------------------------------------------------------------------

    def homes(self) -> list[int | None]:
        """Return the path of each piece; None: it is in memory."""
        return [each.path for each in self.pieces]

    def takes(self) -> list[bool]:
        """Return which paths take more pieces."""
        closed = self._left_out | self._full
        return [j not in closed for j in range(len(self.files))]

    def move(self, goals: Mapping[int, int]) -> None:
        """Let pieces be written to other paths when they are next updated.

        Where that fails they stay where they are.

        Args:
            goals: Path of each piece that is to move.
        """
        with self.changed:
            for number, path in goals.items():
                self.pieces[number].goal = path

    # -- from and to memory -------------------------------------------------------------------

    def take(self, flat: int, sources: Sequence[Tensor | None]) -> None:
        """Replace a master's whole state.

        Args:
            flat: Number of the master.
            sources: Master and moments, float32, flat; None: zeros.

        Raises:
            StorageError: a path hangs.
        """
        with self._draining:
            self._take(flat, sources)

    def _take(self, flat: int, sources: Sequence[Tensor | None]) -> None:
        mine = [n for n, each in enumerate(self.pieces) if each.extent.flat == flat]
        # A source may be one of `tensors`, and the other masters' pieces may be in all buffers.
        self.drain(may_write=True)
        for tensor, source in zip(self.tensors(flat), sources, strict=True):
            for extent in self.layout.extents:
                if extent.flat == flat and not extent.is_stored:
                    fill(part_of(tensor, extent), source, extent)
            # Behind the last vector.
            last = max(e.begin + e.numel for e in self.layout.extents if e.flat == flat)
            fill(tensor[last:], source, Extent(flat, last, tensor.numel() - last, False))
        for number in mine:
            piece = self.pieces[number]
            if piece.path is None:
                for part, source in zip(self.mapped(number), sources, strict=True):
                    fill(part, source, piece.extent)
                continue
            with self.changed:
                self.wait(lambda: bool(self.free))
                buffer = self.held[number] = self.free.pop()
                self.dirty.add(number)
            for part, source in zip(buffer.state(piece.extent.numel), sources, strict=True):
                fill(part, source, piece.extent)
            self.write(number, partial(self.release, number))
        with self.changed:
            self.wait(lambda: not self.dirty)

    def drain(self, numbers: Iterable[int] | None = None, *, may_write: bool) -> None:
        """Bring the newest state of pieces to where readers look.

        Args:
            numbers: Pieces; None: all.
            may_write: Whether the one who asks may write there. Then buffers are given up, and what
                is read next is taken as it is found.

        Raises:
            StorageError: a path hangs, or state had been lost before.
        """
        asked = list(range(len(self.pieces)) if numbers is None else numbers)
        with self._draining:
            with self.changed:
                self.wait(lambda: not self.moving)  # an update may have been broken off
                todo = [n for n in asked if n in self.dirty]
            for number in todo:
                self.write(number, lambda: None)
            with self.changed:
                self.wait(lambda: self.dirty.isdisjoint(todo))
                if may_write:
                    for number in asked:
                        self.pieces[number].crc = None
                        if number in self.held:
                            self.release(number)

    def close(self) -> None:
        """Write what is in buffers, and let files and buffers go. The mapped tensors stay valid."""
        try:
            if self.failure is None:
                self.drain(may_write=True)
                with self.changed:
                    self.wait(lambda: not self._vacating)
            else:
                logger.error("offload: closed after a failure: %s", self.failure)
        finally:
            for lane in self._lanes.values():
                lane.close()
            if self.failure is None and not self._vacating:  # a lane that hangs still uses them
                for each in self.files:
                    each.close()
                self.free.clear()
