"""The thread pool of the native code, in C++ under the sanitizers of the compiler."""

from __future__ import annotations

import pytest

from tests.helpers.sanitizers import needs_compiler, run_under_sanitizers


@needs_compiler
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_ranges_are_shared_without_races(sanitizers: str) -> None:
    # The thread sanitizer does not follow a process of several threads through a fork.
    arguments = ["no-fork"] if sanitizers == "thread" else []
    sources = ["csrc/common/thread_pool.cpp", "tests/csrc/test_thread_pool.cpp"]
    run_under_sanitizers(sanitizers, sources, arguments)
