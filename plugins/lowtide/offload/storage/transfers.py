"""A rank's stored pieces on their ways between files, staging buffers and memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from lowtide.core.errors import StorageError
from lowtide.offload.rates import PathRates
from lowtide.offload.storage.files import ScratchFile
from lowtide.offload.storage.lanes import POLL_S, StorageLane, run_watched
from lowtide.offload.storage.layout import Layout, assign
from lowtide.offload.storage.mapping import Range
from lowtide.offload.storage.piece import Buffer, Piece, State

logger = logging.getLogger("lowtide")

Noted = Callable[[int, str, int, float, float], None]  # piece, lane, bytes, begin_s, end_s

_ATTEMPTS = 2  # of a read: what went wrong on the way, and not on the medium, goes right then


class Transfers:
    """Where each piece is, and the lanes that move it.

    Args:
        files: One per path.
        layout: What is stored.
        rates: Of each path; they decide how many pieces it gets at first.
        numels: Elements of each master.
        stall_s: A transfer that gets no further for so long is given up.
        first: Which path comes first; ranks of one node differ.

    Raises:
        StorageError: a path has too little room, or hangs.
    """

    def __init__(
        self,
        files: Sequence[ScratchFile],
        layout: Layout,
        rates: Sequence[PathRates],
        numels: Sequence[int],
        *,
        stall_s: float,
        first: int = 0,
    ) -> None:
        self.files, self.layout, self.rates = list(files), layout, list(rates)
        self.changed = threading.Condition()
        self.failure: StorageError | None = None
        self.dirty: set[int] = set()  # buffers that are newer than the file
        self.held: dict[int, Buffer] = {}  # pieces that are in a buffer, whole
        self.moving: set[int] = set()  # pieces that a lane has, or will have
        self.free = [Buffer(layout.buffer_bytes) for _ in range(layout.buffers)]
        self.noted: Noted = ignored
        self._stall_s = stall_s
        self._left_out: set[int] = set()  # paths that refused a write
        self._full: set[int] = set()  # paths that had no room when they were last asked
        self._vacating = 0  # places that pieces have left, and that are about to be given up
        self.moved_pieces = self.moved_bytes = 0  # from path to path, so far
        self._draining = threading.RLock()  # readers may be in several threads
        self._is_overfull = False  # a piece had to stay in memory
        self._lanes = {
            (kind, j): StorageLane(f"{kind}{j}", j)
            for j in range(len(files))
            for kind in ("read", "write")
        }
        chosen = assign(len(layout.stored), rates, first=first)
        self.pieces = [Piece(e, j) for e, j in zip(layout.stored, chosen, strict=True)]
        flats = sorted({each.extent.flat for each in self.pieces})
        self.ranges = {flat: tuple(Range(numels[flat]) for _ in range(3)) for flat in flats}
        for path, file in enumerate(self.files):
            mine = [n for n, each in enumerate(self.pieces) if each.path == path]
            reserve = partial(_reserve, file, [self.pieces[n].nbytes for n in mine])
            offsets = run_watched(str(file.folder), reserve, stall_s=stall_s)
            for number, offset in zip(mine, offsets, strict=True):
                self._settle(number, path, offset)

    def tensors(self, flat: int) -> State:
        """Return the mapped master and moments of a master that is stored, at least in part."""
        master, exp_avg, exp_avg_sq = (each.tensor for each in self.ranges[flat])
        return master, exp_avg, exp_avg_sq

    def mapped(self, number: int) -> State:
        """Return a piece's part of `tensors`; only after `drain` it is sure to be the newest."""
        extent = self.pieces[number].extent
        parts = (t.narrow(0, extent.begin, extent.numel) for t in self.tensors(extent.flat))
        master, exp_avg, exp_avg_sq = parts
        return master, exp_avg, exp_avg_sq

    def newest(self, number: int) -> State:
        """Return a piece's newest state, wherever it is."""
        held = self.held.get(number)
        numel = self.pieces[number].extent.numel
        return self.mapped(number) if held is None else held.state(numel)

    def release(self, number: int) -> None:
        """Free a piece's buffer. With the lock held."""
        self.dirty.discard(number)
        self.free.append(self.held.pop(number))

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Wait, with the lock held, until something is so.

        Raises:
            StorageError: a transfer has failed, or gets no further.
        """
        while not is_over():
            self._check()
            self.changed.wait(POLL_S)
            for lane in self._lanes.values():
                if lane.error is not None:
                    raise StorageError(
                        f"offload.storage: lane {lane.name} has ended ({lane.error!r}); report "
                        f"this, and start again from the last checkpoint"
                    ) from lane.error
                if lane.stalled_s() > self._stall_s:
                    self.failure = self.failure or StorageError(
                        f"offload.storage: {str(self.files[lane.path].folder)!r}: a "
                        f"{lane.name.rstrip('0123456789')} has got no further for "
                        f"{self._stall_s:g} s; take the path out of lowtide.offload.storage.paths "
                        f"or raise stall_s, and start again from the last checkpoint"
                    )
        self._check()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    # -- transfers ----------------------------------------------------------------------------

    def read(self, number: int, then: Callable[[], None]) -> None:
        """Fill a free buffer with a piece. With the lock held, and so is `then` called."""
        piece, buffer = self.pieces[number], self.free.pop()
        if piece.path is None:
            raise AssertionError("unreachable: what is in memory is not read")
        lane, path = self._lanes["read", piece.path], piece.path
        self.moving.add(number)

        def action(progress: Callable[[], None]) -> None:
            begin_s = perf_counter()
            problem = self._try_read(piece, path, buffer, progress)
            with self.changed:
                self.noted(number, lane.name, piece.nbytes, begin_s, perf_counter())
                self.moving.discard(number)
                if problem is None:
                    self.held[number] = buffer
                    then()
                else:
                    self.failure = self.failure or StorageError(
                        f"offload.storage: subgroup {number}, elements {piece.extent.begin} to "
                        f"{piece.extent.begin + piece.extent.numel} of master {piece.extent.flat}, "
                        f"cannot be read back from byte {piece.offset} of the scratch file in "
                        f"{str(self.files[path].folder)!r}: {problem}; nothing was updated with "
                        f"it; take the path out of lowtide.offload.storage.paths, and start again "
                        f"from the last checkpoint"
                    )
                self.changed.notify_all()

        lane.submit(action)

    def _try_read(
        self, piece: Piece, path: int, buffer: Buffer, progress: Callable[[], None]
    ) -> str | None:
        """Read a piece and check it; return what is wrong with it."""
        problem = None
        if not self.files[path].is_direct:
            self._let_go(piece)
        for _ in range(_ATTEMPTS):
            try:
                crc = self.files[path].read(buffer.memory[: piece.nbytes], piece.offset, progress)
            except OSError as error:
                problem = str(error)
                continue
            if piece.crc in (None, crc):
                return None
            problem = f"its CRC-32 is {crc:08x}, and {piece.crc:08x} was written"
        return problem

    def write(self, number: int, then: Callable[[], None], *, may_move: bool = False) -> None:
        """Write a held piece to its path, or to another one; `then` is called with the lock.

        Args:
            number: The piece.
            then: Called when it is there.
            may_move: Whether it goes to its goal, should it have one: nobody reads it by its map.
        """
        with self.changed:
            self.moving.add(number)
            piece, goal = self.pieces[number], None
            if may_move:
                piece.goal, goal = None, piece.goal
        self._send(number, then, set(), goal)

    def _send(
        self, number: int, then: Callable[[], None], refused: set[int], goal: int | None = None
    ) -> None:
        """Queue a write: to a goal, else home, else to the fastest other path, else to memory.

        Args:
            number: A held piece.
            then: As for `write`.
            refused: Paths that have not taken it.
            goal: The path that should have it; None: its own.
        """
        home, refused = self.pieces[number].path, refused | self._left_out
        paths = sorted(
            {*range(len(self.files))} - refused,
            key=lambda j: (j != goal, j != home, self.rates[j].turn_s, j),
        )
        if not paths:
            self._keep(number, then)
            return
        action = partial(self._write_now, number, paths[0], then, refused)
        self._lanes["write", paths[0]].submit(action)

    def _write_now(
        self,
        number: int,
        path: int,
        then: Callable[[], None],
        refused: set[int],
        progress: Callable[[], None],
    ) -> None:
        piece, begin_s, file = self.pieces[number], perf_counter(), self.files[path]
        data, is_at_home = self.held[number].memory[: piece.nbytes], path == piece.path
        left = None if is_at_home or piece.path is None else (piece.path, piece.offset)
        try:
            offset = piece.offset if is_at_home else file.reserve(piece.nbytes)
        except StorageError:  # full, which is no reason to give up what it holds
            with self.changed:
                self._full.add(path)
            self._send(number, then, refused | {path})
            return
        try:
            if is_at_home and not file.is_direct:
                self._let_go(piece)
            piece.crc = file.write(data, offset, progress)
            if not is_at_home or piece.is_torn:
                self._settle(number, path, offset)
        except (OSError, StorageError) as error:
            self._leave_out(path, error)
            self._send(number, then, refused | {path})
            return
        if left is not None:
            self._vacate(*left, piece.nbytes)
        self._written(number, f"write{path}", begin_s, then)

    def _vacate(self, path: int, offset: int, nbytes: int) -> None:
        """Give up the place that a piece has left; nothing maps it any more."""
        with self.changed:
            self.moved_pieces, self.moved_bytes = self.moved_pieces + 1, self.moved_bytes + nbytes
            if path in self._left_out:  # not to be touched again
                return
            self._vacating += 1

        def action(_progress: Callable[[], None]) -> None:
            self.files[path].vacate(offset, nbytes)
            with self.changed:
                self._full.discard(path)
                self._vacating -= 1
                self.changed.notify_all()

        self._lanes["write", path].submit(action)  # its own: it may hang

    def _written(self, number: int, lane: str, begin_s: float, then: Callable[[], None]) -> None:
        with self.changed:
            self.noted(number, lane, self.pieces[number].nbytes, begin_s, perf_counter())
            self.dirty.discard(number)
            self.moving.discard(number)
            then()
            self.changed.notify_all()

    def _leave_out(self, path: int, error: Exception) -> None:
        with self.changed:
            is_known = path in self._left_out
            self._left_out.add(path)
        if not is_known:
            logger.warning(
                "offload: %s takes no more optimizer state (%s); nothing is lost, and what was to "
                "be written there goes elsewhere from now on", self.files[path].folder, error,
            )  # fmt: skip

    def _keep(self, number: int, then: Callable[[], None]) -> None:
        """Let a piece that no path takes live in memory."""
        piece, begin_s = self.pieces[number], perf_counter()
        extent = piece.extent
        if piece.path is not None:
            for part in self.ranges[extent.flat]:
                part.show_memory(extent.begin, extent.numel)
            if not self._is_overfull:
                self._is_overfull = True
                logger.warning(
                    "offload: no path has room for subgroup %d, so its %d bytes stay in memory, "
                    "and perhaps others' too; free some space before the next start",
                    number, piece.nbytes,
                )  # fmt: skip
        newest = self.held[number].state(extent.numel)
        for old, new in zip(self.mapped(number), newest, strict=True):
            old.copy_(new)
        piece.path, piece.is_torn = None, False
        self._written(number, "memory", begin_s, then)

    def _let_go(self, piece: Piece) -> None:
        """Unmap a piece's pages: what is mapped cannot be dropped from the page cache."""
        for each in self.ranges[piece.extent.flat]:
            each.let_go(piece.extent.begin, piece.extent.numel)

    def _settle(self, number: int, path: int, offset: int) -> None:
        """Let a piece's tensors show a place, which is its own from then on.

        Raises:
            StorageError: they cannot, or not all of them; whoever writes the piece next repairs it.
        """
        piece = self.pieces[number]
        extent, piece.is_torn = piece.extent, True
        for turn, each in enumerate(self.ranges[extent.flat]):
            begin = offset + 4 * turn * extent.numel
            each.show_file(extent.begin, extent.numel, self.files[path].descriptor, begin)
        piece.path, piece.offset, piece.is_torn = path, offset, False


def _reserve(file: ScratchFile, sizes: Sequence[int], progress: Callable[[], None]) -> list[int]:
    """Return the offset of each piece."""
    offsets = []
    for nbytes in sizes:
        offsets.append(file.reserve(nbytes))
        progress()
    return offsets


def ignored(_piece: int, _lane: str, _nbytes: int, _begin_s: float, _end_s: float) -> None:
    """Note nothing: transfers outside of updates are no part of a trace."""
