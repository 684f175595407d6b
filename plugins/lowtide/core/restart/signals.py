"""Signals that ask for a stop, for all listeners of this process at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

logger = logging.getLogger("lowtide")

Listener = Callable[[int], None]

# Slurm sends its warning to every process of a step. A child that was started by exec would die of
# it (exec turns handlers back into the default); one that inherits it as blocked does not care.
_BLOCKED = frozenset({signal.SIGUSR1, signal.SIGUSR2})


class SignalHub:
    """Calls every listener of a signal; the handlers of before come back with the last one."""

    def __init__(self) -> None:
        self._listeners: dict[int, list[Listener]] = {}
        self._previous: dict[int, Any] = {}
        self._interrupts = 0
        self._owner_pid = os.getpid()
        self._parked: threading.Thread | None = None
        self._is_over = threading.Event()

    def listen(self, numbers: Sequence[int], listener: Listener) -> bool:
        """Call `listener` with each of the signals `numbers`.

        Returns:
            Whether that is possible: handlers can be installed in the main thread only.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        self._owner_pid = os.getpid()
        for number in numbers:
            listeners = self._listeners.setdefault(number, [])
            if not listeners:
                self._previous[number] = signal.signal(number, self._handle)
            listeners.append(listener)
        self._block(bool(_BLOCKED & set(numbers)))
        return True

    def leave(self, listener: Listener) -> None:
        """Call `listener` no more. Outside the main thread handlers stay installed."""
        for number, listeners in list(self._listeners.items()):
            self._listeners[number] = [each for each in listeners if each != listener]
        if threading.current_thread() is not threading.main_thread():
            return
        for number in [n for n, listeners in self._listeners.items() if not listeners]:
            del self._listeners[number]
            signal.signal(number, self._previous.pop(number))
        if not self._listeners:
            self._interrupts = 0  # the next run of this process counts anew
        if self._parked is not None and not _BLOCKED & set(self._listeners):
            self._is_over.set()
            self._parked.join()
            self._parked = None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)

    def _block(self, is_wanted: bool) -> None:
        """Block them here, for children to inherit, and let them through in a parked thread."""
        if not is_wanted or self._parked is not None:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        self._is_over.clear()
        self._parked = threading.Thread(target=self._park, name="lowtide-signals", daemon=True)
        self._parked.start()

    def _park(self) -> None:
        # The kernel delivers to any thread that lets the signal through; Python then runs the
        # handler in the main thread.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        self._is_over.wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner_pid:  # a forked data loader: its own fate, as without us
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            previous = self._previous.get(number)
            if self._interrupts > 1 and callable(previous):
                previous(number, frame)  # the second Ctrl-C means now
        for listener in self._listeners.get(number, ()):
            listener(number)


hub = SignalHub()
