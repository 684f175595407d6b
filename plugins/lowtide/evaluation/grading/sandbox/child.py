"""What runs inside the sandbox: ``python -I -B child.py solution|tests CHANNEL...``.

Two processes, so that a pass cannot be forged: the solution runs in one and answers calls with
plain values; the tests, which nobody under test wrote, run in the other, and alone know the nonce
that a result must carry.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def _beside(name: str) -> Any:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_sandbox_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lockdown, seccomp, values = _beside("lockdown"), _beside("seccomp"), _beside("values")


class SolutionError(Exception):
    """The code under test raised, ended, or returned what cannot cross."""


def solution(calls: int, replies: int, order: dict[str, Any]) -> None:
    """Run the code under test and answer calls until nobody calls any more."""
    layers = lockdown.apply(order["limits"], seccomp)
    values.receive(calls)  # the tests are locked up before any code under test runs
    missing = sorted(set(order["required"]) - set(layers))
    values.send(replies, {"layers": layers, "missing": missing})
    if missing:
        return
    scope: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(order["code"], "solution.py", "exec"), scope)
    except BaseException as error:  # noqa: BLE001 - SystemExit as well: it is a failure here
        values.send(replies, {"error": _last_line(error)})
        return
    values.send(replies, {"missing": [n for n in order["functions"] if not callable(scope.get(n))]})
    while True:
        try:
            call = values.receive(calls)
        except EOFError:
            return
        try:
            arguments = [values.unpack(each) for each in call["arguments"]]
            keywords = {name: values.unpack(each) for name, each in call["keywords"].items()}
            answer = {"value": values.pack(scope[call["function"]](*arguments, **keywords))}
        except BaseException as error:  # noqa: BLE001
            answer = {"error": _last_line(error)}
        values.send(replies, answer)


def tests(calls: int, replies: int, result: int, order: dict[str, Any]) -> None:
    """Run the tests and send one result with the nonce."""
    lockdown.apply(order["limits"], seccomp)
    found = {"is_passed": False, "reason": "", "layers": [], "missing": []}
    try:
        values.send(calls, "go")
        hello = values.receive(replies)
        found |= {"layers": hello["layers"], "missing": hello["missing"]}
        if not hello["missing"]:
            loaded = values.receive(replies)
            if "error" in loaded:
                raise SolutionError(f"solution: {loaded['error']}")
            if loaded["missing"]:
                raise SolutionError(f"solution: no function {', '.join(loaded['missing'])}")
            _run(order["tests"], {n: _Proxy(n, calls, replies) for n in order["functions"]})
            found["is_passed"] = True
    except EOFError:
        found["reason"] = "solution: its process ended"
    except BaseException as error:  # noqa: BLE001
        found["reason"] = _where(error, order["tests"])
    values.send(result, {"nonce": order["nonce"], **found})


def _run(text: str, scope: dict[str, Any]) -> None:
    scope |= {"__name__": "tests", "assert_close": assert_close, "SolutionError": SolutionError}
    exec(compile(text, "tests.py", "exec"), scope)
    for name, value in list(scope.items()):
        if name.startswith("test_") and callable(value) and not isinstance(value, _Proxy):
            value()


class _Proxy:
    """A function of the solution, seen from the tests."""

    def __init__(self, name: str, calls: int, replies: int) -> None:
        self._name, self._calls, self._replies = name, calls, replies

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        packed = [values.pack(each) for each in arguments]
        named = {name: values.pack(each) for name, each in keywords.items()}
        call = {"function": self._name, "arguments": packed, "keywords": named}
        try:
            values.send(self._calls, call)
            answer = values.receive(self._replies)
        except BrokenPipeError:
            raise EOFError from None
        if not isinstance(answer, dict) or "value" not in answer:
            said = answer.get("error") if isinstance(answer, dict) else answer
            raise SolutionError(f"{self._name}: {str(said)[:500]}")
        return values.unpack(answer["value"])


def assert_close(found: Any, wanted: Any, *, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    """Fail unless `found` has the shape of `wanted` and its numbers, within a tolerance."""
    import numpy as np

    one, other = np.asarray(found), np.asarray(wanted)
    if one.shape != other.shape:
        raise AssertionError(f"shape {one.shape}, wanted {other.shape}")
    if not np.allclose(one, other, rtol=rtol, atol=atol, equal_nan=True):
        raise AssertionError(f"{one.tolist()!r:.200}, wanted {other.tolist()!r:.200}")


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _where(error: BaseException, text: str) -> str:
    lines = text.splitlines()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == "tests.py" and frame.lineno and frame.lineno <= len(lines):
            return f"line {frame.lineno}: {lines[frame.lineno - 1].strip()}: {_last_line(error)}"
    return _last_line(error)


def main() -> None:
    """Read the order from stdin and work on it."""
    role, *ends = sys.argv[1:]
    channels = [int(end) for end in ends]
    order = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    del sys.argv[1:]
    if role == "solution":
        solution(channels[0], channels[1], order)
    else:
        tests(channels[0], channels[1], channels[2], order)


if __name__ == "__main__":
    main()
