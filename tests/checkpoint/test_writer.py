"""The checkpoint writers, native and in Python: what they write, and when memory is free again."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowtide.checkpoint.writer import open_writer
from lowtide.checkpoint.writer.plan import FilePlan
from lowtide.checkpoint.writer.python_file import File
from lowtide.checkpoint.writer.python_writer import PythonWriter
from lowtide.core import native
from lowtide.core.errors import CheckpointError
from tests.checkpoint.writer_cases import (
    EVER_S,
    ONE_OF_EACH,
    PAGE,
    WAYS,
    Draft,
    Way,
    aligned_array,
    finish,
    random_draft,
    simple,
)
from tests.helpers.plugin_suite import open_files, resident_bytes

SLOW = 400_000.0  # bytes per second: a job is captured long before it is written
EDGES = [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 5 * PAGE, 23456]


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.fixture(params=ONE_OF_EACH, ids=str)
def direct_way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


@pytest.mark.parametrize("chunk_bytes", [PAGE, 4 * PAGE])
def test_files_are_as_planned_when_plans_are_random(
    way: Way, tmp_path: Path, chunk_bytes: int
) -> None:
    writer = way.open(chunk_bytes=chunk_bytes)
    for seed in range(12):
        drafts = [random_draft(tmp_path / f"{seed}.{i}", seed + 100 * i) for i in range(3)]
        results = finish(writer.submit([draft.plan() for draft in drafts]))
        for draft, crc32 in zip(drafts, results, strict=True):
            draft.check(crc32, chunk_bytes)
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize("chunk_bytes", [PAGE, 2 * PAGE])
def test_files_are_as_planned_around_ends_of_pages_and_chunks(
    way: Way, tmp_path: Path, chunk_bytes: int
) -> None:
    writer = way.open(chunk_bytes=chunk_bytes)
    drafts = [simple(tmp_path / f"{size}", size, size) for size in EDGES]
    for size in EDGES:  # with a header, so that the entry begins anywhere
        draft = Draft(tmp_path / f"head{size}").literal(b"h" * (size % 997 + 1))
        drafts.append(draft.entry(0, os.urandom(size)).patch(0).literal(b"t"))
    results = finish(writer.submit([draft.plan() for draft in drafts]))
    for draft, crc32 in zip(drafts, results, strict=True):
        draft.check(crc32, chunk_bytes)
    assert writer.close(timeout_s=EVER_S)


def test_an_old_file_is_not_written_over(way: Way, tmp_path: Path) -> None:
    # A write of a job that has failed may still be under way: it must not end in the next file.
    path = tmp_path / "again"
    path.write_bytes(b"of the job before")
    writer = way.open()
    with open(path, "rb") as before:
        draft = simple(path, 3 * PAGE + 5)
        finish(writer.submit([draft.plan()]))
        assert before.read() == b"of the job before"
    assert path.stat().st_size == 3 * PAGE + 5
    assert writer.close(timeout_s=EVER_S)


def test_checksum_is_whole_when_chunks_and_pieces_cut_it(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    drafts = []
    for size in range(PAGE - 9, PAGE + 2):
        draft = Draft(tmp_path / f"{size}").entry(0, b"e" * 5).literal(b"-" * (size - 5))
        drafts.append(draft.patch(0, b"", b"t"))
    split = Draft(tmp_path / "split").entry(0, b"data")
    split.patch(0, b"ab", b"cd")
    offset, length, place, entry = split.pieces.pop()  # one piece for each byte of the literal
    split.pieces += [(offset + i, 1, place + i, entry) for i in range(length)]
    drafts.append(split)
    results = finish(writer.submit([draft.plan() for draft in drafts]))
    for draft, crc32 in zip(drafts, results, strict=True):
        draft.check(crc32)
    assert writer.close(timeout_s=EVER_S)


def test_empty_files_and_empty_jobs_are_durable(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    empty = Draft(tmp_path / "empty")
    last = simple(tmp_path / "one", 1)
    for drafts in ([], [empty], [Draft(tmp_path / "first"), last, empty]):
        results = finish(writer.submit([draft.plan() for draft in drafts]))
        for draft, crc32 in zip(drafts, results, strict=True):
            draft.check(crc32)
    assert writer.close(timeout_s=EVER_S)


def test_older_file_of_that_name_is_replaced_as_a_whole(way: Way, tmp_path: Path) -> None:
    draft = simple(tmp_path / "file", 5000)
    draft.path.write_bytes(b"old" * 50_000)
    writer = way.open()
    finish(writer.submit([draft.plan()]))
    draft.check()
    assert writer.close(timeout_s=EVER_S)


def test_job_may_be_larger_than_the_buffer(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=2)
    drafts = [simple(tmp_path / "a", 300_000, 1), random_draft(tmp_path / "b", 2)]
    results = finish(writer.submit([draft.plan() for draft in drafts]))
    for draft, crc32 in zip(drafts, results, strict=True):
        draft.check(crc32)
    assert writer.close(timeout_s=EVER_S)


def test_many_more_files_than_are_open_at_once(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=300)
    drafts = [simple(tmp_path / f"{i}", 100 + i, i) for i in range(200)]
    results = finish(writer.submit([draft.plan() for draft in drafts]))
    for draft, crc32 in zip(drafts, results, strict=True):
        draft.check(crc32)
    assert writer.close(timeout_s=EVER_S)


def test_jobs_from_several_threads_do_not_mix(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=3)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(6):
                drafts = [random_draft(tmp_path / f"{number}.{i}.{k}", i + k) for k in range(2)]
                results = finish(writer.submit([draft.plan() for draft in drafts]))
                for draft, crc32 in zip(drafts, results, strict=True):
                    draft.check(crc32)
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert writer.close(timeout_s=EVER_S)


def test_memory_may_change_once_it_is_captured(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=64, bytes_per_s=SLOW)
    drafts = [simple(tmp_path / "a", 100_000, 1), simple(tmp_path / "b", 50_000, 2)]
    tickets = [writer.submit([draft.plan()]) for draft in drafts]
    assert all(ticket.wait_captured(EVER_S) and ticket.is_captured for ticket in tickets)
    assert not tickets[1].is_durable
    for draft in drafts:
        draft.arrays[0][:] = 0
    for draft, ticket in zip(drafts, tickets, strict=True):
        draft.check(finish(ticket)[0])
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize("io", ["io_uring", "threads"])
def test_full_buffer_does_not_stop_chunks_that_lie_as_direct_io_needs_them(
    io: str, tmp_path: Path
) -> None:
    if not native.status().available:
        pytest.skip("the writer in Python has no direct lane")
    header = 100
    array = aligned_array(100 * PAGE + 50, header)
    draft = Draft(tmp_path / "file").literal(b"h" * header).entry(0, array).patch(0)
    draft.entry(1, b"x" * 3 * PAGE).patch(1)  # one that does not lie so
    writer = Way("native", io, True).open(slabs=2, bytes_per_s=2e6)
    ticket = writer.submit([draft.plan()])
    assert ticket.wait_captured(EVER_S)
    array[:] = 0
    [crc32] = finish(ticket)
    if not writer.facts()["is_direct"]:
        pytest.skip("no direct I/O here")
    draft.check(crc32)
    progress = ticket.progress()
    assert progress.direct_bytes > 20 * PAGE
    assert progress.direct_bytes + progress.staged_bytes == progress.total_bytes
    assert progress.direct_bytes % PAGE == 0
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize("skip", [0, 64, PAGE - 1])
def test_direct_lane_takes_nothing_that_does_not_lie_right(tmp_path: Path, skip: int) -> None:
    if not native.status().available:
        pytest.skip("the writer in Python has no direct lane")
    draft = Draft(tmp_path / "file").literal(b"h" * 100).entry(0, aligned_array(20 * PAGE, skip))
    writer = Way("native", "threads", True).open(slabs=2, bytes_per_s=2e6)
    ticket = writer.submit([draft.plan()])
    draft.check(finish(ticket)[0])
    assert ticket.progress().direct_bytes == 0
    assert writer.close(timeout_s=EVER_S)


def test_writing_is_not_faster_than_the_cap(direct_way: Way, tmp_path: Path) -> None:
    writer = direct_way.open(bytes_per_s=200_000)
    drafts = [simple(tmp_path / "a", 30_000), simple(tmp_path / "b", 20_000)]
    begin_s = time.monotonic()
    for ticket in [writer.submit([draft.plan()]) for draft in drafts]:
        finish(ticket)
    assert time.monotonic() - begin_s >= 50_000 / 200_000
    assert writer.close(timeout_s=EVER_S)


def test_progress_tells_how_far_a_job_is(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=64, bytes_per_s=SLOW)
    begin_s = time.monotonic()
    draft = simple(tmp_path / "file", 100_001)
    ticket = writer.submit([draft.plan()])
    assert not ticket.wait_durable(0.0)
    assert ticket.wait_captured(EVER_S)
    progress = ticket.progress()
    assert (progress.total_bytes, progress.captured_bytes) == (100_001, 100_001)
    assert progress.staged_bytes + progress.direct_bytes == 100_001
    assert progress.written_bytes < 100_001
    assert progress.durable_end_s is None
    assert progress.idle_s >= 0.0
    with pytest.raises(CheckpointError, match=r"not durable yet .* of 100001 bytes.*wait_durable"):
        ticket.results()
    finish(ticket)
    progress = ticket.progress()
    assert progress.written_bytes == 100_001
    assert progress.idle_s == 0.0
    assert progress.capture_end_s is not None
    assert progress.durable_end_s is not None
    assert begin_s <= progress.capture_end_s <= progress.durable_end_s <= time.monotonic()
    [result] = ticket.results()
    assert (result.path, result.size_bytes, result.chunk_bytes) == (draft.path, 100_001, PAGE)
    assert writer.close(timeout_s=EVER_S)


def test_cancelled_job_lets_go_of_its_memory_and_others_go_on(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=2, bytes_per_s=SLOW)
    tickets = [writer.submit([simple(tmp_path / f"{i}", 60_000).plan()]) for i in range(3)]
    tickets[1].cancel()
    assert tickets[1].wait_captured(EVER_S)
    assert not tickets[1].wait_durable(EVER_S)
    assert not tickets[1].is_captured
    with pytest.raises(CheckpointError, match=r"cancelled .* incomplete.* save again"):
        tickets[1].results()
    tickets[0].cancel()
    finish(tickets[2])
    tickets[2].cancel()  # too late, and so without effect
    assert tickets[2].error is None
    assert tickets[2].results()
    assert writer.close(timeout_s=EVER_S)


def test_cancelled_job_keeps_its_memory_while_a_chunk_is_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_copying, may_end = threading.Event(), threading.Event()
    copy = File.live_memory

    def slow_copy(address: int, length: int) -> memoryview:
        is_copying.set()
        may_end.wait(EVER_S)
        return copy(address, length)

    monkeypatch.setattr(File, "live_memory", staticmethod(slow_copy))
    writer = Way("python", "threads", True).open()
    ticket = writer.submit([simple(tmp_path / "file", 10 * PAGE).plan()])
    assert is_copying.wait(EVER_S)
    ticket.cancel()
    assert not ticket.wait_captured(0.1)
    may_end.set()
    assert ticket.wait_captured(EVER_S)
    assert writer.close(timeout_s=EVER_S)


class Owner:
    """Something a weak reference may point to."""


def test_owners_are_dropped_once_captured_and_not_before(way: Way, tmp_path: Path) -> None:
    writer = way.open(slabs=2, bytes_per_s=SLOW)

    def submit(size: int) -> tuple[Any, weakref.ref[Owner], weakref.ref[Any]]:
        draft = simple(tmp_path / f"{size}", size)
        plan = draft.plan()
        owner = Owner()
        plan.owners.append(owner)
        return writer.submit([plan]), weakref.ref(owner), weakref.ref(draft.arrays[0])

    ticket, owner, array = submit(100_000)
    del ticket  # the job goes on without it
    gc.collect()
    assert owner() is not None
    assert array() is not None
    later, later_owner, _ = submit(10)
    finish(later)
    gc.collect()
    writer.facts()
    assert owner() is None
    assert array() is None
    assert later_owner() is None
    assert writer.close(timeout_s=EVER_S)


def test_close_finishes_jobs_until_the_deadline_and_cancels_the_rest(
    way: Way, tmp_path: Path
) -> None:
    writer = way.open(bytes_per_s=SLOW)
    draft = simple(tmp_path / "quick", 20_000)
    quick = writer.submit([draft.plan()])
    assert writer.close(timeout_s=EVER_S)
    draft.check(finish(quick)[0])
    with pytest.raises(CheckpointError, match="the writer is closed"):
        writer.submit([draft.plan()])
    assert writer.close(timeout_s=0.0)  # again

    writer = way.open(bytes_per_s=20_000)
    late = writer.submit([simple(tmp_path / "late", 200_000).plan()])
    assert writer.close(timeout_s=0.1)
    assert late.wait_captured(0.0)
    assert "cancelled" in str(late.error)
    assert "facts" not in writer.facts()  # still answers


def test_writer_that_is_dropped_ends_its_threads_and_reads_no_memory(
    way: Way, tmp_path: Path
) -> None:
    before = threads_now()
    ticket = way.open(slabs=2, bytes_per_s=20_000).submit([simple(tmp_path / "f", 200_000).plan()])
    gc.collect()
    assert ticket.wait_captured(EVER_S)
    assert "cancelled" in str(ticket.error)
    assert wait_for_threads(before) == before


def read_name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text()
    except OSError:  # it has ended
        return ""


def threads_now() -> int:
    names = [read_name(thread) for thread in Path("/proc/self/task").iterdir()]
    # The kernel's own helpers for io_uring come and go as it likes.
    return sum(not name.startswith("iou-") for name in names if name)


def wait_for_threads(wanted: int) -> int:
    """Return the number of threads, once it is as wanted or some time has passed."""
    end_s = time.monotonic() + 10
    while threads_now() > wanted and time.monotonic() < end_s:
        time.sleep(0.01)  # a joined thread of Python may still be on its way out
    return threads_now()


def test_closing_leaves_no_thread_and_no_file_open(way: Way, tmp_path: Path) -> None:
    threads, files = threads_now(), open_files()
    writer = way.open()
    tickets = [writer.submit([random_draft(tmp_path / f"{i}", i).plan()]) for i in range(5)]
    tickets.append(writer.submit([simple(tmp_path / "missing" / "file", 10_000).plan()]))
    tickets.append(writer.submit([simple(tmp_path / "cancelled", 50_000).plan()]))
    tickets[-1].cancel()
    assert writer.close(timeout_s=EVER_S)
    assert wait_for_threads(threads) == threads
    assert open_files() == files
    assert [ticket.is_durable for ticket in tickets] == [True] * 5 + [False] * 2


def test_hundreds_of_jobs_leave_nothing_behind(direct_way: Way, tmp_path: Path) -> None:
    writer = direct_way.open(slabs=8, chunk_bytes=16 * PAGE)
    drafts = [simple(tmp_path / "a", 400_000, 1), random_draft(tmp_path / "b", 2)]
    for _ in range(30):  # caches and arenas fill up
        finish(writer.submit([draft.plan() for draft in drafts]))
    memory, files, threads = resident_bytes(), open_files(), threads_now()
    for _ in range(200):
        finish(writer.submit([draft.plan() for draft in drafts]))
    assert (open_files(), threads_now()) == (files, threads)
    assert resident_bytes() - memory < 20 * 400_000  # one job in ten would show
    assert writer.close(timeout_s=EVER_S)


def test_tickets_that_live_on_do_not_keep_the_buffer(direct_way: Way, tmp_path: Path) -> None:
    # Slow, so that all of the buffer is used.
    writer = direct_way.open(slabs=32, chunk_bytes=512 * PAGE, bytes_per_s=100e6)
    draft = simple(tmp_path / "file", 64 * 2**20)
    ticket = writer.submit([draft.plan()])
    finish(ticket)
    before = resident_bytes()
    assert writer.close(timeout_s=EVER_S)
    assert before - resident_bytes() > 16 * 2**20
    assert ticket.is_durable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 11], np.uint64)}, r"offsets\[1\]: got 11, allowed is 10"),
        ({"offsets": np.array([0, 9], np.uint64)}, r"offsets\[1\]: got 9, allowed is 10"),
        ({"lengths": np.array([0, 8], np.uint64)}, r"lengths\[0\]: got 0, allowed is 1 to 18"),
        ({"lengths": np.array([10, 9], np.uint64)}, r"lengths\[1\]: got 9, allowed is 1 to 8"),
        ({"size_bytes": 19}, r"cover 18 bytes, allowed is the size, 19"),
        ({"entries": np.array([0, -2], np.int32)}, r"entries\[1\]: got -2, allowed is -1 to"),
        ({"entries": np.array([0, 3], np.int32)}, r"entries\[1\]: got 3, allowed is -1 to 2"),
        ({"entries": np.array([0, -1], np.int64)}, r"entries: got int64 array.*int32"),
        ({"offsets": np.array([[0, 10]], np.uint64)}, r"offsets: got uint64 array of shape \(1, 2"),
        ({"lengths": np.array([10], np.uint64)}, r"offsets, lengths, addresses and entries"),
        ({"addresses": np.array([0, 1], np.uint64)}, r"addresses\[0\]: got 0"),
        ({"addresses": np.array([1, 2], np.uint64)}, r"addresses\[1\]: got 2, .*literals"),
        ({"literals": [1, 2]}, r"literals: got list"),
        ({"patches": np.zeros((1, 3), np.uint64)}, r"patches: got shape \(1, 3\)"),
        ({"patches": np.array([[5, 0]], np.uint64)}, r"patch at 5, .* 4 bytes in 8 bytes"),
        ({"patches": np.array([[0, 9]], np.uint64)}, r"got 9 as entry, allowed is 0 to 2"),
        ({"patches": np.array([[0, 0], [3, 0]], np.uint64)}, r"patches at 0 and 3.*overlap"),
    ],
)  # fmt: skip
def test_plan_that_contradicts_itself_is_refused(
    direct_way: Way, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = Draft(tmp_path / "file").entry(0, b"0123456789").patch(0, b"", b"tail").plan()
    plan: FilePlan = dataclasses.replace(good, **change)
    writer = direct_way.open()
    with pytest.raises(ValueError, match=rf"plan of .*file: .*{message}"):
        writer.submit([good, plan])
    assert not (tmp_path / "file").exists()
    finish(writer.submit([good]))
    assert writer.close(timeout_s=EVER_S)


def test_patch_before_the_end_of_its_entry_is_refused(direct_way: Way, tmp_path: Path) -> None:
    draft = Draft(tmp_path / "file").entry(0, b"begin").patch(0).entry(0, b"end")
    writer = direct_way.open()
    with pytest.raises(ValueError, match=r"literal at file offset 5, allowed .* entry 0, 12"):
        writer.submit([draft.plan()])
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_bytes": 1000}, r"chunk_bytes: got 1000, allowed is a multiple of 4096"),
        ({"chunk_bytes": 0}, r"chunk_bytes: got 0"),
        ({"buffer_bytes": PAGE}, r"buffer_bytes: got 4096, .* at least twice"),
        ({"buffer_bytes": 3 * PAGE + 1}, r"buffer_bytes: got 12289, allowed is a multiple"),
        ({"io": "aio"}, r'io: got "aio", allowed is "auto"'),
        ({"queue_depth": 0}, r"queue_depth: got 0, allowed is 1 to 256"),
        ({"bytes_per_s": -1.0}, r"bytes_per_s: got -1"),
    ],
)
def test_options_out_of_range_are_refused(
    direct_way: Way, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        direct_way.open(**options)


def test_buffer_that_cannot_be_had_says_so(direct_way: Way) -> None:
    with pytest.raises(CheckpointError, match=r"buffer_bytes: cannot map"):
        direct_way.open(buffer_bytes=2**62, chunk_bytes=2**20)


def test_facts_tell_what_is_in_use(way: Way, tmp_path: Path) -> None:
    writer = way.open()
    finish(writer.submit([simple(tmp_path / "file", 10 * PAGE).plan()]))
    facts = writer.facts()
    assert facts["implementation"] == way.implementation
    assert facts["io"] in ("io_uring", "threads")
    assert (facts["io_reason"] == "") == (facts["io"] == "io_uring")
    assert facts["is_direct"] in (way.direct, False)
    assert (facts["direct_reason"] == "") == facts["is_direct"]
    assert (facts["buffer_bytes"], facts["chunk_bytes"]) == (8 * PAGE, PAGE)
    assert 0 < facts["touched_bytes"] <= 8 * PAGE
    assert writer.close(timeout_s=EVER_S)


def test_python_writes_where_there_is_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWTIDE_NATIVE", "0")
    writer = open_writer(buffer_bytes=4 * PAGE, chunk_bytes=PAGE)
    assert isinstance(writer, PythonWriter)
    assert writer.facts()["implementation"] == "python"
    assert writer.close(timeout_s=EVER_S)
