"""The checkpoint writers on bad disks, in wrong places, across forks and at the process's end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "disk_faults.so"
    source = Path(__file__).with_name("disk_faults.c")
    command = [str(CC), "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return library


def run(
    way: Way, folder: Path, case: str, *, shim: Path | None = None, fault: str = ""
) -> dict[str, Any]:
    """Run a case of the worker; return what it saw."""
    environment = {**os.environ, "FAULT": fault}
    if shim is not None:
        environment["LD_PRELOAD"] = str(shim)
    arguments = [way.implementation, way.io, "direct" if way.direct else "buffered"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.writer_worker", *arguments, str(folder), case],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


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
    way: Way, tmp_path: Path, shim: Path, fault: str, message: str
) -> None:
    seen = run(way, tmp_path, "write_beside_a_good_job", shim=shim, fault=fault)
    assert seen["is_durable"] is False
    assert re.search(message, seen["error"]), seen["error"]
    assert (seen["is_free"], seen["is_closed"], seen["open"]) == (True, True, [])


@needs_compiler
@pytest.mark.parametrize("way", THROUGH_LIBC, ids=str)
@pytest.mark.parametrize("fault", ["short", "eintr", "eagain", "reserve_unsupported"])
def test_write_that_is_cut_short_or_interrupted_is_continued(
    way: Way, tmp_path: Path, shim: Path, fault: str
) -> None:
    seen = run(way, tmp_path, "write_beside_a_good_job", shim=shim, fault=fault)
    assert (seen["is_durable"], seen["error"], seen["is_closed"]) == (True, None, True)


@needs_compiler
@pytest.mark.parametrize("way", [way for way in THROUGH_LIBC if way.direct], ids=str)
def test_direct_write_that_is_refused_goes_through_the_page_cache(
    way: Way, tmp_path: Path, shim: Path
) -> None:
    seen = run(way, tmp_path, "write_beside_a_good_job", shim=shim, fault="direct_einval")
    assert (seen["is_durable"], seen["error"], seen["is_closed"]) == (True, None, True)
    if not seen["is_direct"]:  # whichever file came last
        assert "refuses direct writes" in seen["direct_reason"]


@needs_compiler
@pytest.mark.parametrize("way", [way for way in THROUGH_LIBC if way.direct], ids=str)
@pytest.mark.parametrize("fault", ["hang", "sync_hang"])
def test_disk_that_hangs_holds_up_neither_close_nor_exit(
    way: Way, tmp_path: Path, shim: Path, fault: str
) -> None:
    seen = run(way, tmp_path, "hang", shim=shim, fault=fault)
    assert (seen["is_captured"], seen["is_durable"], seen["is_closed"]) == (True, False, False)
    assert seen["idle_s"] > 0.1
    assert seen["close_s"] < 30
    assert "cancelled" in seen["error"]
    run(way, tmp_path, "hang_unclosed", shim=shim, fault=fault)


@needs_compiler
def test_memory_in_a_write_that_hangs_is_never_given_back(tmp_path: Path, shim: Path) -> None:
    way = Way("native", "threads", True)
    if way not in WAYS:
        pytest.skip("the writer in Python has no direct lane")
    seen = run(way, tmp_path, "hang_in_direct_lane", shim=shim, fault="hang")
    assert seen == {"is_captured": False, "is_free": False, "is_closed": False, "abandoned": 1}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_file_larger_than_the_limit_says_what_to_raise(way: Way, tmp_path: Path) -> None:
    seen = run(way, tmp_path, "limit_file_size")
    assert "File too large" in seen["error"]
    assert "ulimit -f" in seen["error"]
    assert (seen["is_free"], seen["is_closed"], seen["open"]) == (True, True, [])


@pytest.mark.parametrize("way", ONE_OF_EACH, ids=str)
def test_fork_leaves_the_parent_working_and_the_child_without_a_writer(
    way: Way, tmp_path: Path
) -> None:
    assert run(way, tmp_path, "fork") == {"codes": [7, 7, 7], "is_closed": True}


@pytest.mark.parametrize("way", ONE_OF_EACH, ids=str)
def test_interpreter_ends_in_the_middle_of_a_job(way: Way, tmp_path: Path) -> None:
    run(way, tmp_path, "exit_with_work")


@pytest.mark.parametrize("way", ONE_OF_EACH, ids=str)
def test_interpreter_ends_while_threads_wait(way: Way, tmp_path: Path) -> None:
    for _ in range(5):  # it is a race
        run(way, tmp_path, "exit_with_waiting_threads")


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
