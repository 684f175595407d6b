"""Start N ranks (or any command) with a hard timeout and collected logs.

Ranks have the launcher's environment, without torchrun's agent, and are forks of one process that
has imported what all of them need (see `tests.helpers.fork_server`). Every process lives in a
process group of its own and is killed with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.helpers.fork_server import ForkedProcess, ForkServer

REPOSITORY = Path(__file__).resolve().parents[2]
_GRACE_S = 15.0  # after one rank failed, how long the others get to notice it themselves


class _Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


@dataclass
class RankResult:
    """How a start ended: one exit code and one log per rank (a command counts as one rank)."""

    returncodes: list[int]
    logs: list[str]
    is_timed_out: bool = False
    seconds: float = 0.0
    results: list[Any] = field(default_factory=list)

    @property
    def returncode(self) -> int:
        """The first exit code that is not 0, else 0."""
        return next((code for code in self.returncodes if code != 0), 0)

    @property
    def log(self) -> str:
        """All logs, each under a heading."""
        return "\n".join(f"--- rank {i} ---\n{log}" for i, log in enumerate(self.logs))

    def check(self) -> RankResult:
        """Return self; raise with all logs when a rank failed or the time ran out."""
        if self.is_timed_out or self.returncode != 0:
            state = "timed out" if self.is_timed_out else f"exit codes {self.returncodes}"
            tails = "\n".join(f"--- {i} ---\n{log[-6000:]}" for i, log in enumerate(self.logs))
            raise AssertionError(f"{state} after {self.seconds:.0f} s\n{tails}")
        return self


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for child processes: CPU only, one thread, project-local op cache."""
    env = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env.setdefault("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    paths = [str(REPOSITORY / "plugins"), str(REPOSITORY)]
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    env.setdefault("OMP_NUM_THREADS", "1")
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONFAULTHANDLER"] = "1"
    env.update(extra or {})
    return env


def free_port() -> int:
    """Return a TCP port of the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    argv: Sequence[str],
    *,
    nproc: int = 2,
    timeout_s: float = 120.0,
) -> RankResult:
    """Run ``python argv...`` on `nproc` gloo ranks.

    A rank may leave a result for the test by calling `leave_result`.
    """
    with tempfile.TemporaryDirectory(prefix="lowtide-ranks-") as folder:
        shared = environment() | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
        }
        commands = [
            (
                argv,
                shared
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "LOWTIDE_TEST_RESULT": str(Path(folder) / f"result{rank}.json"),
                },
            )
            for rank in range(nproc)
        ]
        result = _run(_fork, commands, Path(folder), timeout_s)
        for rank in range(nproc):
            path = Path(folder) / f"result{rank}.json"
            result.results.append(json.loads(path.read_text()) if path.exists() else None)
        return result


def run_command(
    argv: Sequence[str],
    *,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> RankResult:
    """Run one command (torchrun, a shell script, the `lowtide` command) to its end."""
    with tempfile.TemporaryDirectory(prefix="lowtide-run-") as folder:
        return _run(_start, [(list(argv), environment(env))], Path(folder), timeout_s, cwd)


def leave_result(value: Any) -> None:
    """In a rank: leave `value` (JSON) for the test that called `run_ranks`."""
    Path(os.environ["LOWTIDE_TEST_RESULT"]).write_text(json.dumps(value), encoding="utf-8")


def kill_group(process: _Process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process started here and everything it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


_servers: list[ForkServer] = []  # the last one is in use


def _fork_server() -> ForkServer:
    if not _servers or not _servers[-1].is_alive:
        _servers.append(ForkServer(environment()))
    return _servers[-1]


def _fork(argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> ForkedProcess:
    return _fork_server().start(argv, env, cwd, log)


def _start(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path
) -> subprocess.Popen[bytes]:
    with open(log, "wb") as output:
        return subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _run(
    start: Callable[[Sequence[str], Mapping[str, str], Path, Path], _Process],
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
    folder: Path,
    timeout_s: float,
    cwd: Path | None = None,
) -> RankResult:
    begin_s = time.monotonic()
    processes: list[_Process] = []
    paths = [folder / f"log{i}.txt" for i in range(len(commands))]
    is_timed_out = False
    try:
        for (argv, env), path in zip(commands, paths, strict=True):
            processes.append(start(argv, env, cwd or REPOSITORY, path))
        deadline_s = begin_s + timeout_s
        while any(process.poll() is None for process in processes):
            now_s = time.monotonic()
            if now_s > deadline_s:
                is_timed_out = deadline_s == begin_s + timeout_s
                break
            if any(process.poll() not in (None, 0) for process in processes):
                deadline_s = min(deadline_s, now_s + _GRACE_S)
            time.sleep(0.05)
    finally:
        for process in processes:  # all of them, before a wait can fail
            kill_group(process)
        for process in processes:
            process.wait()
    return RankResult(
        returncodes=[process.wait() for process in processes],
        logs=[path.read_text(encoding="utf-8", errors="replace") for path in paths],
        is_timed_out=is_timed_out,
        seconds=time.monotonic() - begin_s,
    )
