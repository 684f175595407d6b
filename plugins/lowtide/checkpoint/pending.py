"""Checkpoints whose bytes are still where the training has them, and who asks before that changes.

Used by the training thread. Two kinds of updates come to an end of it differently:

- Nobody has promised to ask before pieces of memory are overwritten: `wait` captures all that is
  left, and then the update begins.
- Somebody has (`StateAuthority.promise`): `begin_update` captures what is not promised, and the
  rest stays where it is until `release` names it, piece by piece, in the middle of the update.

An update that was not applied has overwritten nothing, and the rest goes on being copied during the
next forward and backward. After one that was applied nothing may be left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lowtide.checkpoint.saving import Saving
from lowtide.core.state import Memory


class Pending:
    """The `LiveReader` of a saver.

    Args:
        max_wait_s: Longest time that one update waits for one checkpoint, in all.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._savings: deque[Saving] = deque()  # oldest first

    def add(self, saving: Saving) -> None:
        """Take a checkpoint that was requested."""
        self._savings.append(saving)

    @property
    def is_reading(self) -> bool:
        """See `LiveReader.is_reading`."""
        return bool(self._savings)

    def wait(self) -> float:
        """Make sure that no memory of the model is needed any more.

        Returns:
            Seconds waited.
        """
        waited_s = self._ask_all(lambda saving: saving.wait_captured(self._max_wait_s))
        self._savings.clear()
        return waited_s

    def begin_update(self, promised: Memory) -> float:
        """Make sure that an update may begin whose owners ask before they overwrite `promised`.

        Returns:
            Seconds waited.
        """
        if not len(promised):
            return self.wait()
        return self._ask_all(lambda saving: saving.begin_update(promised, self._max_wait_s))

    def end_update(self, *, is_applied: bool) -> None:
        """Note that an update is over."""
        if is_applied:
            self.wait()
        for saving in self._savings:
            saving.end_update()

    def hurry(self, memory: Memory) -> None:
        """See `LiveReader.hurry`."""
        for saving in self._savings:
            saving.hurry(memory)

    def is_released(self, memory: Memory) -> bool:
        """See `LiveReader.is_released`."""
        return all(saving.is_released(memory) for saving in self._savings)

    def release(self, memory: Memory) -> None:
        """See `LiveReader.release`; a checkpoint that is too slow is given up."""
        self._ask_all(lambda saving: saving.release(memory))

    def _ask_all(self, ask: Callable[[Saving], None]) -> float:
        begin_s = now_s = time.perf_counter()
        for saving in list(self._savings):
            ask(saving)
            now_s, before_s = time.perf_counter(), now_s
            saving.add_wait(now_s - before_s)
            if saving.error is not None:
                self._savings.remove(saving)
        return now_s - begin_s
