"""The helpers that start ranks: nothing outlives its test, and one bad start is nobody else's."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ranks

WAIT_S = 20.0
SLEEPS = "import os, pathlib, sys, time\nif os.fork() == 0:\n    time.sleep(300)\ntime.sleep(300)\n"


def ends(pid: int) -> bool:
    """Return whether a process group, zombies left out, ends within some seconds."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        found = subprocess.check_output(["ps", "-eo", "pgid=,stat="], text=True)
        states = [state for group, state in map(str.split, found.splitlines()) if group == str(pid)]
        if all(state.startswith("Z") for state in states):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.dist
def test_the_fork_server_outlives_clients_that_go_away(tmp_path: Path) -> None:
    server = ranks._fork_server()
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEPS)
    for words in (b"", b"no request\n", b'{"arguments": 3'):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(server._address)
            other.sendall(words)
    left = server.start([str(script)], ranks.environment(), tmp_path, tmp_path / "log")
    assert left.poll() is None
    left._lines.close()
    left._connection.close()  # as when a test's time-out has struck
    assert ends(left.pid), "nobody would ever end it"
    script.write_text("import sys; sys.exit(5)")
    again = server.start([str(script)], ranks.environment(), tmp_path, tmp_path / "log")
    assert again.wait() == 5
    assert server.is_alive


@pytest.mark.dist
def test_a_dead_fork_server_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        is_alive = False

    made = object()
    monkeypatch.setattr(ranks, "_servers", [Dead()])
    monkeypatch.setattr(ranks, "ForkServer", lambda _env: made)
    assert ranks._fork_server() is made


def test_all_ranks_are_killed_although_one_cannot_be_waited_for(tmp_path: Path) -> None:
    started: list[Any] = []

    class Lost(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            super().wait(timeout)
            raise RuntimeError("the fork server ended before its process")

    def start(*_request: Any) -> Any:
        kind = subprocess.Popen if started else Lost
        command = [sys.executable, "-c", "import time; time.sleep(300)"]
        started.append(kind(command, start_new_session=True))
        return started[-1]

    with pytest.raises(RuntimeError, match="fork server"):
        ranks._run(start, [([], {}), ([], {})], tmp_path, 0.2)
    try:
        assert [subprocess.Popen.wait(each, WAIT_S) for each in started] == [-signal.SIGKILL] * 2
    finally:
        for each in started:
            ranks.kill_group(each)
