"""The native writer behind the common interface."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer.base import (
    Progress,
    Ticket,
    Writer,
    failure_text,
    not_durable_text,
)
from lowtide.checkpoint.writer.plan import FilePlan, FileResult
from lowtide.core.errors import CheckpointError

_SLICE_S = 0.2  # longest wait without a look at Python's signals
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.02  # between two looks of a thread that may not block

# Memory that a thread which hangs in the system may still read. Never freed.
_abandoned: list[Any] = []


class NativeTicket(Ticket):
    """A job of the native writer."""

    def __init__(self, ticket: Any, plans: Sequence[FilePlan], chunk_bytes: int) -> None:
        self._ticket = ticket
        self._files = [(plan.path, plan.size_bytes) for plan in plans]
        self._chunk_bytes = chunk_bytes
        self._kept: Any = [(list(plan.owners), plan.literals) for plan in plans]

    def extend(self, plan: FilePlan, *, is_partial: bool = False) -> None:
        """See `Ticket.extend`."""
        kept = self._kept
        self._kept = [kept, (list(plan.owners), plan.literals)]
        with _typed_errors():
            self._ticket.extend(_arguments(plan), is_partial)
        self._files = [(plan.path, plan.size_bytes)]

    def wait_captured(self, timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_captured`."""
        is_over = self._wait(
            self._ticket.wait_captured, lambda: bool(self.state()["is_released"]), timeout_s
        )
        self.state()
        return is_over

    def hurry(self, memory: NDArray[np.uint64]) -> None:
        """See `Ticket.hurry`."""
        with _typed_errors():
            self._ticket.hurry(memory)

    def wait_released(self, memory: NDArray[np.uint64], timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_released`."""
        wait = functools.partial(self._ticket.wait_released, memory)
        return self._wait(wait, lambda: bool(wait(0.0)), timeout_s)

    def wait_durable(self, timeout_s: float | None = None) -> bool:
        """See `Ticket.wait_durable`."""
        self._wait(self._ticket.wait_durable, lambda: bool(self.state()["is_settled"]), timeout_s)
        return self.is_durable

    def cancel(self) -> None:
        """See `Ticket.cancel`."""
        with _typed_errors():
            self._ticket.cancel()

    def progress(self) -> Progress:
        """See `Ticket.progress`."""
        state = self.state()
        return Progress(**{name: state[name] for name in Progress.__dataclass_fields__})

    def captured_chunks(self) -> int:
        """See `Ticket.captured_chunks`."""
        return int(self.state()["captured_chunks"])

    @property
    def is_captured(self) -> bool:
        """See `Ticket.is_captured`."""
        return bool(self.state()["is_captured"])

    @property
    def is_durable(self) -> bool:
        """See `Ticket.is_durable`."""
        return bool(self.state()["is_durable"])

    @property
    def error(self) -> CheckpointError | None:
        """See `Ticket.error`."""
        failure = self.state()["error"]
        if failure is None:
            return None
        operation, path, code, wanted_bytes = failure
        return CheckpointError(failure_text(operation, os.fsdecode(path), code, wanted_bytes))

    def results(self) -> list[FileResult]:
        """See `Ticket.results`."""
        if (error := self.error) is not None:
            raise error
        if not self.is_durable:
            raise CheckpointError(not_durable_text(self))
        return [
            FileResult(path=path, size_bytes=size, chunk_bytes=self._chunk_bytes, crc32=crcs)
            for (path, size), crcs in zip(self._files, self._ticket.results(), strict=True)
        ]

    def state(self) -> dict[str, Any]:
        """Return the native numbers; lets go of the live memory if nobody reads it any more."""
        with _typed_errors():
            state: dict[str, Any] = self._ticket.state()
        if state["is_released"]:
            self._kept = None
        return state

    def abandon(self) -> None:
        """Keep the live memory for ever if somebody may still read it."""
        if not self.state()["is_released"]:
            _abandoned.append(self._kept)

    def _wait(
        self,
        native_wait: Callable[[float], bool],
        is_over: Callable[[], bool],
        timeout_s: float | None,
    ) -> bool:
        end_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        # A daemon thread may not be inside native code without the GIL when the interpreter ends
        # (see bind.cpp), so it looks from time to time instead, and does not help to capture.
        may_block = not threading.current_thread().daemon
        pause_s = _FIRST_PAUSE_S
        while True:
            left_s = max(0.0, end_s - time.monotonic())
            with _typed_errors():
                if may_block and native_wait(min(left_s, _SLICE_S)):
                    return True
            if not may_block and is_over():
                return True
            if left_s == 0.0:
                return False
            if not may_block:
                time.sleep(min(left_s, pause_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class NativeWriter(Writer):
    """`lowtide._native.checkpoint.Writer`; the arguments are those of `open_writer`."""

    def __init__(
        self,
        module: ModuleType,
        *,
        buffer_bytes: int,
        chunk_bytes: int,
        io: str,
        direct: bool,
        bytes_per_s: float,
        queue_depth: int,
    ) -> None:
        with _typed_errors():
            self._writer = module.Writer(
                buffer_bytes=buffer_bytes,
                chunk_bytes=chunk_bytes,
                io=io,
                direct=direct,
                bytes_per_s=bytes_per_s,
                queue_depth=queue_depth,
            )
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._uncaptured: list[NativeTicket] = []
        # Before the tickets' memory goes, also at the interpreter's end, nobody may read it.
        self._finalizer = weakref.finalize(
            self, _close, self._writer, self._uncaptured, os.getpid(), 0.0
        )

    def submit(self, plans: Sequence[FilePlan], *, is_partial: bool = False) -> NativeTicket:
        """See `Writer.submit`."""
        arguments = list(map(_arguments, plans))
        with _typed_errors():
            ticket = self._writer.submit(arguments, is_partial)
        ticket = NativeTicket(ticket, plans, self._chunk_bytes)
        with self._lock:
            self._uncaptured.append(ticket)
        self._prune()
        return ticket

    def close(self, *, timeout_s: float) -> bool:
        """See `Writer.close`."""
        with _typed_errors():
            return _close(self._writer, self._uncaptured, os.getpid(), timeout_s)

    def facts(self) -> dict[str, Any]:
        """See `Writer.facts`."""
        self._prune()
        with _typed_errors():
            return {"implementation": "native", **self._writer.facts()}

    def _prune(self) -> None:
        """Forget tickets whose live memory nobody reads any more, and that memory with them."""
        with self._lock:
            self._uncaptured[:] = [t for t in self._uncaptured if not t.state()["is_released"]]


def _arguments(plan: FilePlan) -> tuple[Any, ...]:
    return (
        *(os.fsencode(plan.path), plan.size_bytes, plan.offsets, plan.lengths),
        *(plan.addresses, plan.entries, plan.literals, plan.patches, plan.expected_bytes),
    )


def _close(writer: Any, uncaptured: list[NativeTicket], pid: int, timeout_s: float) -> bool:
    if os.getpid() != pid:  # a child has none of the threads
        return True
    is_clean = bool(writer.close(timeout_s))
    for ticket in uncaptured:
        ticket.abandon()
    uncaptured.clear()
    return is_clean


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint writer: {error}") from error
