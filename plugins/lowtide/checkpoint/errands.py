"""Small work on a file system that may hang, without whoever needs it hanging too."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path


class Errands:
    """Does work in a thread of its own and waits for it a limited time.

    A system call on a file system that hangs cannot be interrupted, and its thread cannot be ended:
    it is left behind. As long as it hangs, further work at the same place is refused at once.
    """

    def __init__(self) -> None:
        self._hanging: dict[Path, threading.Thread] = {}

    def run(self, place: Path, work: Callable[[], object], *, timeout_s: float) -> None:
        """Do `work`, which may go on behind this if it takes longer than `timeout_s`.

        Args:
            place: What it works on; one piece of work at a time.
            work: Makes or removes folders.
            timeout_s: How long to wait.

        Raises:
            OSError: `work` has failed, or ETIMEDOUT: it, or work before it, has not come back.
        """
        before = self._hanging.get(place)
        if before is not None and before.is_alive():
            raise OSError(errno.ETIMEDOUT, "the storage hangs", str(place))
        failures: list[Exception] = []

        def do() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - raised by the one who waits
                failures.append(error)

        thread = threading.Thread(target=do, name="lowtide-checkpoint-errand", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            self._hanging[place] = thread
            text = f"no answer within {timeout_s:g} s: the storage hangs"
            raise OSError(errno.ETIMEDOUT, text, str(place))
        self._hanging.pop(place, None)
        if failures:
            raise failures[0]
