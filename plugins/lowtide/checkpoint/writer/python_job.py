"""Jobs of the writer in Python."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer.base import Progress, Ticket, failure_text, not_durable_text
from lowtide.checkpoint.writer.plan import FilePlan, FileResult
from lowtide.checkpoint.writer.python_file import Chunk, File, Slabs
from lowtide.core.errors import CheckpointError

Failure: TypeAlias = tuple[str, str, int, int]  # operation, path, errno, wanted bytes
CANCELLED: Failure = ("cancel", "", errno.ECANCELED, 0)


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


class Job(Ticket):
    """A job of the writer in Python."""

    def __init__(self, core: Core, plans: Sequence[FilePlan], *, is_partial: bool = False) -> None:
        self._core = core
        self.is_partial = is_partial
        self.hurried_bytes = 0
        self.files = [File(plan, core.slabs.slab_bytes, is_partial=is_partial) for plan in plans]
        self.total_bytes = sum(plan.size_bytes for plan in plans)
        self.captured_bytes = self.written_bytes = self.durable_files = 0
        self.reading = self.next_file = 0
        self.failure: Failure | None = None
        self._progress_at = time.monotonic()
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
            self.hurried_bytes += chunk.payload if chunk.is_hurried else 0
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

    # --- for the caller

    def wait_captured(self, timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_captured`; the caller does not help, two threads of Python do not."""
        return self._core.wait(self.is_released, timeout_s)

    def wait_released(self, memory: NDArray[np.uint64], timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_released`."""
        return self._core.wait_released(self, memory, timeout_s)

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
            staged_bytes=self.captured_bytes,
            direct_bytes=0,
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
