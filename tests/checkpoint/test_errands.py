"""Work on a file system that hangs: told in time, left behind, and not piled up."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from lowtide.checkpoint.errands import Errands

HERE, THERE = Path("here"), Path("there")
EVER = 30.0


def test_work_is_done_and_its_error_raised() -> None:
    errands, done = Errands(), list[int]()
    errands.run(HERE, lambda: done.append(1), timeout_s=EVER)
    assert done == [1]
    with pytest.raises(FileNotFoundError):
        errands.run(HERE, Path("/nowhere/at/all").mkdir, timeout_s=EVER)


def test_what_hangs_is_left_behind_and_nothing_follows_it_there() -> None:
    errands, answers, done = Errands(), threading.Event(), list[str]()
    ended = threading.Event()

    def hang() -> None:
        answers.wait(EVER)
        ended.set()

    try:
        with pytest.raises(OSError, match=r"no answer within 0\.05 s") as raised:
            errands.run(HERE, hang, timeout_s=0.05)
        assert raised.value.errno == errno.ETIMEDOUT
        with pytest.raises(OSError, match="the storage hangs"):
            errands.run(HERE, lambda: done.append("behind it"), timeout_s=EVER)
        errands.run(THERE, lambda: done.append("elsewhere"), timeout_s=EVER)
        assert done == ["elsewhere"]
        assert not ended.is_set()
    finally:
        answers.set()
    assert ended.wait(EVER)
    for thread in threading.enumerate():
        if thread.name == "lowtide-checkpoint-errand":
            thread.join(EVER)
    errands.run(HERE, lambda: done.append("again"), timeout_s=EVER)
    assert done == ["elsewhere", "again"]
