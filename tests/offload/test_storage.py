"""Scratch files, tiers and executors over them: the bits of memory, with any failure in between."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.core.errors import ConfigError, StorageError
from lowtide.core.state import Location
from lowtide.offload.config import OffloadConfig, StorageConfig, StoragePath
from lowtide.offload.plan import build_plan, random_plan
from lowtide.offload.rates import PathRates
from lowtide.offload.schedule import check_plan
from lowtide.offload.scheduler import Scheduler
from lowtide.offload.storage import files
from lowtide.offload.storage.files import CHUNK_BYTES, ScratchFile, aligned
from lowtide.offload.storage.layout import assign, lay_out, shares
from lowtide.offload.storage.mapping import PAGE_BYTES, PAGE_ELEMENTS
from lowtide.offload.storage.opening import open_tier
from lowtide.offload.subgroup import ALIGNMENT
from lowtide.offload.trace import StepTrace
from tests.helpers.memory import resident_bytes
from tests.offload.storage_bench import (
    MEMORY_BYTES,
    NUMELS,
    Bench,
    Witness,
    fail_at,
    refuse,
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.device.close()


# -- layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [12 * 20_000, MEMORY_BYTES, 12 * 40_000, 12 * 60_000])
def test_extents_cover_all_and_memory_is_kept(memory: float) -> None:
    layout = lay_out(NUMELS, memory_bytes=memory, piece=2048, buffers=3, vector=ALIGNMENT)
    for flat, numel in enumerate(NUMELS):
        extents = [e for e in layout.extents if e.flat == flat]
        ends = list(itertools.accumulate(e.numel for e in extents))
        assert [e.begin for e in extents] == [0, *ends[:-1]]
        assert ends[-1] == numel // ALIGNMENT * ALIGNMENT
    stored = 12 * sum(e.numel for e in layout.stored)
    assert layout.kept_bytes + stored == 12 * sum(NUMELS)
    assert layout.kept_bytes + layout.buffers * layout.buffer_bytes <= memory
    for each in layout.stored:
        assert each.begin % PAGE_ELEMENTS == each.numel % PAGE_ELEMENTS == 0
        assert 12 * each.numel <= layout.buffer_bytes
    assert bool(layout.stored) == (memory < 12 * sum(NUMELS))


def test_memory_that_holds_no_buffers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"host_memory_bytes: got 50000, and 3 staging buffers"):
        lay_out(NUMELS, memory_bytes=50_000, piece=2048, buffers=3, vector=ALIGNMENT)


def test_paths_get_pieces_in_proportion_to_their_speed() -> None:
    fast = PathRates(read_bytes_per_s=6e9, write_bytes_per_s=3e9)
    slow = PathRates(read_bytes_per_s=1e9, write_bytes_per_s=2e9)
    assert shares(100, [fast, slow]) == [75, 25]
    chosen = assign(100, [fast, slow])
    assert chosen.count(0) == 75
    for begin in range(0, 100, 4):  # spread evenly, not one after the other
        assert chosen[begin : begin + 4].count(1) == 1
    assert assign(4, [fast, fast]) == [0, 1, 0, 1]
    assert assign(4, [fast, fast], first=1) == [1, 0, 1, 0]


# -- files -------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot make a file in .*/none'.*existing folder"):
        ScratchFile(tmp_path / "none")


def test_a_full_path_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.allocate

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        if nbytes > 8192:
            raise OSError(28, "No space left on device")
        real(descriptor, offset, nbytes)

    monkeypatch.setattr(files, "allocate", full)
    with pytest.raises(StorageError, match=r"no room for \d+ bytes .* \d+ are free .*No space"):
        Bench(tmp_path)


def test_direct_io_is_left_out_where_it_and_memory_maps_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ScratchFile(tmp_path).is_direct:
        pytest.skip("no direct I/O here")
    answers = iter([False, True])
    monkeypatch.setattr(ScratchFile, "_is_coherent", lambda _self, _offset: next(answers))
    assert not ScratchFile(tmp_path).is_direct
    answers = iter([False, False])
    with pytest.raises(StorageError, match="does not read back what was written"):
        ScratchFile(tmp_path)


@pytest.mark.parametrize("direct", [True, False])
def test_large_pieces_go_in_parts_and_come_back_whole(tmp_path: Path, direct: bool) -> None:
    file = ScratchFile(tmp_path, direct=direct)
    nbytes = 2 * CHUNK_BYTES + 8192
    offset = file.reserve(nbytes)
    source, target, calls = aligned(nbytes), aligned(nbytes), []
    source.random_(generator=torch.Generator().manual_seed(1))
    crc = file.write(source, offset, lambda: calls.append(1))
    assert crc == zlib.crc32(source.numpy().tobytes())
    assert file.read(target, offset, lambda: calls.append(1)) == crc
    assert torch.equal(source, target)
    assert len(calls) >= 6
    with pytest.raises(OSError, match="has become shorter"):
        file.read(target, offset + nbytes - CHUNK_BYTES - PAGE_BYTES, lambda: None)
    file.close()


# -- updates -----------------------------------------------------------------------------------


def test_any_plan_gives_the_bits_of_memory(bench: Bench) -> None:
    for seed in range(10):
        plan = random_plan(bench.executor.pieces(), seed, memory_bytes=10**6)
        bench.run(plan)
        if seed % 3 == 0:
            bench.assert_equal()
    bench.close()
    for flat, state in enumerate(bench.expected):  # the maps outlive the files
        assert all(map(torch.equal, state, bench.found[flat]))


def test_memory_is_given_back_to_the_kernel(bench: Bench) -> None:
    for turn in range(3):
        bench.run()
        if turn == 1:
            bench.executor.drain()  # readers look through the page cache
            assert sum(each.sum().item() for state in bench.found for each in state) != 0
        held = sum(resident_bytes(each) for state in bench.found for each in state)
        buffers = [*bench.tier.free, *bench.tier.held.values()]
        staging = sum(resident_bytes(each.memory) for each in buffers)
        assert 0 < staging <= 3 * bench.tier.layout.buffer_bytes
        held += staging
        pages = 2 * sum(len(state) for state in bench.found) * mmap.PAGESIZE  # of both ends
        assert 0 < held <= MEMORY_BYTES + pages
        assert held < 12 * sum(NUMELS) / 2


def test_what_is_updated_last_is_neither_written_nor_read(bench: Bench) -> None:
    stored = len(bench.tier.pieces)
    bench.run()
    bench.run()
    moves = bench.moves()
    assert moves["read0"] + moves["read1"] == stored - 3
    assert moves["write0"] + moves["write1"] == stored - 3
    first = [e.subgroup for e in bench.executor.trace.operations() if e.lane == "host"]
    plan = build_plan(
        bench.executor.pieces(), residents=(), device_order=(),
        host_order=range(len(bench.executor.subgroups)), slots=0, carried=0,
    )  # fmt: skip
    bench.run(plan)
    again = [e.subgroup for e in bench.executor.trace.operations() if e.lane == "host"]
    keys = {e.key for e in bench.executor.subgroups if e.stored is not None}
    last = [key for key in first if key in keys]
    assert [key for key in again if key in keys] == last[::-1]
    assert sum(bench.moves()[f"write{j}"] for j in (0, 1)) == stored
    bench.assert_equal()


def test_readers_find_the_newest_state_and_checked_reads_go_on(bench: Bench) -> None:
    bench.run()
    known = bench.authority.keys()
    away = [key for key in known if bench.authority.where(key).location != Location.HOST]
    assert len(away) == 3
    assert {bench.authority.where(key).location for key in away} == {Location.BUFFER}
    bench.authority.ensure_host()
    for flat, state in enumerate(bench.expected):
        assert all(map(torch.equal, state, bench.found[flat]))
    assert all(each.crc is not None for each in bench.tier.pieces)
    bench.run()
    assert bench.moves()["read0"] > 0
    bench.assert_equal()


def test_state_that_was_changed_between_updates_is_what_counts(bench: Bench) -> None:
    bench.run()
    bench.executor.drain()
    for state in (bench.expected, bench.found):
        for each in state[1]:
            each.mul_(0.5)
    bench.run()
    bench.assert_equal()


# -- faults ------------------------------------------------------------------------------------


def test_files_are_overwritten_only_after_their_readers_were_asked(bench: Bench) -> None:
    witness = Witness(bench)
    bench.authority.add_reader(witness)
    bench.run()
    assert witness.left == {}
    assert sorted(witness.asked) == sorted(witness.told)
    stored = {e.master.data_ptr() for e in bench.executor.subgroups if e.stored is not None}
    told = [place for place in witness.told if place in stored]
    assert told == [place for place in witness.asked if place in stored]
    bench.assert_equal()


@pytest.mark.parametrize("turn", range(0, 9, 2))
def test_a_path_that_refuses_writes_loses_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, turn: int, caplog: pytest.LogCaptureFixture
) -> None:
    fail_at(monkeypatch, "write", turn, folders="a", how=refuse)
    for _ in range(4):
        bench.run()
    bench.assert_equal()
    assert bench.tier.stored_bytes()[0] == 0
    assert bench.tier.in_memory_bytes() <= MEMORY_BYTES
    said = [r.message for r in caplog.records if "takes no more optimizer state" in r.message]
    assert len(said) == 1
    assert "/a takes no more" in said[0]


def test_state_stays_in_memory_where_no_path_takes_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run()
    fail_at(monkeypatch, "write", 2, folders="ab", how=refuse)
    for _ in range(3):
        bench.run()
    bench.assert_equal()
    assert bench.tier.stored_bytes() == [0, 0]
    bench.run()
    assert bench.moves() == {}
    bench.assert_equal()
    assert sum(map(resident_bytes, bench.found[1])) >= 12 * NUMELS[1]


def test_a_read_that_fails_once_is_repeated(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.count()

    def once(real: Any, *arguments: Any) -> int:
        return refuse() if next(turns) == 0 else int(real(*arguments))

    fail_at(monkeypatch, "read", 2, folders="ab", how=once)
    for _ in range(2):
        bench.run()
    bench.assert_equal()
    assert next(turns) > 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (refuse, r"\[Errno 5\] Input/output error"),
        (lambda real, self, *a: real(self, *a) ^ 1, r"its CRC-32 is \w+, and \w+ was written"),
    ],
)
def test_state_that_cannot_be_read_back_is_an_error_that_lasts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: Any, said: str
) -> None:
    bench.run()
    fail_at(monkeypatch, "read", 1, folders="b", how=how)
    with pytest.raises(StorageError, match=rf"scratch file in .*/b': {said}.*last checkpoint"):
        bench.run()
    monkeypatch.undo()
    with pytest.raises(StorageError, match="cannot be read back"):
        bench.run()
    bench.close()


@pytest.mark.parametrize("name", ["read", "write"])
def test_a_path_that_hangs_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench, freed = Bench(tmp_path, stall_s=0.3), threading.Event()

    def hang(real: Any, *arguments: Any) -> int:
        freed.wait(30)
        return int(real(*arguments))

    fail_at(monkeypatch, name, 1, folders="a", how=hang)
    try:
        with pytest.raises(StorageError, match=rf"/a': a {name} has got no further for 0\.3 s"):
            bench.run()
        bench.close()
    finally:
        freed.set()
        bench.device.close()


# -- predictions -------------------------------------------------------------------------------


def test_predictions_settle_at_what_is_measured(bench: Bench) -> None:
    config = OffloadConfig(device="cpu")
    scheduler = Scheduler(config, bench.device, lambda numbers: numbers, may_update=False)
    pieces = bench.executor.pieces()
    first = scheduler.next_plan(bench.executor)
    check_plan(pieces, first)
    assert first.makespan_s is not None
    assert len(first.stored_order) == len(bench.tier.pieces)
    trace = StepTrace(begin_s=0.0, end_s=20.0)
    trace.add("a", 1, 0.0, 6.0)
    carried, order = first.carried, first.stored_order
    moved = {"read": order[carried:], "write": order[: len(order) - carried]}
    for lane, end_s in (("read0", 9.0), ("write0", 3.0), ("read1", 2.0), ("write1", 7.0)):
        mine = [p for p in (pieces[i] for i in moved[lane[:-1]]) if p.path == int(lane[-1])]
        trace.add_transfer("a", lane, sum(p.state_bytes for p in mine), 0.0, end_s)
    for _ in range(40):
        scheduler.observe(trace)
        plan = scheduler.next_plan(bench.executor)
    busy = dict(plan.busy_s)
    for lane, expected in (("host", 6.0), ("read0", 9.0), ("read1", 2.0), ("write1", 7.0)):
        assert busy[lane] == pytest.approx(expected, rel=1e-3), lane
    assert plan.lower_bound_s is not None
    assert 6.0 <= plan.lower_bound_s * (1 + 1e-6) < 10.0
    facts = scheduler.facts()
    assert len(facts["rates"]["paths"]) == 2


# -- settings ----------------------------------------------------------------------------------


def test_nothing_is_stored_where_memory_is_enough(tmp_path: Path) -> None:
    met: list[int] = []
    config = StorageConfig(paths=[str(tmp_path)], host_memory_bytes=12.0 * sum(NUMELS))
    tier = open_tier(config, NUMELS, subgroup_params=2048, rank=0, meet=lambda: met.append(1))
    assert tier is None
    assert met == [1]
    less = config.model_copy(update={"host_memory_bytes": 12.0 * sum(NUMELS) - 1})
    tier = open_tier(less, NUMELS, subgroup_params=2048, rank=0, meet=lambda: None)
    assert tier is not None
    assert tier.layout.buffers == 3
    assert tier.rates[0].read_bytes_per_s > 0
    assert os.listdir(tmp_path) == []
    tier.close()


@pytest.mark.parametrize(("wanted", "least"), [("auto", 6), (5, 5)])
def test_buffers_are_chosen_by_the_rates(tmp_path: Path, wanted: Any, least: int) -> None:
    paths = [
        StoragePath(path=str(tmp_path), read_bytes_per_s=rate, write_bytes_per_s=rate)
        for rate in (4e8, 1e8)
    ]
    config = StorageConfig(paths=paths, host_memory_bytes=12.0 * 20 * 1024, buffers=wanted)
    tier = open_tier(config, [1024 * 60], subgroup_params=1024, rank=0, meet=lambda: None)
    assert tier is not None
    assert least <= tier.layout.buffers < least + (4 if wanted == "auto" else 1)
    assert tier.in_memory_bytes() <= config.host_memory_bytes
    tier.close()
