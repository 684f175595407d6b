"""The state of jobs of the writer in Python, and what it does to memory and files."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer.base import Progress, Ticket, failure_text, not_durable_text
from lowtide.checkpoint.writer.plan import PAGE_BYTES, FilePlan, FileResult, Source
from lowtide.checkpoint.writer.plan_check import PATCH_BYTES, patches_in
from lowtide.checkpoint.writer.sums import Patch, Sums
from lowtide.core.errors import CheckpointError

Failure: TypeAlias = tuple[str, str, int, int]  # operation, path, errno, wanted bytes
CANCELLED: Failure = ("cancel", "", errno.ECANCELED, 0)

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


class Core(Protocol):
    """What a job needs of its writer."""

    slabs: Slabs

    def check_process(self) -> None:
        """Raise in a child process: it has none of the threads."""

    def wait(self, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until `is_over`, which is called under the lock."""

    def extend(self, job: Job, plan: FilePlan, *, is_partial: bool) -> None:
        """Take more of a job's partial file."""

    def cancel(self, job: Job) -> None:
        """Give up a job."""

    def hurry(self, job: Job, memory: NDArray[np.uint64]) -> None:
        """Capture what lies in this memory before what is still to be captured."""

    def wait_released(self, job: Job, memory: NDArray[np.uint64], timeout_s: float | None) -> bool:
        """Capture what lies in this memory first of all, and wait until nobody reads it."""

    def rush(self, job: Job) -> None:
        """Leave nothing of a job where it lies."""


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
    slab: int | None  # None: it is written from where it lies, which is `memory`
    memory: memoryview | None = None
    source: Source | None = None  # keeps `memory` alive
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


class Job(Ticket):
    """A job of the writer in Python."""

    def __init__(self, core: Core, plans: Sequence[FilePlan], *, is_partial: bool = False) -> None:
        self._core = core
        self.is_partial = is_partial
        self.may_stay = self.is_rushed = False
        self.direct_bytes = self.hurried_bytes = 0
        self.files = [File(plan, core.slabs.slab_bytes, is_partial=is_partial) for plan in plans]
        self.total_bytes = sum(plan.size_bytes for plan in plans)
        self.captured_bytes = self.written_bytes = self.durable_files = 0
        self.reading = self.next_file = 0
        self.failure: Failure | None = None
        self._begin_at = self._progress_at = time.monotonic()
        self._captured_at = None if self.total_bytes or is_partial else self._progress_at
        self._durable_at = None if self.files else self._progress_at
        self.release_if_possible()

    # --- for the writer, under its lock

    def is_released(self) -> bool:
        """Tell whether nobody reads the live memory any more."""
        return self.reading == 0 and (self._captured_at is not None or self.failure is not None)

    def is_settled(self) -> bool:
        """Tell whether nothing more will come."""
        return self._durable_at is not None or self.failure is not None

    def release_if_possible(self) -> None:
        """Let go of the live memory if nobody reads it any more."""
        if self.is_released():
            for file in self.files:
                file.release()

    def count_captured(self, file: File, chunk: Chunk) -> None:
        """Count a chunk that is captured."""
        self.reading -= 1
        if self.failure is None:
            file.note_captured(chunk)
            is_direct = chunk.slab is None
            self.direct_bytes += chunk.payload if is_direct else 0
            self.hurried_bytes += chunk.payload if chunk.is_hurried and not is_direct else 0
            self.captured_bytes += chunk.payload
            self._note_progress()
        self.release_if_possible()

    def extend_file(self, plan: FilePlan, *, is_partial: bool) -> None:
        """Take a longer plan of the partial file."""
        file = self.files[0]
        self.total_bytes += plan.size_bytes - file.size_bytes
        self.is_partial = file.is_partial = is_partial
        file.set_plan(plan)
        if self.failure is None:
            self._note_progress()
        self.release_if_possible()

    def _note_progress(self) -> None:
        self._progress_at = time.monotonic()
        if self.captured_bytes == self.total_bytes and not self.is_partial:
            self._captured_at = self._progress_at

    def count_written(self, chunk: Chunk) -> None:
        """Count a chunk that is written."""
        self.written_bytes += chunk.payload
        self._progress_at = time.monotonic()

    def count_durable(self) -> bool:
        """Count a file that is durable; return whether it was the last."""
        self.durable_files += 1
        self._progress_at = time.monotonic()
        if self.durable_files < len(self.files):
            return False
        self._durable_at = self._progress_at
        return True

    def bytes_per_s(self) -> float:
        """Return how fast a durable job was written."""
        return self.total_bytes / max(self._progress_at - self._begin_at, 1e-9)

    # --- for the caller

    def wait_captured(self, timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_captured`; the caller does not help, two threads of Python do not."""
        self._core.rush(self)
        return self._core.wait(self.is_released, timeout_s)

    def wait_released(self, memory: NDArray[np.uint64], timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_released`."""
        return self._core.wait_released(self, memory, timeout_s)

    @property
    def is_lazy(self) -> bool:
        """See `Ticket.is_lazy`."""
        return self.may_stay

    def hurry(self, memory: NDArray[np.uint64]) -> None:
        """See `Ticket.hurry`."""
        self._core.hurry(self, memory)

    def wait_durable(self, timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_durable`."""
        self._core.wait(self.is_settled, timeout_s)
        return self.is_durable

    def extend(self, plan: FilePlan, *, is_partial: bool = False) -> None:
        """See `Ticket.extend`."""
        self._core.extend(self, plan, is_partial=is_partial)

    def cancel(self) -> None:
        """See `Ticket.cancel`."""
        self._core.cancel(self)

    def progress(self) -> Progress:
        """See `Ticket.progress`."""
        self._core.check_process()
        return Progress(
            total_bytes=self.total_bytes,
            captured_bytes=self.captured_bytes,
            written_bytes=self.written_bytes,
            staged_bytes=self.captured_bytes - self.direct_bytes,
            direct_bytes=self.direct_bytes,
            hurried_bytes=self.hurried_bytes,
            idle_s=0.0 if self.is_settled() else time.monotonic() - self._progress_at,
            capture_end_s=self._captured_at,
            durable_end_s=self._durable_at,
        )

    def captured_chunks(self) -> int:
        """See `Ticket.captured_chunks`."""
        return self.files[0].captured_chunks if self.files else 0

    @property
    def is_captured(self) -> bool:
        """See `Ticket.is_captured`."""
        return self._captured_at is not None

    @property
    def is_durable(self) -> bool:
        """See `Ticket.is_durable`."""
        return self._durable_at is not None

    @property
    def error(self) -> CheckpointError | None:
        """See `Ticket.error`."""
        return None if self.failure is None else CheckpointError(failure_text(*self.failure))

    def results(self) -> list[FileResult]:
        """See `Ticket.results`."""
        if (error := self.error) is not None:
            raise error
        if not self.is_durable:
            raise CheckpointError(not_durable_text(self))
        return [
            FileResult(
                path=file.path,
                size_bytes=file.size_bytes,
                chunk_bytes=self._core.slabs.slab_bytes,
                crc32=[file.sums.chunk_crcs[i] for i in range(file.chunks)],
            )
            for file in self.files
        ]
