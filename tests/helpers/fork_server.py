"""Starts rank processes from one that has imported PyTorch and DeepSpeed already.

A fresh interpreter needs some seconds for these imports and for DeepSpeed's look at the processor,
on every rank of every start. Here one process pays for them, and each rank is a fork of it, made
before there is any thread or process group. The worker then runs as the main module with its own
arguments, environment, folder and log, and ends as every interpreter does. Lowtide itself is not
imported beforehand: a worker imports it as a user's script would.

A rank lasts no longer than those who wait for it: the server kills its process group when its test
goes away without having waited for the end, and all groups when the tests' process ends.

Tests of what fresh interpreters and launchers do (torchrun, `lowtide.run`, first imports) start
those instead.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any

_WAKE_S = 60.0
START_S = 300.0  # for the first rank: with the server's own imports, on a busy machine


class ForkedProcess:
    """A process that the server forked; the part of `subprocess.Popen` that tests need."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(START_S)
        self._lines = connection.makefile("r", encoding="utf-8")
        self._connection = connection
        self.returncode: int | None = None
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the fork server ended before it had started a process")
        self.pid = int(json.loads(line))
        connection.setblocking(False)

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._connection, selectors.EVENT_READ)
                if ready.select(0):
                    self._end()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        if self.returncode is None:
            self._end()
        assert self.returncode is not None
        return self.returncode

    def _end(self) -> None:
        self._connection.setblocking(True)
        line = self._lines.readline()
        self._lines.close()
        self._connection.close()
        if not line:
            raise RuntimeError("the fork server ended before its process")
        self.returncode = int(json.loads(line))


class ForkServer:
    """The server process, seen from the tests."""

    def __init__(self, env: Mapping[str, str]) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # Linux chooses a name that is no file
            listener.listen(64)
            self._address = listener.getsockname()
            # It ends when its standard input does, so it cannot outlive this process.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.fork_server", str(listener.fileno())],
                env=dict(env),
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        """Whether it can start processes."""
        return self._process.poll() is None

    def start(
        self, arguments: Sequence[str], env: Mapping[str, str], folder: Path, log: Path
    ) -> ForkedProcess:
        """Run ``python arguments...`` in a process group of its own, both outputs in `log`."""
        request = {
            "arguments": list(arguments),
            "env": dict(env),
            "folder": str(folder),
            "log": str(log),
        }
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(START_S)
            connection.connect(self._address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            return ForkedProcess(connection)
        except BaseException:  # also a test's time-out; the server sees that nobody waits
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            raise

    def close(self) -> None:
        """End the server and all that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:  # still in its imports
            self._process.kill()
            self._process.wait()


# --- the server's side


def _preload() -> None:
    importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # with the compiler
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on processors where oneDNN has no fast way for it. Torch computes in
    # it everywhere, only slower, and what the tests compare does not depend on how.
    get_accelerator().is_fp16_supported = lambda: True  # type: ignore[method-assign]

    for name in ("CPUAdamBuilder", "ShareMemCommBuilder"):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None:
            builder.load(verbose=False)
    import cpuinfo

    facts = cpuinfo.get_cpu_info()  # a second, and DeepSpeed asks for each CPUAdam
    cpuinfo.get_cpu_info = lambda: facts


def _serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a process per request until standard input ends; return the request in each of them."""
    running: dict[int, socket.socket] = {}
    wake, wakes = socket.socketpair()
    for end in (wake, wakes):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    with selectors.DefaultSelector() as ready:
        for source in (listener, wake, sys.stdin):
            ready.register(source, selectors.EVENT_READ)
        while True:
            sources = [key.fileobj for key, _ in ready.select(_WAKE_S)]
            if sys.stdin in sources:
                for pid in running:
                    _kill(pid)
                sys.exit()
            if wake in sources:
                wake.recv(4096)
            for pid in _report_ended(running):
                ready.unregister(running[pid])
                running.pop(pid).close()
            for pid, connection in running.items():
                if connection in sources:  # nothing is ever sent here: its test is gone
                    _kill(pid)
            if listener not in sources:
                continue
            connection, _ = listener.accept()
            request = _requested(connection)
            if request is None:
                connection.close()
                continue
            pid = os.fork()
            with contextlib.suppress(OSError):  # both do it, and one of them first
                os.setpgid(pid, pid)
            if pid == 0:
                break
            with contextlib.suppress(OSError):  # gone: seen at the next turn
                connection.sendall(f"{pid}\n".encode())
            running[pid] = connection
            ready.register(connection, selectors.EVENT_READ)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in (listener, wake, wakes, connection, *running.values()):
        each.close()
    return request


def _requested(connection: socket.socket) -> dict[str, Any] | None:
    """Return what a test asks for, None: it has gone since, or said nothing that makes sense."""
    try:
        connection.settimeout(10.0)
        request = json.loads(connection.makefile("r", encoding="utf-8").readline())
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            if not connection.recv(1, socket.MSG_PEEK):
                return None
        connection.setblocking(True)
    except (OSError, ValueError):
        return None
    return request


def _kill(pid: int) -> None:
    """Kill a process that has not been waited for, so that the number is its own, and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _report_ended(running: Mapping[int, socket.socket]) -> list[int]:
    """Tell the tests which of their processes have ended, and return these."""
    ended: list[int] = []
    while len(ended) < len(running):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            break
        with contextlib.suppress(OSError):  # nobody asks any more
            running[pid].sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        ended.append(pid)
    return ended


def _become(request: Mapping[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
    """Make this process look as if ``python arguments...`` had started it."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    with open(request["log"], "ab") as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    first, *rest = request["arguments"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if first == "-m":
        name, *rest = rest
        sys.path[0] = request["folder"]
        spec = importlib.util.find_spec(name)
        if spec is None or not isinstance(spec.loader, InspectLoader):
            raise ModuleNotFoundError(f"no module {name}")
        code = spec.loader.get_code(name)
        main.__spec__, main.__file__ = spec, spec.origin
    else:
        sys.path[0] = str(Path(first).resolve().parent)
        code = compile(Path(first).read_bytes(), first, "exec")
        main.__file__ = first
    assert isinstance(code, types.CodeType)
    sys.argv = [str(main.__file__), *rest]
    return code, main.__dict__


if __name__ == "__main__":
    _preload()
    gc.collect()
    gc.freeze()  # the forks share these pages
    with socket.socket(fileno=int(sys.argv[1])) as _listener:
        _request = _serve(_listener)
    _code, _globals = _become(_request)
    exec(_code, _globals)
