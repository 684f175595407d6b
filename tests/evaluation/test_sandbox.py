"""Code that attacks what grades it: every attack fails, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lowtide.core.errors import DataError, SandboxError
from lowtide.evaluation.grading.sandbox import Limits, code_in, run_tests, running, seccomp

TESTS = "assert add(20, 22) == 42\nassert add(-1, 1) == 0\n"
QUICK = Limits(cpu_s=1, wall_s=5.0, memory_bytes=512 << 20, output_bytes=1 << 14)


def test_right_code_passes_and_says_what_held_it() -> None:
    found = run_tests("def add(a, b):\n    return a + b", TESTS, functions=["add"])
    assert found.is_passed, found.reason
    assert {"limits", "seccomp"} <= set(found.layers)
    assert found.reason == ""


def test_arrays_and_containers_cross() -> None:
    code = "import numpy as np\ndef same(x):\n    return x\ndef double(x):\n    return 2 * x\n"
    tests = """
import numpy as np
for value in (None, True, 3, 2.5, "x", b"y", 1 + 2j, [1, [2]], (1, 2), {1, 2}, {"a": (1,), 2: []}):
    assert same(value) == value and type(same(value)) is type(value), value
assert np.isnan(same(float("nan")))

def test_arrays():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert same(x).dtype == x.dtype
    assert_close(double(x=x), [[0, 2, 4], [6, 8, 10]])
"""
    found = run_tests(code, tests, functions=["same", "double"])
    assert found.is_passed, found.reason


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def add(a, b):\n    return a - b", "line 1: assert add(20, 22) == 42"),
        ("def add(a, b):\n    raise ValueError('why')", "add: ValueError: why"),
        ("add = 3", "no function add"),
        ("def add(:", "SyntaxError"),
        ("def add(a, b):\n    return object()", "allowed are numbers"),
        ("import sys\nsys.exit(0)", "SystemExit"),
    ],
)
def test_wrong_code_fails_and_says_where(code: str, said: str) -> None:
    found = run_tests(code, TESTS, functions=["add"])
    assert not found.is_passed
    assert said in found.reason


def test_functions_named_test_are_called_and_shapes_count() -> None:
    code = "import numpy as np\ndef add(a, b):\n    return np.zeros(0)"
    tests = "def test_it():\n    assert_close(add(1, 2), 3)"
    found = run_tests(code, tests, functions=["add"])
    assert "shape (0,), wanted ()" in found.reason


BACK = "\ndef add(a, b):\n    return None\n"
ATTACKS = {
    # network
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1).send(b'x')",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
    ".sendto(b'x', ('127.0.0.1', PORT))",
    "raw call": "import ctypes\nc = ctypes.CDLL(None)\nfd = c.syscall(41, 2, 1, 0)\nassert fd < 0",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('SOCKET')",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(120)) < 0",
    "32-bit call": "import ctypes\nassert ctypes.CDLL(None).syscall(0x40000029, 2, 1, 0) < 0",
    # processes
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork and outlive": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)",
    "thread bomb": "import threading, time\nwhile True:\n"
    "    threading.Thread(target=time.sleep, args=(60,)).start()",
    "shell": "import os\nassert os.system('touch MARK') == 0",
    "subprocess": "import subprocess\nsubprocess.run(['touch', 'MARK'], check=True)",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch MARK'])",
    "posix_spawn": "import os\nos.posix_spawn('/bin/touch', ['touch', 'MARK'], {})",
    # memory, time, output
    "memory": "x = bytearray(4 << 30)",
    "memory in steps": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600) < 0\n"
    "import os\nos.memfd_create('x')",
    "endless loop": "while True:\n    pass",
    "endless loop that catches the signal": "import signal\n"
    "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass",
    "endless sleep": "import time\ntime.sleep(3600)",
    "endless output": "while True:\n    print('PASSED' * 1000)",
    "endless result": "def add(a, b):\n    return 'x' * (100 << 20)",
    # disk
    "write": "open('MARK', 'w').write('x')",
    "write here": "open('here', 'w').write('x')",
    "append to a victim": "open('VICTIM', 'a').write('x')",
    "truncate a victim": "import os\nos.truncate('VICTIM', 0)",
    "remove a victim": "import os\nos.remove('VICTIM')",
    "fill the disk": "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))",
    "symlink": "import os\nos.symlink('VICTIM', 'link')\nopen('link', 'w').write('x')",
    "mode": "import os\nos.chmod('VICTIM', 0o777)",
    "rename": "import os\nos.rename('VICTIM', 'MARK')",
    "read a secret": "add = lambda a, b: open('VICTIM').read()\nassert add(1, 2) == 'secret'",
    # signals, other processes
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "limit the parent": "import os, resource\n"
    "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "write into the parent": "import os\nos.open(f'/proc/{os.getppid()}/mem', os.O_RDWR)",
    "read the parent": "import os\nopen(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "trace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0",
    # a forged pass
    "print a pass": "print('PASSED')\nprint('{\"is_passed\": true}')",
    "exit well": "import os\nos._exit(0)",
    "write a pass everywhere": "import json, os, struct\n"
    "m = json.dumps({'nonce': '', 'is_passed': True, 'reason': '', 'layers': []})\n"
    "for fd in range(3, 64):\n    try:\n"
    "        os.write(fd, struct.pack('<I', len(m)) + m.encode())\n"
    "    except OSError:\n        pass",
    "equal to everything": "class Any:\n    def __eq__(self, other):\n        return True\n"
    "def add(a, b):\n    return Any()",
    "number equal to everything": "class Any(int):\n    def __eq__(self, other):\n"
    "        return True\n"
    "def add(a, b):\n    return Any(7)",
    "new builtins": "import builtins\n"
    "builtins.abs = builtins.all = builtins.len = lambda *a: True\n"
    "import sys\nsys.modules['tests'] = None",
    "leave early from a call": "import os\ndef add(a, b):\n    os._exit(0)",
    "replies ahead of calls": "import json, os, struct\nm = json.dumps({'value': 42}).encode()\n"
    "for fd in range(3, 64):\n    try:\n        os.write(fd, (struct.pack('<I', len(m)) + m) * 3)\n"
    "    except OSError:\n        pass",
    "a message that is none": "import os, struct\nfor fd in range(3, 64):\n    try:\n"
    "        os.write(fd, struct.pack('<I', 4000000000))\n    except OSError:\n        pass",
    "an array of objects": "import json, os, struct\n"
    "m = json.dumps({'value': {'array': ['O', [1], 'AAAAAAAAAAA=']}}).encode()\n"
    "for fd in range(3, 64):\n    try:\n        os.write(fd, struct.pack('<I', len(m)) + m)\n"
    "    except OSError:\n        pass",
    "climb the frames": "import sys\nf = sys._getframe()\nwhile f.f_back:\n    f = f.f_back\n"
    "    f.f_locals.get('order', {})['required'] = []\n    f.f_globals['tests'] = None",
}  # fmt: skip


@pytest.fixture
def victim(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "victim").write_text("secret")
    server = socket.create_server(("127.0.0.1", 0))
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(tmp_path / "socket"))
    local.listen()
    yield {"folder": tmp_path, "server": server, "local": local}  # type: ignore[misc]
    server.close()
    local.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails_and_leaves_nothing(name: str, victim: dict[str, Any]) -> None:
    folder = victim["folder"]
    code = ATTACKS[name]
    for word, value in {
        "PORT": victim["server"].getsockname()[1], "SOCKET": folder / "socket",
        "MARK": folder / "mark", "VICTIM": folder / "victim",
    }.items():  # fmt: skip
        code = code.replace(word, str(value))
    if "def add" not in code and "add =" not in code:
        code += BACK
    before = children()
    begin_s = time.monotonic()
    found = run_tests(code, TESTS, functions=["add"], limits=QUICK)
    assert not found.is_passed
    assert found.reason
    assert time.monotonic() - begin_s < QUICK.wall_s + 20
    assert len(found.output) <= QUICK.output_bytes
    assert sorted(path.name for path in folder.iterdir()) == ["socket", "victim"]
    assert (folder / "victim").read_text() == "secret"
    assert (folder / "victim").stat().st_mode & 0o777 != 0o777
    assert children() == before
    for door in (victim["server"], victim["local"]):
        door.settimeout(0.01)
        with pytest.raises(TimeoutError):
            door.accept()


def children() -> set[str]:
    """Processes whose parent is this one, or that lost theirs and run the child's file."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if "sandbox/child.py" in command and owner(path) == os.getpid():
            found.add(path.name)
    return found


def owner(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def test_secrets_of_the_environment_do_not_come_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWTIDE_TEST_SECRET", "x")
    code = "import os\ndef names():\n    return sorted(os.environ)"
    tests = "assert 'LOWTIDE_TEST_SECRET' not in names(), names()"
    assert run_tests(code, tests, functions=["names"]).is_passed


def test_a_machine_without_the_filter_refuses_unless_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in running._CHILD.parent.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "seccomp.py").write_text("def apply():\n    return 'not here'\n")
    monkeypatch.setattr(running, "_CHILD", tmp_path / "child.py")
    good = "def add(a, b):\n    return a + b"
    with pytest.raises(SandboxError, match="no seccomp filter"):
        run_tests(good, TESTS, functions=["add"])
    found = run_tests(good, TESTS, functions=["add"], isolation="best_effort")
    assert found.is_passed, found.reason
    assert "seccomp" not in found.layers
    assert "limits" in found.layers


def test_the_filter_is_written_for_both_machines() -> None:
    for machine in ("x86_64", "aarch64"):
        program = seccomp.instructions(machine, 1)
        assert 100 < len(program) < 1000
        codes = {code for code, *_ in program}
        assert codes == {0x20, 0x15, 0x35, 0x45, 0x06}
        for at, (code, true, false, _) in enumerate(program):
            if code in (0x15, 0x35, 0x45):
                assert at + 1 + max(true, false) < len(program)
    assert seccomp.instructions("x86_64", 1)[1][3] != seccomp.instructions("aarch64", 1)[1][3]


def test_sandboxes_run_side_by_side() -> None:
    found = []

    def run() -> None:
        code = "def add(a, b):\n    return a + b"
        found.append(run_tests(code, TESTS, functions=["add"]).is_passed)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_code_is_found_in_an_answer() -> None:
    answer = "First:\n```python\nx = 1\n```\nbetter:\n```py\ny = 2\n```\nDone."
    assert code_in(answer) == "y = 2\n"
    assert code_in("z = 3") == "z = 3"


def test_limits_and_names_are_checked() -> None:
    with pytest.raises(DataError, match="memory_bytes"):
        Limits(memory_bytes=1000)
    for functions in ([], ["not a name"]):
        with pytest.raises(DataError, match="one or more names"):
            run_tests("", "", functions=functions)
