"""Storage when things go wrong: broken off, full, hanging, refused, read by several threads."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowtide.core.errors import ConfigError, StorageError
from lowtide.offload.config import StorageConfig
from lowtide.offload.one_update import OneUpdate
from lowtide.offload.rates import PathRates
from lowtide.offload.storage import files, mapping
from lowtide.offload.storage.files import CHUNK_BYTES, ScratchFile, aligned
from lowtide.offload.storage.layout import assign
from lowtide.offload.storage.mapping import PAGE_BYTES, allocate
from lowtide.offload.storage.opening import open_tier
from lowtide.offload.storage.tier import Tier
from tests.helpers.memory import cached_bytes
from tests.offload.storage_bench import NUMELS, Bench, fail_at, no_space, refuse


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.device.close()


def open_at(folder: Path, **settings: Any) -> Tier | None:
    config = StorageConfig(paths=[str(folder)], host_memory_bytes=12.0 * 9_000, **settings)
    return open_tier(config, NUMELS, subgroup_params=2048, rank=0, meet=lambda: None)


# -- in an update ------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, 4, 9])
def test_an_update_that_was_broken_off_is_not_in_the_way_of_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    bench.run()
    real, turns = OneUpdate.on_host, itertools.count()

    def interrupted(self: OneUpdate, *arguments: Any) -> None:
        if self._place is bench.executor._place and next(turns) == turn:
            raise KeyboardInterrupt
        real(self, *arguments)

    def slow(real: Any, *arguments: Any) -> int:
        time.sleep(0.02)  # so that reads and writes are under way at that moment
        return int(real(*arguments))

    fail_at(monkeypatch, "read", 0, folders="ab", how=slow)
    fail_at(monkeypatch, "write", 0, folders="ab", how=slow)
    monkeypatch.setattr(OneUpdate, "on_host", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    bench.executor.drain()
    bench.go_on_from_found()
    for _ in range(3):
        bench.run()
    bench.assert_equal()
    assert len(bench.tier.free) == bench.tier.layout.buffers


def test_what_was_updated_last_before_an_interrupt_is_not_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run()
    real, updated = OneUpdate.on_host, []

    def interrupted(self: OneUpdate, index: int, *arguments: Any) -> None:
        real(self, index, *arguments)
        if arguments and self._place is bench.executor._place:  # a stored one, updated
            updated.append((index, [each.clone() for each in arguments[0]]))
            if len(updated) > bench.tier.layout.buffers:  # this one was read in this update
                raise KeyboardInterrupt

    monkeypatch.setattr(OneUpdate, "on_host", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    bench.executor.drain()
    index, state = updated[-1]
    assert all(map(torch.equal, state, bench.executor.subgroups[index].state()))


def test_a_full_path_keeps_what_it_holds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run()
    held = bench.tier.stored_bytes()
    fail_at(monkeypatch, "write", 0, folders="a", how=refuse)
    monkeypatch.setattr(files, "allocate", no_space)
    for _ in range(3):
        bench.run()
    bench.assert_equal()
    assert bench.tier.stored_bytes() == [0, held[1]]


def test_space_that_is_waited_for_in_vain_is_a_path_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, freed = Bench(tmp_path, stall_s=0.3), threading.Event()
    fail_at(monkeypatch, "write", 0, folders="a", how=refuse)
    monkeypatch.setattr(files, "allocate", lambda *_arguments: freed.wait(30))
    try:
        with pytest.raises(StorageError, match=r"/b': a write has got no further for 0\.3 s"):
            bench.run()
    finally:
        freed.set()
        bench.device.close()


def test_parts_of_a_read_do_not_keep_a_write_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, nbytes = ScratchFile(tmp_path), 16 * CHUNK_BYTES
    first, second = file.reserve(nbytes), file.reserve(nbytes)
    source, target, wrote, real = aligned(nbytes), aligned(nbytes), threading.Event(), os.preadv
    reads: list[bool] = []

    def blocked(*arguments: Any) -> int:
        reads.append(wrote.wait(20))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", blocked)
    reading = threading.Thread(target=file.read, args=[target, first, lambda: None])
    reading.start()
    while not file._readers._is_started:
        time.sleep(0.001)
    file.write(source, second, wrote.set)
    reading.join()
    assert len(reads) == 16
    assert all(reads)
    file.close()


# -- between updates ---------------------------------------------------------------------------


def test_a_masters_state_is_replaced_while_others_are_in_all_buffers(bench: Bench) -> None:
    bench.run()
    held = {bench.tier.pieces[n].extent.flat for n in bench.tier.held}
    other = next(flat for flat in bench.tier.ranges if flat not in held)
    assert not bench.tier.free
    bench.tier.take(other, [each.clone() for each in bench.tier.tensors(other)])
    bench.run()
    bench.assert_equal()


def test_readers_in_several_threads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(real: Any, *arguments: Any) -> int:
        time.sleep(0.02)
        return int(real(*arguments))

    fail_at(monkeypatch, "write", 0, folders="ab", how=slow)
    for _ in range(4):
        bench.run()
        others = [
            threading.Thread(target=bench.tier.drain, kwargs={"may_write": may_write})
            for may_write in (True, False, True)
        ]
        for each in others:
            each.start()
        bench.tier.drain(may_write=False)
        for each in others:
            each.join()
    bench.assert_equal()
    assert all(lane.error is None for lane in bench.tier._lanes.values())
    assert len(bench.tier.free) == bench.tier.layout.buffers


def test_what_was_read_through_the_page_cache_is_dropped_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, direct=False)
    bench.run()
    bench.assert_equal()  # reads everything through the maps
    pieces = range(len(bench.tier.pieces))
    assert all(cached_bytes(bench.tier.mapped(n)[0]) > 0 for n in pieces)
    bench.run()
    written = [n for n in pieces if n not in bench.tier.held]
    assert len(written) > 3
    assert not any(cached_bytes(each) for n in written for each in bench.tier.mapped(n))
    bench.device.close()


# -- at the start ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["write", "read", "reserve"])
def test_a_path_that_hangs_at_the_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    freed, real = threading.Event(), getattr(ScratchFile, name)

    def hang(self: ScratchFile, *arguments: Any) -> Any:
        if name == "reserve" or arguments[0].numel() > PAGE_BYTES:
            freed.wait(30)
        return real(self, *arguments)

    monkeypatch.setattr(ScratchFile, name, hang)
    try:
        with pytest.raises(StorageError, match=rf"{tmp_path.name}': .*no further for 0\.2 s while"):
            open_at(tmp_path, stall_s=0.2)
    finally:
        freed.set()


def test_nothing_is_left_of_a_start_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        if offset > PAGE_BYTES:  # behind the sample that is measured with
            no_space()
        allocate(descriptor, offset, nbytes)

    monkeypatch.setattr(files, "allocate", full)
    before = set(threading.enumerate())
    with pytest.raises(StorageError, match="no room for"):
        open_at(tmp_path)
    for each in set(threading.enumerate()) - before:
        each.join(10)  # behind what is queued
        assert not each.is_alive(), each.name
    links = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    assert not [link for link in links if tmp_path.name in link]


def test_a_file_system_that_cannot_reserve_gets_longer_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_arguments: Any) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(mapping, "_library", lambda: SimpleNamespace(fallocate=unsupported))
    with (tmp_path / "file").open("w+b") as file:
        allocate(file.fileno(), 4096, 1 << 30)
        found = os.stat(file.fileno())
        assert found.st_size == 4096 + (1 << 30)
        assert found.st_blocks == 0  # nothing was written to get there
        with pytest.raises(OSError, match="No space left"):
            allocate(file.fileno(), 0, 1 << 60)


def test_direct_io_that_is_refused_in_any_way_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refused(path: Any, flags: int, *arguments: Any, **others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *arguments, **others)

    monkeypatch.setattr(os, "open", refused)
    assert not ScratchFile(tmp_path).is_direct
    assert os.listdir(tmp_path) == []


def test_children_do_not_share_staging_memory() -> None:
    memory = aligned(1 << 20)
    begin = f"{memory.data_ptr():x}-"
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(begin))
    flags = next(line for line in lines[at:] if line.startswith("VmFlags:"))
    assert "dc" in flags.split()  # do not copy on fork


def test_a_path_in_memory_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no tmpfs to write to")
    tier = open_at(shared)
    assert tier is not None
    tier.close()
    assert "/dev/shm is a tmpfs, which is host memory" in caplog.text


def test_paths_that_name_no_folder_are_refused() -> None:
    with pytest.raises(ValueError, match='"paths" names no folder'):
        StorageConfig(paths=["/a", ""], host_memory_bytes=1e9)
    with pytest.raises(ConfigError, match=r"cannot make a file in .*null byte; allowed is"):
        ScratchFile("/tmp/a\0b")


def test_rates_beyond_all_bounds_still_divide_the_pieces() -> None:
    huge, tiny = (
        PathRates(read_bytes_per_s=rate, write_bytes_per_s=rate) for rate in (1.7e308, 5e-324)
    )
    assert assign(6, [huge, huge]) == [0, 1, 0, 1, 0, 1]
    assert assign(6, [huge, tiny]) == [0] * 6
    assert assign(4, [tiny, tiny]) == [0, 1, 0, 1]
