"""The checkpoint writers on bad disks, in wrong places, across forks and at the process's end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowtide.core.errors import CheckpointError
from tests.checkpoint.writer_cases import (
    EVER_S,
    ONE_OF_EACH,
    PAGE,
    WAYS,
    Way,
    finish,
    simple,
)

ROOT = Path(__file__).resolve().parents[2]
CC = shutil.which(os.environ.get("CC", "gcc"))
# The faults come through the C library, which io_uring does not use for writing.
THROUGH_LIBC = [way for way in WAYS if way.io == "threads"]

needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler on this machine")


class Worker:
    """The process whose children run the cases (see writer_worker.py)."""

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        environment = {**os.environ, "FAULT": ""}
        if CC is not None:
            library = folder / "disk_faults.so"
            source = Path(__file__).with_name("disk_faults.c")
            command = [CC, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
            subprocess.run(command, check=True, timeout=60)
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.writer_worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, way: Way, folder: Path, case: str, fault: str = "") -> dict[str, Any]:
        """Run a case; return what it saw. Where that matters, the interpreter ends as usual."""
        request = {
            "implementation": way.implementation,
            "io": way.io,
            "direct": way.direct,
            "folder": str(folder),
            "case": case,
            "fault": fault,
            "timeout_s": 90.0,
            "ends": case.split("_")[0] in ("hang", "exit", "fork"),
            "out": str(self._out),
            "err": str(self._err),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = json.loads(self._process.stdout.readline())["code"]
        assert (code, self._err.read_text()) == (0, "")
        seen: dict[str, Any] = json.loads(self._out.read_text().splitlines()[-1])
        return seen

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    made = Worker(tmp_path_factory.mktemp("worker"))
    yield made
    made.close()


@needs_compiler
@pytest.mark.parametrize("way", THROUGH_LIBC, ids=str)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("write_eio", r"faulty: cannot write the file: Input/output error .*dmesg"),
        ("sync_eio", r"faulty: cannot sync the file: Input/output error"),
        ("write_enospc", r"cannot write the file: No space left .*82024 bytes are wanted.*; free"),
        ("reserve_enospc", r"cannot reserve space for the file: No space left .*82024 bytes"),
        ("nothing", r"faulty: cannot write the file: Input/output error"),
    ],
)
def test_disk_error_fails_its_job_and_no_other(
    way: Way, tmp_path: Path, worker: Worker, fault: str, message: str
) -> None:
    seen = worker.run(way, tmp_path, "write_beside_a_good_job", fault)
    assert seen["is_durable"] is False
    assert re.search(message, seen["error"]), seen["error"]
    assert (seen["is_free"], seen["is_closed"], seen["open"]) == (True, True, [])


@needs_compiler
@pytest.mark.parametrize("way", THROUGH_LIBC, ids=str)
@pytest.mark.parametrize("fault", ["short", "eintr", "eagain", "reserve_unsupported"])
def test_write_that_is_cut_short_or_interrupted_is_continued(
    way: Way, tmp_path: Path, worker: Worker, fault: str
) -> None:
    seen = worker.run(way, tmp_path, "write_beside_a_good_job", fault)
    assert (seen["is_durable"], seen["error"], seen["is_closed"]) == (True, None, True)


@needs_compiler
@pytest.mark.parametrize("way", THROUGH_LIBC, ids=str)
def test_space_that_ends_below_a_guess_is_given_back(
    way: Way, tmp_path: Path, worker: Worker
) -> None:
    seen = worker.run(way, tmp_path, "grow_beside_a_guess", "reserve_partly")
    assert seen["size"] == 8 * PAGE
    assert seen["held"] < 16 * PAGE


@needs_compiler
@pytest.mark.parametrize("way", [way for way in THROUGH_LIBC if way.direct], ids=str)
def test_direct_write_that_is_refused_goes_through_the_page_cache(
    way: Way, tmp_path: Path, worker: Worker
) -> None:
    seen = worker.run(way, tmp_path, "write_beside_a_good_job", "direct_einval")
    assert (seen["is_durable"], seen["error"], seen["is_closed"]) == (True, None, True)
    if not seen["is_direct"]:  # whichever file came last
        assert "refuses direct writes" in seen["direct_reason"]


@needs_compiler
@pytest.mark.parametrize("way", [way for way in THROUGH_LIBC if way.direct], ids=str)
@pytest.mark.parametrize("fault", ["hang", "sync_hang"])
def test_disk_that_hangs_holds_up_neither_close_nor_exit(
    way: Way, tmp_path: Path, worker: Worker, fault: str
) -> None:
    seen = worker.run(way, tmp_path, "hang", fault)
    assert (seen["is_captured"], seen["is_durable"], seen["is_closed"]) == (True, False, False)
    assert seen["idle_s"] > 0.1
    assert seen["close_s"] < 30
    assert "cancelled" in seen["error"]
    worker.run(way, tmp_path, "hang_unclosed", fault)


@needs_compiler
def test_memory_in_a_write_that_hangs_is_never_given_back(tmp_path: Path, worker: Worker) -> None:
    way = Way("native", "threads", True)
    if way not in WAYS:
        pytest.skip("the writer in Python has no direct lane")
    seen = worker.run(way, tmp_path, "hang_in_direct_lane", "hang")
    assert seen == {"is_captured": False, "is_free": False, "is_closed": False, "abandoned": 1}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_file_larger_than_the_limit_says_what_to_raise(
    way: Way, tmp_path: Path, worker: Worker
) -> None:
    seen = worker.run(way, tmp_path, "limit_file_size")
    assert "File too large" in seen["error"]
    assert "ulimit -f" in seen["error"]
    assert (seen["is_free"], seen["is_closed"], seen["open"]) == (True, True, [])


@pytest.mark.parametrize("way", ONE_OF_EACH, ids=str)
def test_fork_leaves_the_parent_working_and_the_child_without_a_writer(
    way: Way, tmp_path: Path, worker: Worker
) -> None:
    assert worker.run(way, tmp_path, "fork") == {"codes": [7, 7, 7], "is_closed": True}


@pytest.mark.parametrize("way", ONE_OF_EACH, ids=str)
def test_interpreter_ends_in_the_middle_of_a_job(way: Way, tmp_path: Path, worker: Worker) -> None:
    worker.run(way, tmp_path, "exit_with_work")


@pytest.mark.parametrize("way", ONE_OF_EACH, ids=str)
def test_interpreter_ends_while_threads_wait(way: Way, tmp_path: Path, worker: Worker) -> None:
    for _ in range(5):  # it is a race
        worker.run(way, tmp_path, "exit_with_waiting_threads")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_place_that_cannot_be_written_is_named(way: Way, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    places = {
        tmp_path / "missing" / "file": r"missing/file: cannot open .*No such file.*create",
        tmp_path / "folder": r"folder: cannot open the file: Is a directory.*move it away",
        tmp_path / "file" / "file": r"cannot open the file: Not a directory.*another path",
        Path("/dev/full"): r"/dev/full: cannot write the file: No space left.*are wanted.*free",
    }
    if os.getuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        places[tmp_path / "locked" / "file"] = r"cannot open .*Permission denied.*writable"
    writer = way.open(slabs=2)
    for path, message in places.items():
        good = simple(tmp_path / "good", 3 * PAGE)
        drafts = [simple(path, 5 * PAGE), good]
        tickets = [writer.submit([draft.plan()]) for draft in drafts]
        assert not tickets[0].wait_durable(EVER_S)
        assert tickets[0].wait_captured(EVER_S)
        with pytest.raises(CheckpointError, match=message):
            tickets[0].results()
        good.check(finish(tickets[1])[0])
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_one_bad_file_fails_its_whole_job(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=2)
    drafts = [simple(tmp_path / "a", 50_000), simple(tmp_path / "no" / "b", 10)]
    ticket = writer.submit([draft.plan() for draft in [*drafts, simple(tmp_path / "c", 50_000)]])
    assert not ticket.wait_durable(EVER_S)
    assert "no/b: cannot open" in str(ticket.error)
    assert ticket.wait_captured(EVER_S)
    assert writer.close(timeout_s=EVER_S)
