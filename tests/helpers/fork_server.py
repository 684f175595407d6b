"""Starts rank processes from one that has imported PyTorch and DeepSpeed already.

A fresh interpreter needs some seconds for these imports and for DeepSpeed's look at the processor,
on every rank of every start. Here one process pays for them, and each rank is a fork of it, made
before there is any thread or process group. The worker then runs as the main module with its own
arguments, environment, folder and log, and ends as every interpreter does. Lowtide itself is not
imported beforehand: a worker imports it as a user's script would.

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


class ForkedProcess:
    """A process that the server forked; the part of `subprocess.Popen` that tests need."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("r", encoding="utf-8")
        self._connection = connection
        self.returncode: int | None = None
        self.pid = int(json.loads(self._lines.readline()))
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
        connection.connect(self._address)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return ForkedProcess(connection)

    def close(self) -> None:
        """End the server; processes it started are not touched."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


# --- the server's side


def _preload() -> None:
    importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # with the compiler
    from deepspeed.accelerator import get_accelerator

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
                sys.exit()
            if wake in sources:
                wake.recv(4096)
            _report_ended(running)
            if listener not in sources:
                continue
            connection, _ = listener.accept()
            request = json.loads(connection.makefile("r", encoding="utf-8").readline())
            pid = os.fork()
            with contextlib.suppress(OSError):  # both do it, and one of them first
                os.setpgid(pid, pid)
            if pid == 0:
                break
            connection.sendall(f"{pid}\n".encode())
            running[pid] = connection
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for each in (listener, wake, wakes, connection, *running.values()):
        each.close()
    return request


def _report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = running.pop(pid)
        with contextlib.suppress(OSError):  # nobody asks any more
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        connection.close()


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
