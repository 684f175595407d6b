"""The writer in Python: the readable reference for csrc/checkpoint, and the way without it.

One thread captures, a few do the writing. One lock guards all state; it is never held
while memory is copied or a file is touched.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer.base import Ticket, Writer
from lowtide.checkpoint.writer.plan import FilePlan
from lowtide.checkpoint.writer.plan_check import check_begins_with, check_plan
from lowtide.checkpoint.writer.python_file import Chunk, Failed, File, Slabs, Stage
from lowtide.checkpoint.writer.python_job import CANCELLED, Failure, Job
from lowtide.checkpoint.writer.python_queue import Queue
from lowtide.core.errors import CheckpointError

_IO_THREADS = 4
_GRACE_S = 2.0  # for threads to end, if nothing hangs

_Task: TypeAlias = tuple[Job, File, "Chunk | None"]  # without a chunk: sync and close the file


class PythonWriter(Writer):
    """The arguments are those of `open_writer`; it uses no io_uring and copies every byte."""

    def __init__(
        self,
        *,
        buffer_bytes: int,
        chunk_bytes: int,
        io: str,
        direct: bool,
        bytes_per_s: float,
        queue_depth: int,
    ) -> None:
        if io not in ("auto", "io_uring", "threads"):
            raise ValueError(f'io: got "{io}", allowed is "auto", "io_uring" or "threads"')
        if not 1 <= queue_depth <= 256:
            raise ValueError(f"queue_depth: got {queue_depth}, allowed is 1 to 256")
        if not bytes_per_s >= 0:
            raise ValueError(f"bytes_per_s: got {bytes_per_s}, allowed is 0 (no limit) and more")
        slabs = Slabs(buffer_bytes, chunk_bytes)
        self._core = _Core(slabs, io=io, direct=direct, bytes_per_s=bytes_per_s)
        self._core.start(min(queue_depth, _IO_THREADS))
        self._finalizer = weakref.finalize(self, self._core.close, 0.0)

    def submit(self, plans: Sequence[FilePlan], *, is_partial: bool = False) -> Ticket:
        """See `Writer.submit`."""
        self._core.check_process()
        for plan in plans:
            check_plan(plan)
        if is_partial and len(plans) != 1:
            raise ValueError(f"plans: got {len(plans)}, allowed is one where it is partial")
        return self._core.submit(plans, is_partial=is_partial)

    def close(self, *, timeout_s: float) -> bool:
        """See `Writer.close`."""
        self._core.check_process()
        return self._core.close(timeout_s)

    def facts(self) -> dict[str, Any]:
        """See `Writer.facts`."""
        self._core.check_process()
        return self._core.facts()


class _Core:
    """What the threads share; it outlives the writer while one of them hangs."""

    def __init__(self, slabs: Slabs, *, io: str, direct: bool, bytes_per_s: float) -> None:
        self.slabs = slabs
        self._changed = threading.Condition()
        self._io_reason = "switched off by the caller" if io == "threads" else "not in Python"
        self._use_direct = self._is_direct = direct
        self._direct_reason = "" if direct else "switched off by the caller"
        self._bytes_per_s = bytes_per_s
        self._free_at = time.monotonic()  # when the rate allows the next byte
        self._queue = Queue(slabs)  # of what is to be captured
        self._tasks: deque[_Task] = deque()
        self._active: list[Job] = []  # not settled
        self._at_work = 0  # chunks and files that will become tasks, or are being worked on
        self._is_closing = self._is_stopping = False
        self._threads: list[threading.Thread] = []
        self._pid = os.getpid()

    def start(self, io_threads: int) -> None:
        """Start the threads."""
        works = [self._capture_loop, *[self._io_loop] * io_threads]
        # Daemons: the interpreter must not wait for one that hangs.
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def check_process(self) -> None:
        """Raise in a child process: it has none of the threads."""
        if os.getpid() != self._pid:
            raise CheckpointError(
                "this checkpoint writer belongs to the parent process; open one of its own in "
                "each process, after the fork"
            )

    def submit(self, plans: Sequence[FilePlan], *, is_partial: bool) -> Job:
        """Queue checked plans."""
        job = Job(self, plans, is_partial=is_partial)
        with self._changed:
            if self._is_closing:
                raise CheckpointError("checkpoint writer: the writer is closed")
            if not job.is_settled():
                self._active.append(job)
                self._queue.add(job)
            for file in job.files:
                if file.chunks == 0 and not is_partial:
                    self._add_task(job, file, None)
            self._changed.notify_all()
        return job

    def extend(self, job: Job, plan: FilePlan, *, is_partial: bool) -> None:
        """Take more of a job's partial file."""
        self.check_process()
        check_plan(plan)
        with self._changed:
            file = job.files[0]
            if not job.is_partial:
                raise ValueError(f"plan of {plan.path}: the job's file is whole already")
            if file.source is not None:
                check_begins_with(plan, file.source.plan)
            job.extend_file(plan, is_partial=is_partial)
            self._finish_if_idle(job, file)
            self._changed.notify_all()

    def facts(self) -> dict[str, Any]:
        """See `Writer.facts`."""
        with self._changed:
            return {
                "implementation": "python",
                "io": "threads",
                "io_reason": self._io_reason,
                "is_direct": self._is_direct,
                "direct_reason": self._direct_reason,
                "buffer_bytes": self.slabs.buffer_bytes,
                "touched_bytes": self.slabs.touched_bytes,
                "chunk_bytes": self.slabs.slab_bytes,
            }

    def wait(self, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until `is_over`, which is called under the lock."""
        self.check_process()
        with self._changed:
            return self._changed.wait_for(is_over, timeout_s)

    def cancel(self, job: Job) -> None:
        """Give up a job."""
        self.check_process()
        with self._changed:
            self._fail(job, CANCELLED)

    def hurry(self, job: Job, memory: NDArray[np.uint64]) -> None:
        """See `Ticket.hurry`."""
        self.check_process()
        with self._changed:
            self._queue.hurry(self._queue.places(job, memory))
            self._changed.notify_all()

    def wait_released(self, job: Job, memory: NDArray[np.uint64], timeout_s: float | None) -> bool:
        """See `Ticket.wait_released`."""
        self.check_process()
        with self._changed:
            urgent = self._queue.places(job, memory)
            self._queue.hurry_first(urgent)
            self._changed.notify_all()

            def is_over() -> bool:
                return job.is_released() or all(
                    index < file.chunks and file.stages[index] == Stage.CAPTURED
                    for _, file, index in urgent
                )

            return self._changed.wait_for(is_over, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """See `Writer.close`."""
        if os.getpid() != self._pid:
            return True
        with self._changed:
            self._is_closing = True
            self._changed.wait_for(lambda: not self._active, timeout_s)
            for job in list(self._active):
                self._fail(job, CANCELLED)
            self._is_stopping = True
            self._changed.notify_all()
        deadline = time.monotonic() + _GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        is_clean = not any(thread.is_alive() for thread in self._threads)
        if is_clean:  # tickets may live on for long; the buffer must not
            self.slabs.unmap()
        return is_clean

    # --- capture

    def _capture_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._queue.find())
                if self._is_stopping:
                    return
                job, file, chunk = self._queue.take()
                self._at_work += 1
                source = file.source
            if source is not None:
                file.capture(source, chunk, self.slabs.memory(chunk.slab))
            del source  # it keeps the live memory
            with self._changed:
                job.count_captured(file, chunk)
                self._tasks.append((job, file, chunk))
                self._changed.notify_all()
            del job, file, chunk

    # --- I/O

    def _io_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._tasks or (self._is_stopping and self._at_work == 0)
                )
                if not self._tasks:
                    return
                job, file, chunk = self._tasks.popleft()
            failure = self._perform(job, file, chunk)
            with self._changed:
                if failure is not None:
                    self._fail(job, failure)
                self._end_task(job, file, chunk)
                self._changed.notify_all()

    def _perform(self, job: Job, file: File, chunk: Chunk | None) -> Failure | None:
        try:
            if job.failure is None:
                file.open(self._use_direct)
            if chunk is None:
                file.finish(is_wanted=job.failure is None)
            elif job.failure is None and self._is_due(job, chunk):
                file.write(chunk, self.slabs.memory(chunk.slab))
        except Failed as failed:
            return failed.operation, str(file.path), failed.code, file.size_bytes
        return None

    def _is_due(self, job: Job, chunk: Chunk) -> bool:
        """Wait until, at the allowed rate, the chunk would be written; False if it is dropped."""
        if not self._bytes_per_s:
            return True
        with self._changed:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + chunk.payload / self._bytes_per_s
            timeout_s = self._free_at - now
            return not self._changed.wait_for(lambda: job.failure is not None, timeout_s)

    def _end_task(self, job: Job, file: File, chunk: Chunk | None) -> None:
        self._at_work -= 1
        if self._use_direct and file.direct_reason is not None and job.failure is None:
            self._is_direct, self._direct_reason = file.is_direct, file.direct_reason
        if chunk is None:
            if job.failure is None and job.count_durable():
                self._active.remove(job)
            return
        self.slabs.give(chunk.slab)
        file.in_flight -= 1
        if job.failure is None:
            job.count_written(chunk)
            file.written += 1
        self._finish_if_idle(job, file)

    def _finish_if_idle(self, job: Job, file: File) -> None:
        is_dropped = job.failure is not None and file.in_flight == 0 and file.fd >= 0
        is_written = file.written == file.chunks and not file.is_partial
        if not file.is_over and (is_written or is_dropped):
            self._add_task(job, file, None)

    def _add_task(self, job: Job, file: File, chunk: Chunk | None) -> None:
        file.is_over = chunk is None
        self._at_work += 1
        self._tasks.append((job, file, chunk))

    def _fail(self, job: Job, failure: Failure) -> None:
        """Keep the job's first failure and drop what is left; what is under way ends by itself."""
        if job.is_settled():
            return
        job.failure = failure
        self._active.remove(job)
        for file in job.files:
            self._finish_if_idle(job, file)
        job.release_if_possible()
        self._changed.notify_all()
