"""Starts the two processes of a sandbox, watches them, and ends them.

What holds where, and what does not hold without seccomp, is in docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lowtide.core.errors import DataError, SandboxError

_CHILD = Path(__file__).with_name("child.py")
_FENCE = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_RESULT_BYTES = 1 << 20
Isolation = Literal["required", "best_effort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What code under test may use.

    Attributes:
        cpu_s: Processor time of the solution.
        wall_s: Time of all, the start of the interpreters included.
        memory_bytes: Address space of each process.
        output_bytes: What may be printed; more ends the test.
    """

    cpu_s: int = 10
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    output_bytes: int = 1 << 16

    def __post_init__(self) -> None:
        if self.cpu_s < 1 or self.wall_s <= 0 or self.memory_bytes < 1 << 26:
            raise DataError(
                f"limits: got {self}; allowed are cpu_s of 1 or more, wall_s above 0 and "
                f"memory_bytes of {1 << 26} or more, which Python needs to start"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TestResult:
    """How a test ended.

    Attributes:
        is_passed: All tests ran and none failed.
        reason: Why not; empty for a pass.
        output: What was printed, as far as it may.
        layers: What held the solution, of "limits", "namespaces", "capabilities", "landlock" and
            "seccomp".
        duration_s: Wall time.
    """

    __test__ = False  # not one of pytest's

    is_passed: bool
    reason: str
    output: str
    layers: tuple[str, ...]
    duration_s: float


def code_in(output: str) -> str:
    """Return the last fenced block of Python in a model's answer, or all of the answer."""
    blocks = _FENCE.findall(output)
    return blocks[-1] if blocks else output


def run_tests(
    code: str,
    tests: str,
    *,
    functions: Sequence[str],
    limits: Limits | None = None,
    isolation: Isolation = "required",
) -> TestResult:
    """Run tests against code, each in a process of its own.

    The tests call the solution's functions by name; arguments and results are copied as plain
    values (numbers, text, bytes, None, lists, tuples, sets, dicts, numeric arrays). A top-level
    statement or a function ``test_*`` that raises is a failure; ``assert_close(found, wanted)``
    compares shapes and numbers.

    Args:
        code: Python source under test.
        tests: Python source that judges it.
        functions: Names that the tests call.
        limits: What may be used.
        isolation: "required" refuses to run where the kernel has no seccomp filter;
            "best_effort" runs with what there is.

    Raises:
        SandboxError: the machine cannot isolate as required, or the processes cannot start.
        DataError: a function's name is none.
    """
    bad = [name for name in functions if not name.isidentifier()]
    if bad or not functions:
        raise DataError(f"functions: got {list(functions)}, allowed are one or more names")
    held = limits or Limits()
    nonce = secrets.token_hex(16)
    common = {"limits": {"cpu_s": held.cpu_s, "memory_bytes": held.memory_bytes},
              "functions": list(functions)}  # fmt: skip
    required = ["seccomp"] if isolation == "required" else []
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lowtide-sandbox-") as folder, _Pair(folder) as pair:
        pair.start(common | {"code": code, "required": required},
                   common | {"tests": tests, "nonce": nonce})  # fmt: skip
        reason, raw, output = pair.watch(held, begin_s)
        found = _result(raw, nonce)
        if found is not None and found["missing"]:
            raise SandboxError(
                "this machine's kernel has no seccomp filter, without which code under test could "
                'start processes and write files; grade elsewhere, or set isolation "best_effort"'
            )
        if found is None:
            found = {"is_passed": False, "layers": [], "reason": reason or pair.ending()}
        elif not found["is_passed"] and found["reason"] == "solution: its process ended":
            found["reason"] += f": {pair.ending()}"
    return TestResult(
        is_passed=found["is_passed"], reason=found["reason"], output=output,
        layers=tuple(found["layers"]), duration_s=time.monotonic() - begin_s,
    )  # fmt: skip


def _result(raw: bytes, nonce: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(raw[4:])
        is_ours = hmac.compare_digest(str(found["nonce"]), nonce)
    except (ValueError, KeyError, TypeError):
        return None
    return found if is_ours else None


class _Pair:
    """The two processes and the pipes between them."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ours: list[int] = []

    def __enter__(self) -> _Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # all of its group, which is its own
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for end in self._ours:
            os.close(end)

    def start(self, solution: dict[str, Any], tests: dict[str, Any]) -> None:
        calls_in, calls_out = os.pipe()
        replies_in, replies_out = os.pipe()
        result_in, result_out = os.pipe()
        self._ours.append(result_in)
        theirs = (calls_in, calls_out, replies_in, replies_out, result_out)
        try:
            self._start("solution", solution, calls_in, replies_out)
            self._start("tests", tests, calls_out, replies_in, result_out)
        finally:
            for end in theirs:  # so that a process that ends is noticed by the other
                os.close(end)

    def _start(self, role: str, order: dict[str, Any], *channels: int) -> None:
        with tempfile.TemporaryFile() as file:  # it has no name: nobody else can open it
            file.write(json.dumps(order).encode())
            file.seek(0)
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-B", str(_CHILD), role, *map(str, channels)],
                    stdin=file, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    cwd=self._folder, env=_environment(self._folder), pass_fds=channels,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise SandboxError(f"the sandbox cannot start {sys.executable}: {error}") from error
        self._processes.append(process)

    def watch(self, limits: Limits, begin_s: float) -> tuple[str, bytes, str]:
        """Return why it was ended, if it was, the result as sent, and what was printed."""
        result, printed, reason = bytearray(), bytearray(), ""
        with selectors.DefaultSelector() as selector:
            selector.register(self._ours[0], selectors.EVENT_READ)
            for process in self._processes:
                selector.register(_stdout(process), selectors.EVENT_READ)
            while self._ours[0] in selector.get_map():
                left_s = begin_s + limits.wall_s - time.monotonic()
                if left_s <= 0:
                    reason = f"wall_s: not done after {limits.wall_s:g} s"
                    break
                for key, _ in selector.select(left_s):
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    (result if key.fd == self._ours[0] else printed).extend(data)
                if len(printed) > limits.output_bytes or len(result) > _RESULT_BYTES:
                    reason = f"output_bytes: more than {limits.output_bytes} bytes were printed"
                    result.clear()
                    break
        return reason, bytes(result), printed[: limits.output_bytes].decode(errors="replace")

    def ending(self) -> str:
        """Return how the solution's process ended, for people."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._processes[0].wait(timeout=2)
            if code < 0:
                hint = " (cpu_s)" if -code in (signal.SIGXCPU, signal.SIGKILL) else ""
                return f"signal {signal.Signals(-code).name}{hint}"
            return f"exit code {code}"
        return "no result"


def _stdout(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdout is None:
        raise SandboxError("the sandbox has no pipe for what is printed")
    return process.stdout


def _environment(folder: str) -> dict[str, str]:
    one_thread = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
    )
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, **one_thread}
