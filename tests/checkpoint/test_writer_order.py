"""Jobs larger than the buffer, of which pieces are asked for before they are overwritten."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lowtide.checkpoint.writer import Ticket, Writer
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
)

CHUNK = 4 * PAGE
SLABS = 3
FASTEST = 0.0  # as fast as it goes
SLOW = 4e6  # bytes per second: most of a job is still in place when it is overwritten


@pytest.fixture(params=ONE_OF_EACH, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    found: Way = request.param
    return found


def draft_of(path: Path, seed: int, pieces: int = 10) -> Draft:
    """A file as of a model: small and large entries, checksums behind each and all at the end."""
    random = np.random.default_rng(seed)
    draft = Draft(path)
    for number in range(pieces):
        draft.literal(random.bytes(int(random.integers(30, 90))))
        size = int(random.choice([5, PAGE, 3 * CHUNK, 5 * CHUNK + 77]))
        # Large ones lie in memory as they will in the file, like those of the plugin.
        skip = len(draft.expected) % PAGE if random.random() < 0.8 else int(random.integers(PAGE))
        draft.entry(number, aligned_array(size, skip, seed=100 * seed + number))
        draft.patch(number, random.bytes(4), random.bytes(8))
    for number in range(pieces):
        draft.patch(number, random.bytes(42))
    return draft.literal(b"end")


def memory_of(*arrays: NDArray[np.uint8]) -> NDArray[np.uint64]:
    places = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]
    return np.array(places, np.uint64).reshape(-1, 2)


def open_slow(way: Way, bytes_per_s: float = SLOW, slabs: int = SLABS) -> Writer:
    return way.open(slabs=slabs, chunk_bytes=CHUNK, bytes_per_s=bytes_per_s)


def overwrite(ticket: Ticket, array: NDArray[np.uint8]) -> None:
    assert ticket.wait_released(memory_of(array), EVER_S)
    array[:] = 0


@pytest.mark.parametrize("seed", range(4))
def test_file_is_as_at_the_request_when_pieces_are_overwritten_in_any_order(
    way: Way, tmp_path: Path, seed: int
) -> None:
    writer = open_slow(way)
    random = np.random.default_rng(seed)
    draft = draft_of(tmp_path / "file", seed)
    ticket = writer.submit([draft.plan()])
    order = [draft.arrays[i] for i in random.permutation(len(draft.arrays)).tolist()]
    if seed % 2:
        ticket.hurry(memory_of(*order))
    for array in order:
        overwrite(ticket, array)
    was_durable = ticket.is_durable
    draft.check(finish(ticket)[0], CHUNK)
    assert not was_durable, "the disk was to be slower than the update"
    progress = ticket.progress()
    assert 0 < progress.hurried_bytes <= progress.staged_bytes
    assert progress.staged_bytes + progress.direct_bytes == progress.total_bytes
    assert writer.close(timeout_s=EVER_S)


def test_overwriting_without_asking_is_seen_in_the_file(way: Way, tmp_path: Path) -> None:
    # What the test above would show if nobody waited.
    writer = open_slow(way, bytes_per_s=1e6)
    draft = Draft(tmp_path / "file").entry(0, aligned_array(40 * CHUNK, 0))
    ticket = writer.submit([draft.plan()])
    draft.arrays[0][20 * CHUNK :] = 0
    assert ticket.wait_released(memory_of(draft.arrays[0]), EVER_S)
    ticket.cancel()
    assert writer.close(timeout_s=EVER_S)
    written = draft.path.read_bytes()
    assert written[: 2 * CHUNK] == draft.expected[: 2 * CHUNK]
    assert written[20 * CHUNK : 40 * CHUNK] != draft.expected[20 * CHUNK : 40 * CHUNK]


def test_what_is_asked_for_comes_before_what_is_hurried(way: Way, tmp_path: Path) -> None:
    writer = open_slow(way, bytes_per_s=1e6)
    draft = Draft(tmp_path / "file").entry(0, aligned_array(60 * CHUNK, 0))
    ticket = writer.submit([draft.plan()])
    parts = [draft.arrays[0][i * 10 * CHUNK :][: 10 * CHUNK] for i in range(6)]
    ticket.hurry(memory_of(*parts[:5]))
    overwrite(ticket, parts[5])
    progress = ticket.progress()  # ten chunks, and what had begun before
    assert progress.captured_bytes <= (10 + 2 * SLABS + 2) * CHUNK
    for part in parts[:5]:
        overwrite(ticket, part)
    draft.check(finish(ticket)[0], CHUNK)
    assert writer.close(timeout_s=EVER_S)


def test_early_ends_of_entries_do_not_keep_the_buffer_from_their_beginnings(
    way: Way, tmp_path: Path
) -> None:
    # Each last chunk has the checksum of an entry that has hardly begun; there are many more of
    # them than slabs, and no chunk lies as direct I/O needs it.
    writer = open_slow(way, bytes_per_s=FASTEST)
    draft = Draft(tmp_path / "file")
    for number in range(8 * SLABS):
        draft.entry(number, aligned_array(2 * CHUNK, 64, seed=number)).patch(number)
    ticket = writer.submit([draft.plan()])
    ends = [array[-8:] for array in reversed(draft.arrays)]
    for end in ends:
        overwrite(ticket, end)
    for array in draft.arrays:
        overwrite(ticket, array)
    draft.check(finish(ticket)[0], CHUNK)
    assert writer.close(timeout_s=EVER_S)


def test_many_files_asked_for_from_the_last_one_on(way: Way, tmp_path: Path) -> None:
    # More than are open at once, and far more than slabs; none can be closed early on.
    writer = open_slow(way, bytes_per_s=FASTEST)
    drafts = [
        Draft(tmp_path / f"{i}").entry(0, aligned_array(2 * CHUNK, 64, i)) for i in range(120)
    ]
    ticket = writer.submit([draft.plan() for draft in drafts])
    ticket.hurry(memory_of(*(draft.arrays[0][CHUNK:] for draft in reversed(drafts))))
    deadline_s = time.monotonic() + EVER_S
    while ticket.progress().captured_bytes < 66 * CHUNK and time.monotonic() < deadline_s:
        time.sleep(0.001)
    for draft in reversed(drafts):
        overwrite(ticket, draft.arrays[0])
    for draft, crc32 in zip(drafts, finish(ticket), strict=True):
        draft.check(crc32, CHUNK)
    assert writer.close(timeout_s=EVER_S)


def test_files_told_in_parts_may_be_asked_for_too(way: Way, tmp_path: Path) -> None:
    writer = open_slow(way)
    draft = Draft(tmp_path / "file").entry(0, aligned_array(20 * CHUNK + 5, 0, seed=1))
    ticket = writer.submit([draft.plan()], is_partial=True)
    draft.patch(0).entry(1, aligned_array(20 * CHUNK, len(draft.expected) % PAGE, seed=2))
    ticket.extend(draft.patch(1).plan())
    for array in reversed(draft.arrays):
        overwrite(ticket, array)
    draft.check(finish(ticket)[0], CHUNK)
    assert writer.close(timeout_s=EVER_S)


def test_waiting_ends_when_the_time_is_over_and_when_the_job_is_cancelled(
    way: Way, tmp_path: Path
) -> None:
    writer = open_slow(way, bytes_per_s=1e4)
    draft = Draft(tmp_path / "file").entry(0, aligned_array(60 * CHUNK, 0))
    ticket = writer.submit([draft.plan()])
    memory = memory_of(draft.arrays[0])
    assert not ticket.wait_released(memory, 0.1)
    threading.Timer(0.2, ticket.cancel).start()
    assert ticket.wait_released(memory, EVER_S)
    assert not ticket.is_captured
    with pytest.raises(CheckpointError, match="cancelled"):
        ticket.results()
    assert ticket.wait_released(memory, 0.0)  # nothing is left to wait for
    ticket.hurry(memory)
    assert writer.close(timeout_s=0.0)


def test_waiting_ends_when_the_disk_fails(way: Way, tmp_path: Path) -> None:
    writer = open_slow(way)
    draft = Draft(tmp_path / "missing" / "file").entry(0, aligned_array(60 * CHUNK, 0))
    ticket = writer.submit([draft.plan()])
    assert ticket.wait_released(memory_of(draft.arrays[0]), EVER_S)
    assert "No such file" in str(ticket.error)
    assert writer.close(timeout_s=EVER_S)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_waiting_for_all_is_still_possible(way: Way, tmp_path: Path) -> None:
    writer = open_slow(way)
    draft = draft_of(tmp_path / "file", 11)
    ticket = writer.submit([draft.plan()])
    overwrite(ticket, draft.arrays[3])
    assert ticket.wait_captured(EVER_S)
    for array in draft.arrays:
        array[:] = 0
    draft.check(finish(ticket)[0], CHUNK)
    assert writer.close(timeout_s=EVER_S)


def test_a_thread_that_may_not_block_waits_too(way: Way, tmp_path: Path) -> None:
    writer = open_slow(way)
    draft = Draft(tmp_path / "file").entry(0, aligned_array(20 * CHUNK, 0))
    ticket = writer.submit([draft.plan()])
    thread = threading.Thread(target=overwrite, args=(ticket, draft.arrays[0]), daemon=True)
    thread.start()
    thread.join(EVER_S)
    assert not draft.arrays[0].any()
    draft.check(finish(ticket)[0], CHUNK)
    assert writer.close(timeout_s=EVER_S)
