"""What every checkpoint writer promises, and the words for what went wrong."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer.plan import FilePlan, FileResult
from lowtide.core.errors import CheckpointError

_NOT_WRITABLE = "make the folder writable for this user or choose another one"
_NO_SPACE = "free some or choose another folder"
_ADVICE = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EACCES: _NOT_WRITABLE,
    errno.EPERM: _NOT_WRITABLE,
    errno.EROFS: _NOT_WRITABLE,
    errno.ENOENT: "create the folder before the checkpoint is written",
    errno.ENOTDIR: "something on the way to the file is not a folder; choose another path",
    errno.EISDIR: "a folder has the file's name; move it away or choose another path",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is.

    Attributes:
        total_bytes: Size of all its files.
        captured_bytes: Copied out of live memory, or written from there.
        written_bytes: Accepted by the file system; durable only after the last sync.
        staged_bytes: The part of the captured bytes that went through the buffer.
        direct_bytes: The part that was written straight from live memory.
        hurried_bytes: The part of the staged bytes that was copied because an update was about to
            overwrite them.
        idle_s: Seconds since something moved; 0 once the job is durable or has failed.
        capture_end_s: When all was captured, on the clock of `time.monotonic`, or None.
        durable_end_s: When all was durable, or None.
    """

    total_bytes: int
    captured_bytes: int
    written_bytes: int
    staged_bytes: int
    direct_bytes: int
    hurried_bytes: int
    idle_s: float
    capture_end_s: float | None = None
    durable_end_s: float | None = None


class Ticket(ABC):
    """One job of a writer: a set of files that become durable together. Thread-safe."""

    @abstractmethod
    def wait_captured(self, timeout_s: float | None = None) -> bool:
        """Wait until the job's live memory may change; the calling thread helps to capture.

        Returns:
            True when no thread reads that memory any more: all is captured, or the job has failed
            (see `error`). False when the time was over first.
        """

    @abstractmethod
    def hurry(self, memory: NDArray[np.uint64]) -> None:
        """Capture what lies in some memory before the rest; returns at once.

        Args:
            memory: uint64, shape (n, 2): begin and end of each stretch, in the order wanted. What
                was hurried before comes before.
        """

    @abstractmethod
    def wait_released(self, memory: NDArray[np.uint64], timeout_s: float | None = None) -> bool:
        """Capture what lies in some memory first of all, and wait until that may change.

        Args:
            memory: As for `hurry`.
            timeout_s: How long to wait at most; None is as long as it takes.

        Returns:
            True when no thread reads that memory any more; also when the job has failed and reads
            none at all. False when the time was over first.
        """

    @abstractmethod
    def wait_durable(self, timeout_s: float | None = None) -> bool:
        """Wait until every file is on its disk or the job has failed.

        Returns:
            True when the files are durable; False when they are not, because the time is over or
            because the job has failed (see `error`). That the files are found under their names
            after a crash is for the caller to see to: sync their folder.
        """

    @abstractmethod
    def extend(self, plan: FilePlan, *, is_partial: bool = False) -> None:
        """Tell more of a file of which only the beginning was submitted.

        Args:
            plan: All of it so far. It begins with the pieces of the plan before; literals may have
                moved.
            is_partial: There is still more to come.

        Raises:
            ValueError: It contradicts itself or the partial plan, or the file is whole already.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Give up what is not durable yet: the job fails, its files stay incomplete."""

    @abstractmethod
    def progress(self) -> Progress:
        """Return how far the job is."""

    @abstractmethod
    def captured_chunks(self) -> int:
        """Return how many chunks from the beginning of the first file nobody reads any more.

        It stands still once the job has failed; then `wait_captured` tells about all of them.
        """

    @property
    @abstractmethod
    def is_captured(self) -> bool:
        """Whether all bytes are captured."""

    @property
    @abstractmethod
    def is_durable(self) -> bool:
        """Whether all files are on their disk."""

    @property
    @abstractmethod
    def error(self) -> CheckpointError | None:
        """What made the job fail, or None."""

    @abstractmethod
    def results(self) -> list[FileResult]:
        """Return one result per plan, in order; waits for nothing.

        Raises:
            CheckpointError: The job has failed, or is not durable yet.
        """


class Writer(ABC):
    """Copies jobs out of live memory and writes them behind the caller's back. Thread-safe."""

    @abstractmethod
    def submit(self, plans: Sequence[FilePlan], *, is_partial: bool = False) -> Ticket:
        """Begin to write files; returns at once.

        Jobs are captured in the order in which they come, but for what is hurried. The writer keeps
        the plans' owners and literals until the job is captured, and lets go of them at the first
        call after that.

        Args:
            plans: The files.
            is_partial: There is one, and it is only the beginning of its file. Then this job, and
                those behind it, wait for `Ticket.extend` or `Ticket.cancel`.

        Raises:
            ValueError: A plan contradicts itself.
            CheckpointError: The writer is closed or belongs to another process.
        """

    @abstractmethod
    def close(self, *, timeout_s: float) -> bool:
        """Let jobs finish for `timeout_s` seconds, cancel the others, end all threads.

        Returns:
            False if a thread hangs in the system and was left behind, with its memory.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what the writer uses, as plain JSON.

        ``implementation`` ("native", "python"), ``io`` ("io_uring", "threads") and ``io_reason``
        (why not io_uring), ``is_direct`` (whether files bypass the page cache, as last seen) and
        ``direct_reason`` (why they do not), ``buffer_bytes``, ``touched_bytes`` (what of the
        buffer has its memory already) and ``chunk_bytes``.
        """


def failure_text(operation: str, path: str, code: int, wanted_bytes: int) -> str:
    """Return the text for a job that failed; `operation` is what was tried with `path`."""
    if code == errno.ECANCELED:
        return (
            "the checkpoint was cancelled before it was durable; its files are incomplete, so "
            "remove them or save again"
        )
    advice = _ADVICE.get(code, "look for the cause in the system's log (dmesg), then save again")
    wanted = f" ({wanted_bytes} bytes are wanted)" if wanted_bytes else ""
    where = f"{path}: " if path else ""
    return f"{where}cannot {operation} the file: {os.strerror(code)}{wanted}; {advice}"


def not_durable_text(ticket: Ticket) -> str:
    """Return the text for a caller who wants results too early."""
    progress = ticket.progress()
    return (
        f"the checkpoint is not durable yet ({progress.written_bytes} of {progress.total_bytes} "
        "bytes are written); call wait_durable first"
    )


def facts_text(facts: Mapping[str, Any]) -> str:
    """Return what a writer's facts say, in a line."""
    why = f" ({facts['io_reason']})" if facts["io_reason"] else ""
    buffer_mib = facts["buffer_bytes"] / 2**20
    return f"{facts['implementation']} writer, {facts['io']}{why}, {buffer_mib:.0f} MiB per rank"
