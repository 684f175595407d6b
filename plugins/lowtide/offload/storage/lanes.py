"""Threads that move bytes: one lane per path and direction, in order, and helpers for its parts."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TypeVar

from lowtide.core.errors import StorageError

_T = TypeVar("_T")

POLL_S = 0.2
Action = Callable[[Callable[[], None]], None]
"""A transfer; it calls its argument whenever it has got further."""


class Crew:
    """Threads that share the parts of a transfer, so that a device has several to work on.

    Daemons, as lanes are, and started when they are first needed.
    """

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_started = False

    def map(self, function: Callable[[int], int], items: Sequence[int]) -> list[int]:
        """Return the function's results; from any thread.

        Raises:
            Exception: what the first part that failed has raised, once all have ended.
        """
        if len(items) < 2:
            return [function(each) for each in items]
        self._start()
        found: list[int | Exception] = [0] * len(items)
        ended = threading.Semaphore(0)

        def run(turn: int) -> None:
            try:
                found[turn] = function(items[turn])
            except Exception as error:  # noqa: BLE001 - raised again below
                found[turn] = error
            finally:
                ended.release()

        for turn in range(len(items)):
            self._queue.put(partial(run, turn))
        for _ in items:
            ended.acquire()
        results = []
        for each in found:
            if isinstance(each, Exception):
                raise each
            results.append(each)
        return results

    def close(self) -> None:
        """End the threads behind what is queued."""
        with self._lock:
            for _ in range(self._count if self._is_started else 0):
                self._queue.put(None)
            self._is_started = False

    def _start(self) -> None:
        with self._lock:
            if self._is_started:
                return
            self._is_started = True
            for turn in range(self._count):
                threading.Thread(target=self._run, name=f"{self._name}-{turn}", daemon=True).start()

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            action()
            del action


class StorageLane:
    """A queue of transfers.

    A transfer that fails is its caller's business: actions raise nothing.

    Args:
        name: ``"read0"``, ``"write0"``: for traces and messages.
        path: Number of the path.
    """

    def __init__(self, name: str, path: int) -> None:
        self.name = name
        self.path = path
        self._queue: queue.SimpleQueue[Action | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.error: Exception | None = None  # a mistake of ours; the lane is dead then
        self._moved_s: float | None = None  # when the transfer under way last got further

    def submit(self, action: Action) -> None:
        """Do `action` once everything before it is done."""
        if self._thread is None:
            # A daemon: a file system that hangs must not keep the process from ending.
            self._thread = threading.Thread(
                target=self._run, name=f"lowtide-offload-{self.name}", daemon=True
            )
            self._thread.start()
        self._queue.put(action)

    def stalled_s(self) -> float:
        """Return for how long the transfer under way has not got any further."""
        moved_s = self._moved_s
        return 0.0 if moved_s is None else perf_counter() - moved_s

    def close(self) -> None:
        """End the thread behind what is queued. Not waited for: it may hang."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread = None

    def _progress(self) -> None:
        self._moved_s = perf_counter()

    def _run(self) -> None:
        while (action := self._queue.get()) is not None:
            self._progress()
            try:
                action(self._progress)
            except Exception as error:  # noqa: BLE001 - who waits for the lane raises it
                self.error = error
                return
            self._moved_s = None
            del action  # it may hold memory, and the next one may be long in coming


def run_watched(folder: str, action: Callable[[Callable[[], None]], _T], *, stall_s: float) -> _T:
    """Return what `action` returns; it runs in a thread of its own, as a path may hang.

    Args:
        folder: For the message.
        action: Calls its argument whenever it has got further.
        stall_s: It is given up when it gets no further for so long.

    Raises:
        StorageError: it hangs.
        Exception: whatever `action` raises.
    """
    found: list[_T] = []
    failures: list[Exception] = []
    ended = threading.Event()

    def run(progress: Callable[[], None]) -> None:
        try:
            found.append(action(progress))
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
        finally:
            ended.set()

    lane = StorageLane("start", 0)
    lane.submit(run)
    lane.close()
    while not ended.wait(POLL_S):
        if lane.stalled_s() > stall_s:
            raise StorageError(
                f"offload.storage: {folder!r}: has got no further for {stall_s:g} s while it was "
                f"opened and measured; take it out of lowtide.offload.storage.paths or raise "
                f"stall_s"
            )
    if failures:
        raise failures[0]
    return found[0]
