"""What the writer in Python does to memory and files: slabs, chunks, and a file of a job."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lowtide.checkpoint.writer.plan import LITERAL, PAGE_BYTES, FilePlan, Source
from lowtide.checkpoint.writer.plan_check import PATCH_BYTES, patches_in
from lowtide.checkpoint.writer.sums import Patch, Sums
from lowtide.core.errors import CheckpointError

_LARGEST_SLAB_BYTES = 2**30
_MOST_FRUITLESS = 100  # attempts in a row that write nothing
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV, errno.ENOSYS, errno.ESPIPE}
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_O_DIRECT = getattr(os, "O_DIRECT", 0)
# os.posix_fallocate would write the zeros itself where the file system cannot reserve.
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):  # noqa: N818 - becomes the job's CheckpointError
    """An operation on a file failed."""

    def __init__(self, operation: str, code: int) -> None:
        super().__init__(operation, code)
        self.operation, self.code = operation, code


class Slabs:
    """One buffer, cut into slabs of one chunk each."""

    def __init__(self, buffer_bytes: int, slab_bytes: int) -> None:
        if slab_bytes % PAGE_BYTES or not 0 < slab_bytes <= _LARGEST_SLAB_BYTES:
            raise ValueError(
                f"chunk_bytes: got {slab_bytes}, allowed is a multiple of 4096 up to 1073741824"
            )
        if buffer_bytes % slab_bytes or buffer_bytes < 2 * slab_bytes:
            raise ValueError(
                f"buffer_bytes: got {buffer_bytes}, allowed is a multiple of chunk_bytes, "
                f"{slab_bytes}, and at least twice as much"
            )
        self.buffer_bytes, self.slab_bytes = buffer_bytes, slab_bytes
        try:
            mapping = mmap.mmap(-1, buffer_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"checkpoint writer: buffer_bytes: cannot map {buffer_bytes} bytes: {error}"
            ) from error
        mapping.madvise(mmap.MADV_DONTFORK)  # no copy of the pages in a child process
        self._memory = memoryview(mapping)
        self._untouched = list(range(buffer_bytes // slab_bytes))[::-1]
        self._free: list[int] = []

    @property
    def touched_bytes(self) -> int:
        """How much of the buffer has been used, and so has its memory."""
        return self.buffer_bytes - len(self._untouched) * self.slab_bytes

    def unmap(self) -> None:
        """Give the memory back to the system; no slab may be used any more."""
        self._memory = memoryview(b"")

    def memory(self, number: int) -> memoryview:
        """Return the memory of a slab."""
        return self._memory[number * self.slab_bytes : (number + 1) * self.slab_bytes]

    def has_free(self) -> bool:
        """Tell whether `take` will find one."""
        return bool(self._free or self._untouched)

    def take(self) -> int:
        """Take a free slab, one with memory first."""
        return self._free.pop() if self._free else self._untouched.pop()

    def give(self, number: int) -> None:
        """Give a slab back."""
        self._free.append(number)


@dataclass
class Chunk:
    """A chunk from the moment when it is taken until it is written or dropped."""

    index: int
    begin: int
    payload: int
    slab: int
    is_hurried: bool = False  # captured because its memory is about to be overwritten


class Stage(enum.IntEnum):
    """How far a chunk is."""

    KNOWN = 0
    TAKEN = 1
    CAPTURED = 2


class File:
    """A file of a job. Its numbers are guarded by the writer's lock."""

    def __init__(self, plan: FilePlan, chunk_bytes: int, *, is_partial: bool = False) -> None:
        self.path = plan.path
        self.is_partial = is_partial
        self._chunk_bytes = chunk_bytes
        self.stages = bytearray()  # of each chunk
        self.set_plan(plan)
        self.next = self.captured_chunks = self.written = self.in_flight = 0
        self.sums = Sums()  # of the capturing thread
        self.fd = -1
        self.is_over = False  # closed, or about to be
        self.is_direct = False
        self.direct_reason: str | None = None  # None: not known yet
        self._is_opened = self._is_padded = False
        self._opening = threading.Lock()
        self._failed_to_open: Failed | None = None

    # --- memory

    def set_plan(self, plan: FilePlan) -> None:
        """Take a plan, or a longer one after a partial one."""
        self.size_bytes = plan.size_bytes
        # Of a partial file the chunk in which it ends is left for later.
        last = 0 if self.is_partial else self._chunk_bytes - 1
        self.chunks = (plan.size_bytes + last) // self._chunk_bytes
        self.stages += bytes(self.chunks - len(self.stages))
        self.source: Source | None = Source(plan)

    def first_untaken(self) -> int:
        """Return the first chunk that no thread has had; `chunks` if all are taken."""
        while self.next < self.chunks and self.stages[self.next] != Stage.KNOWN:
            self.next += 1
        return self.next

    def note_captured(self, chunk: Chunk) -> None:
        """Note that nobody reads a chunk's live memory any more."""
        self.stages[chunk.index] = Stage.CAPTURED
        while self.captured_chunks < self.chunks and self.stages[self.captured_chunks] == 2:
            self.captured_chunks += 1

    def release(self) -> None:
        """Let go of the live memory."""
        self.source = None

    @staticmethod
    def live_memory(address: int, length: int) -> memoryview:
        """Return memory by its address; the plan's owners keep it alive."""
        return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")

    def fill_in_patches(
        self, source: Source, part: memoryview, address: int, begin: int
    ) -> list[Patch]:
        """Write checksums into a copied literal that lay at `address`; return those not known yet.

        Args:
            source: What is known of the file.
            part: The copy.
            address: Where the literal lies.
            begin: Where the copy lies in its chunk.
        """
        plan, unknown = source.plan, []
        shift = address - plan.literals.ctypes.data
        for position, entry in patches_in(plan, source.patches, address, len(part)):
            at = max(position - shift, 0)  # a chunk or a piece may end inside a patch
            skip = at - (position - shift)
            count = min(PATCH_BYTES - skip, len(part) - at)
            size = source.entry_bytes.get(entry, 0)
            patch = Patch(begin + at, count, entry, skip, size)
            if (found := self.sums.known(patch)) is None:
                unknown.append(patch)
            else:
                part[at : at + count] = found
        return unknown

    def capture(self, source: Source, chunk: Chunk, memory: memoryview) -> None:
        """Copy a chunk to `memory`; compute checksums of what is in it."""
        end = chunk.begin + chunk.payload
        offset = chunk.begin
        unknown: list[Patch] = []
        while offset < end:
            piece, plan = source.piece_at(offset), source.plan
            length = min(int(plan.offsets[piece] + plan.lengths[piece]), end) - offset
            skip = offset - int(plan.offsets[piece])
            address, entry = int(plan.addresses[piece]) + skip, int(plan.entries[piece])
            part = memory[offset - chunk.begin : offset - chunk.begin + length]
            part[:] = self.live_memory(address, length)
            if entry == LITERAL:
                unknown += self.fill_in_patches(source, part, address, offset - chunk.begin)
            else:
                self.sums.add(entry, source.places[piece] + skip, part)
            offset += length
        self.sums.end_chunk(chunk.index, chunk.begin, memory[: chunk.payload], unknown)
        if chunk.slab is not None:  # direct I/O writes whole pages
            memory[chunk.payload :] = bytes(len(memory) - chunk.payload)

    # --- the file system

    def open(self, use_direct: bool) -> None:
        """Open the file unless that has been done; the others wait for the first."""
        with self._opening:
            if not self._is_opened:
                self._is_opened = True
                try:
                    self.fd = self._open(use_direct)
                    self._reserve()
                except Failed as failed:
                    self._failed_to_open = failed
            if self._failed_to_open is not None:
                raise self._failed_to_open

    def _reserve(self) -> None:
        """Let a full disk show now and not after minutes of writing."""
        size = ctypes.c_long(self.size_bytes)
        if self.size_bytes and _libc.fallocate(self.fd, 0, ctypes.c_long(0), size) != 0:
            code = ctypes.get_errno()
            if code not in _UNSUPPORTED:
                raise Failed("reserve space for", code)

    def _open(self, use_direct: bool) -> int:
        # Not written over: a write of a job that has failed may still be under way there.
        if os.path.isfile(self.path) and not os.path.islink(self.path):
            with contextlib.suppress(OSError):  # if it stays, opening tells why
                os.unlink(self.path)
        try:
            if use_direct:
                fd = os.open(self.path, _FLAGS | _O_DIRECT, 0o666)
                self.is_direct, self.direct_reason = True, ""
                return fd
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise Failed("open", error.errno or errno.EIO) from error
            self.direct_reason = "the file system refuses O_DIRECT"
        try:
            return os.open(self.path, _FLAGS, 0o666)
        except OSError as error:
            raise Failed("open", error.errno or errno.EIO) from error

    def write(self, chunk: Chunk, data: memoryview) -> None:
        """Write a chunk at its place."""
        is_direct = self.is_direct
        size = -(-chunk.payload // PAGE_BYTES) * PAGE_BYTES if is_direct else chunk.payload
        self._is_padded |= size != chunk.payload
        try:
            self._write(data[:size], chunk.begin, is_direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not is_direct:
                raise Failed("write", error.errno or errno.EIO) from error
            # Some file systems take O_DIRECT and refuse the first write.
            flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~_O_DIRECT)
            self.is_direct, self.direct_reason = False, "the file system refuses direct writes"
            self.write(chunk, data)

    def _write(self, data: memoryview, offset: int, is_direct: bool) -> None:
        done = fruitless = 0
        while done < len(data):
            try:
                advanced = os.pwrite(self.fd, data[done:], offset + done)
            except BlockingIOError:  # EAGAIN; Python itself repeats what was interrupted
                advanced = 0
            if is_direct and done + advanced < len(data):
                advanced -= advanced % PAGE_BYTES  # what follows must begin on a page again
            done += advanced
            fruitless = 0 if advanced else fruitless + 1
            if fruitless > _MOST_FRUITLESS:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def finish(self, *, is_wanted: bool) -> None:
        """Close the file; if it is wanted, bring it to the disk before."""
        if self.fd < 0:
            return
        fd, self.fd = self.fd, -1
        failure: Failed | None = None
        steps: list[tuple[str, Callable[[], None]]] = []
        if is_wanted:
            if self.sums.late:
                steps.append(("write", lambda: self._write_late(fd)))
            if self._is_padded:
                steps.append(("truncate", lambda: os.ftruncate(fd, self.size_bytes)))
            # Never again after an error: the kernel has forgotten what it could not write.
            steps.append(("sync", lambda: os.fdatasync(fd)))
        for name, step in [*steps, ("close", lambda: os.close(fd))]:
            try:
                if failure is None or name == "close":
                    step()
            except OSError as error:
                failure = failure or Failed(name, error.errno or errno.EIO)
        if failure is not None:
            raise failure

    def _write_late(self, fd: int) -> None:
        """Write the patches that came too late; they are no whole pages."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_O_DIRECT)
        for offset, data in self.sums.late:
            for at in range(len(data)):
                os.pwrite(fd, data[at : at + 1], offset + at)
