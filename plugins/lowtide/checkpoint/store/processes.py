"""Whether a process of this machine still runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ENDED = ("Z", "X")  # states of processes that are only still listed


def is_running(pid: int, *, since_s: float) -> bool:
    """Tell whether process `pid` runs and did so at the time `since_s`."""
    if pid <= 0:
        return False  # to kill() these are groups of processes
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's, but there
    state, started_s = state_and_start(pid)
    # A zombie runs no more: nobody has asked yet how it ended. In a container that was started
    # again the same number is soon given to the next run.
    has_ended = state in _ENDED and not _has_other_threads(pid)
    return not has_ended and (started_s is None or started_s <= since_s + 1.0)


def _has_other_threads(pid: int) -> bool:
    """Tell whether threads of a process run on though its first one, which names it, has ended."""
    try:
        threads = [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # it has gone meanwhile
        return False
    return any(state_and_start(each)[0] not in ("", *_ENDED) for each in threads)


def state_and_start(pid: int) -> tuple[str, float | None]:
    """Return the letter of a process's or thread's state, and the Unix time of its start.

    "" and None where they cannot be known.
    """
    fields = _fields(pid)
    try:
        boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        ticks = os.sysconf("SC_CLK_TCK")
        return fields[0], None if boot is None else int(boot[1]) + int(fields[19]) / ticks
    except (OSError, ValueError, IndexError):
        return "", None


def start_ticks(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since the machine was, where known.

    A clock that is set meanwhile does not change it.
    """
    try:
        return int(_fields(pid)[19])
    except (ValueError, IndexError):
        return None


def _fields(pid: int) -> list[str]:
    """Return the fields of a process's ``stat`` from its state on; none where they are hidden."""
    try:
        # The name of the program, in brackets, may hold blanks and brackets itself.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []
