"""Builds a C++ test with the compiler's sanitizers and runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX", "g++"))
# GCC 12's own AVX-512 headers are what -Wmaybe-uninitialized finds fault with.
FLAGS = "-std=c++17 -O1 -g -DLOWTIDE_CHECKED -ffp-contract=off -Wall -Wextra -Werror -pthread"
FLAGS += " -Wno-maybe-uninitialized -Wno-uninitialized"

needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")


def run_under_sanitizers(
    sanitizers: str, sources: Sequence[str], arguments: Sequence[str] = ()
) -> None:
    """Fail with the output of the compiler or the program, if either fails.

    Args:
        sanitizers: What -fsanitize takes.
        sources: Files, relative to the repository.
        arguments: Of the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "program"))
        flags = [*FLAGS.split(), f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        command = [str(CXX), *flags, "-Icsrc", *sources, "-o", program]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
        )
        if "cannot find" in done.stderr:
            pytest.skip("no sanitizer runtime on this machine")
        assert done.returncode == 0, done.stderr
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=250, check=False
        )
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("this kernel's address randomization is beyond the thread sanitizer")
        assert done.returncode == 0, done.stderr
