"""Ctrl-C and `kill`: a flag while training, so that all ranks stop at the same step."""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_STOPPED = 130


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag, or into KeyboardInterrupt before training starts.

    The second Ctrl-C ends the process at once. SIGTERM is not counted with it, because the
    launcher sends one itself after the first Ctrl-C.
    """

    def __init__(self) -> None:
        self.is_set = False
        self.is_training = False
        self._interrupts = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(EXIT_STOPPED)
        if not self.is_training:
            raise KeyboardInterrupt
