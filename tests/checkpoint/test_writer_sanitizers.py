"""The native writer's threads under the sanitizers of the compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_threads_do_not_race_and_stay_in_bounds(tmp_path: Path, sanitizers: str) -> None:
    program = tmp_path / "test_writer"
    sources = [p for p in (CSRC / "checkpoint").glob("*.cpp") if p.name != "bind.cpp"]
    sources += [CSRC / "common/crc32.cpp", ROOT / "tests/csrc/test_writer.cpp"]
    flags = ["-std=c++17", "-O1", "-g", "-DLOWTIDE_CHECKED", "-Wall", "-Wextra", "-pthread"]
    flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-Werror"]
    command = [str(CXX), *flags, f"-I{CSRC}", *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    if "cannot find" in done.stderr:
        pytest.skip("no sanitizer runtime on this machine")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [str(program), str(tmp_path)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
