"""One thread per path and direction, each doing one transfer at a time, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from time import perf_counter

Action = Callable[[Callable[[], None]], None]
"""A transfer; it calls its argument whenever it has got further."""


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
            action(self._progress)
            self._moved_s = None
            del action  # it may hold memory, and the next one may be long in coming
