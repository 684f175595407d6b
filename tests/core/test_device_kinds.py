"""What only one kind of device has: the emulated arena and link, threads, inline lanes, streams."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core.device import Device, open_device
from lowtide.core.device.cuda import CudaLane
from lowtide.core.device.emulated import Throttle
from lowtide.core.device.lanes import CREDIT_S, host_route
from lowtide.core.device.pinned import REGISTERED_BYTES, pinned_empty
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError

MIB = 1 << 20
WAIT_S = 30.0


@pytest.fixture
def device() -> Iterator[Device]:
    with open_device("emulated", memory_bytes=MIB) as made:
        yield made


def test_memory_is_free_again_when_the_last_view_is_gone(device: Device) -> None:
    assert device.free_bytes() == MIB
    tensor = device.empty((100, 4), torch.float32)
    tensor.fill_(1)
    assert device.free_bytes() == MIB - 2048  # 1600 bytes in granules of 512
    row = tensor[7].view(torch.int32)
    del tensor
    assert device.free_bytes() == MIB - 2048
    others = [device.empty(128, torch.float32).fill_(2) for _ in range(20)]
    assert bool((row.view(torch.float32) == 1).all())
    del row, others
    assert device.free_bytes() == MIB


def test_a_parameter_keeps_its_arena_memory_through_data(device: Device) -> None:
    leaf = torch.nn.Parameter(torch.zeros(256))
    leaf.data = device.empty(256, torch.float32).fill_(4)
    others = [device.empty(256, torch.float32).fill_(9) for _ in range(100)]
    assert device.owns(leaf)
    assert device.owns(leaf.data[3:])
    assert bool((leaf == 4).all())
    del leaf, others
    assert device.free_bytes() == MIB


def test_out_of_memory_says_how_much_is_free_and_in_which_pieces(device: Device) -> None:
    blocks = [device.empty(MIB // 4, torch.uint8) for _ in range(4)]
    with pytest.raises(DeviceOutOfMemoryError, match=r"1 bytes: 0 of 1048576 .* block has 0;"):
        device.empty(1, torch.uint8)
    del blocks[0], blocks[1]  # the first and the third quarter
    with pytest.raises(
        DeviceOutOfMemoryError,
        match=r"cannot allocate 300000 bytes: 524288 of 1048576 bytes are free, the largest free "
        r"block has 262144; drop tensors",
    ):
        device.empty(300000, torch.uint8)
    blocks.clear()
    assert device.empty(MIB, torch.uint8).numel() == MIB


def test_dead_tensors_in_a_reference_cycle_are_found_before_memory_runs_out(
    device: Device,
) -> None:
    gc.disable()
    try:
        circle: list[Any] = [device.empty(MIB, torch.uint8)]
        circle.append(circle)
        del circle
        assert device.empty(MIB, torch.uint8).numel() == MIB
    finally:
        gc.enable()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9000)), max_size=80))
def test_blocks_never_overlap_and_nothing_is_lost(steps: list[tuple[bool, int]]) -> None:
    with open_device("emulated", memory_bytes=1 << 16) as device:
        live: list[tuple[int, torch.Tensor]] = []
        for number, (is_free, size) in enumerate(steps):
            if is_free and live:
                live.pop(size % len(live))
            else:
                try:
                    tensor = device.empty(size, torch.uint8)
                except DeviceOutOfMemoryError:
                    continue
                live.append((number % 251, tensor.fill_(number % 251)))
                del tensor
            used = sum(max(1, -(-each.numel() // 512)) * 512 for _, each in live)
            assert device.free_bytes() == (1 << 16) - used
        assert all(bool((tensor == value).all()) for value, tensor in live)
        assert all(each.data_ptr() % 512 == 0 for _, each in live)
        live.clear()
        assert device.empty(1 << 16, torch.uint8) is not None  # one piece again


def test_the_host_cannot_give_more_than_it_has() -> None:
    with pytest.raises(DeviceOutOfMemoryError, match=r"memory_bytes=.*use less"):
        open_device("emulated", memory_bytes=1 << 60)


def test_a_copy_needs_one_end_on_the_device(device: Device) -> None:
    with pytest.raises(DeviceError, match=r"neither tensor lives on emulated:0.*host_lane\(\)"):
        device.lane("x").copy(torch.zeros(3), torch.zeros(3))
    with open_device("emulated", index=1, memory_bytes=MIB) as other:
        there = other.empty(3, torch.float32)
        assert not device.owns(there)
        assert other.owns(there)


def test_a_throttle_books_its_link_without_gaps_and_without_credit_for_idling() -> None:
    link = Throttle(1000.0)
    assert link.reserve(100, 10.0) == pytest.approx(10.1)
    assert link.reserve(100, 10.0) == pytest.approx(10.2)  # shared: behind the first
    assert link.reserve(100, 10.15) == pytest.approx(10.3)  # woke up late: no gap
    assert link.reserve(100, 20.0) == pytest.approx(20.1)  # idle time is gone
    assert Throttle(1e6).chunk_bytes == 1 << 16
    assert Throttle(1e9).chunk_bytes == 5_000_000 or Throttle(1e9).chunk_bytes == 1 << 22
    assert Throttle(1e12).chunk_bytes == 1 << 22


@pytest.mark.parametrize("direction", ["up", "down"])
def test_throttled_copies_are_never_faster_than_their_rate(direction: str) -> None:
    rates = {"up": "host_to_device_bytes_per_s", "down": "device_to_host_bytes_per_s"}
    rate = 20e6
    with open_device("emulated", memory_bytes=8 * MIB, **{rates[direction]: rate}) as device:
        pairs = []
        for _ in range(4):
            there, here = device.empty(MIB, torch.uint8), device.host_empty(MIB, torch.uint8)
            there.random_()
            here.random_()
            pairs.append((there, here) if direction == "up" else (here, there))
        begin_s = perf_counter()
        events = [
            device.lane(f"lane {number % 2}").copy(*pair) for number, pair in enumerate(pairs)
        ]
        device.synchronize()
        end_s = perf_counter()
        assert end_s - begin_s >= 4 * MIB / rate  # two lanes, one link
        for dst, src in pairs:
            assert torch.equal(dst, src)
        for event in events:
            assert event.end_s - event.begin_s >= MIB / rate - CREDIT_S
        other = device.lane("other way")
        other.copy(pairs[0][1], pairs[0][0])  # must not book the throttled direction
        link = device._up if direction == "up" else device._down  # type: ignore[attr-defined]
        other.synchronize()
        assert link._free_s <= end_s
        copied = device.empty(MIB, torch.uint8)
        device.lane("lane 0").copy(copied, device.empty(MIB, torch.uint8))
        device.synchronize()
        assert link._free_s <= end_s  # within the device: no link


def test_lanes_of_a_device_work_at_the_same_time(device: Device) -> None:
    meet = threading.Barrier(3)
    lanes = [device.lane("a"), device.lane("b"), device.host_lane("c")]
    for lane in lanes:
        lane.run(meet.wait, WAIT_S)  # breaks, and fails its lane, unless all three are there
    device.synchronize()
    assert not meet.broken


def test_an_event_is_not_done_before_its_work(device: Device) -> None:
    gate = threading.Event()
    event = device.lane("x").run(gate.wait, WAIT_S, label="gate")
    assert not event.is_done()
    assert event.wait(0.01) is False
    with pytest.raises(DeviceError, match='"gate": it is not done'):
        _ = event.begin_s
    gate.set()
    assert event.wait(WAIT_S) is True
    assert event.is_done()


def test_closing_with_cancel_drops_what_has_not_begun() -> None:
    device = open_device("emulated", memory_bytes=MIB)
    seen: list[str] = []
    gate, begun = threading.Event(), threading.Event()
    first, second = device.lane("first"), device.lane("second")

    def running() -> None:
        begun.set()
        gate.wait(WAIT_S)
        seen.append("running")

    first.run(running)
    queued = first.run(seen.append, "queued", label="queued")
    second.wait(queued)
    dependent = second.run(seen.append, "dependent")
    assert begun.wait(WAIT_S)
    threading.Timer(0.05, gate.set).start()
    with contextlib.suppress(DeviceError):  # `second` may have failed on its cancelled wait
        device.close(cancel=True)
    assert seen == ["running"]
    for event in (queued, dependent):
        with pytest.raises(DeviceError, match="cancelled"):
            event.wait(WAIT_S)


def test_close_drains_lanes_that_wait_for_each_other() -> None:
    device = open_device("emulated", memory_bytes=MIB)
    seen: list[int] = []
    gate = threading.Event()
    lanes = [device.lane("a"), device.lane("b")]
    lanes[0].run(gate.wait, WAIT_S)
    for number in range(40):
        event = lanes[number % 2].run(seen.append, number)
        lanes[(number + 1) % 2].wait(event)
    gate.set()
    device.close()
    assert seen == list(range(40))


def test_close_gives_up_at_its_timeout_and_names_what_still_runs() -> None:
    device = open_device("emulated", memory_bytes=MIB)
    gate = threading.Event()
    event = device.lane("x").run(gate.wait, WAIT_S, label="stuck")
    with pytest.raises(DeviceError, match=r'"emulated:0/x": "stuck" still runs'):
        device.close(timeout_s=0.05)
    gate.set()
    assert event.wait(WAIT_S)


def test_a_lane_that_waits_for_itself_is_told_so(device: Device) -> None:
    lane = device.lane("x")
    event = lane.run(lane.synchronize, label="self")
    with pytest.raises(DeviceError, match='"self" waits for its own lane'):
        event.wait(WAIT_S)
    lane.clear()


def test_a_worker_survives_what_would_end_its_thread(device: Device) -> None:
    lane = device.lane("x")
    with pytest.raises(DeviceError, match="SystemExit"):
        lane.run(sys.exit, 3).wait(WAIT_S)
    assert isinstance(lane.clear(), SystemExit)
    assert lane.run(lambda: None).wait(WAIT_S)


def test_an_interrupt_passes_through_an_inline_lane() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with open_device("cpu") as device:
        lane = device.lane("x")
        with pytest.raises(KeyboardInterrupt):
            lane.run(interrupt)
        assert isinstance(lane.clear(), KeyboardInterrupt)


def test_clear_does_not_revive_work_behind_the_failure(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    gate = threading.Event()
    lane = device.lane("x")
    cancel = lane._cancel

    def cancel_slowly(*args: Any) -> None:
        sleep(0.002)
        cancel(*args)

    monkeypatch.setattr(lane, "_cancel", cancel_slowly)
    lane.run(gate.wait, WAIT_S)
    lane.run(lambda: 1 / 0)
    for number in range(50):
        lane.run(seen.append, number)
    gate.set()
    while lane.clear() is None:  # as early as it can be called
        pass
    lane.run(seen.append, -1).wait(WAIT_S)
    assert seen == [-1]


def test_an_interpreter_ends_well_with_a_device_left_open() -> None:
    code = (
        "import time, torch\n"
        "from lowtide.core.device import open_device\n"
        "device = open_device('emulated', memory_bytes=1 << 20, host_to_device_bytes_per_s=1e6)\n"
        "there = device.empty(100_000, torch.uint8)\n"
        "for _ in range(1000):\n"
        "    device.lane('x').copy(there, torch.zeros(100_000, dtype=torch.uint8))\n"
        "device.host_lane('y').run(time.sleep, 0.01)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class FakeMark:
    """A CUDA event that the test lets pass."""

    log: list[str]
    passed: set[FakeMark]

    def __init__(self, enable_timing: bool = False) -> None:
        self.is_recorded = False

    def record(self, stream: object = None) -> None:
        self.is_recorded = True

    def query(self) -> bool:
        return self.is_recorded and self in FakeMark.passed

    def elapsed_time(self, other: FakeMark) -> float:
        return 2000.0


class FakeStream:
    device = "cuda:0"

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, mark: FakeMark) -> None:
        assert mark.is_recorded  # CUDA takes a wait for a mark not recorded yet as no wait at all
        self.log.append(f"{self.name} waits")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} synchronized")


class FakeRuntime:
    """CUDA's registry of pinned memory; `refuses` is the status of the next registration."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.refuses = 0
        self.has_waited = False

    def synchronize(self, device: int) -> None:
        assert device == 3
        self.has_waited = True

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1
        if not self.refuses:
            ctypes.memset(address, 7, size)  # all of it is there
            self.pinned[address] = size
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        assert ctypes.string_at(address, 1)  # still mapped
        assert self.has_waited  # copies may have been under way
        del self.pinned[address]
        return 0


def _flags_of(address: int) -> set[str]:
    """Return what Linux says about the mapping at an address."""
    is_here, found = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(each, 16) for each in first.split("-"))
            is_here = begin <= address < end
        elif is_here and first == "VmFlags:":
            found = rest
    return set(found.split())


def test_a_fork_leaves_pinned_memory_of_its_parent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.synchronize)
    held = [pinned_empty(REGISTERED_BYTES, torch.uint8)]
    address = held[0].data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            libc = ctypes.CDLL(None)
            libc.mmap.restype = ctypes.c_void_p
            fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
            there = libc.mmap(
                ctypes.c_void_p(address), ctypes.c_size_t(4096), 3, fixed, -1, ctypes.c_long(0)
            )
            held.clear()
            code = int(there != address or not _flags_of(address) or len(runtime.pinned) != 1)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.clear()
    assert runtime.pinned == {}


def test_large_pinned_memory_has_exactly_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.synchronize)
    tensor = pinned_empty((3, 1_000_001), torch.float32)
    flags = _flags_of(tensor.data_ptr())
    assert "sh" not in flags, "shared memory has huge pages only where an administrator says so"
    assert {"hg", "dc"} <= flags  # huge pages, not copied at a fork
    assert runtime.pinned == {tensor.data_ptr(): 12_000_012}
    assert tensor.shape == (3, 1_000_001)
    assert tensor.view(torch.uint8).eq(7).all()
    part = tensor[2, 5:]
    del tensor
    assert part.view(torch.uint8).eq(7).all()  # a view keeps it pinned
    assert len(runtime.pinned) == 1
    del part
    assert runtime.pinned == {}

    runtime.refuses = 2
    launches: list[str] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: launches.append(device))
    with pytest.raises(RuntimeError, match=r"cannot pin 4000000 bytes: cudaHostRegister gave 2"):
        pinned_empty(1_000_000, torch.float32)
    assert launches == ["cuda"]  # one that takes the error the runtime remembers
    with pytest.raises(RuntimeError, match=r"no 288230376151711744 bytes"):
        pinned_empty(1 << 58, torch.uint8)


def test_cuda_lanes_issue_in_order_and_let_streams_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    FakeMark.passed = set()
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeMark)
    made: Any = {
        name: CudaLane(
            name,
            host_route,
            None,
            clock=lambda: (FakeMark(), 100.0),  # type: ignore[arg-type,return-value]
            stream=FakeStream(name, log),  # type: ignore[arg-type]
        )
        for name in ("up", "gpu")
    }
    gate = threading.Event()
    made["up"].run(gate.wait, WAIT_S)
    copy = made["up"].run(log.append, "copy")
    made["gpu"].wait(copy)
    update = made["gpu"].run(log.append, "update")
    assert not copy.is_done()
    gate.set()
    while not copy._settled.is_set() or not update._settled.is_set():
        pass
    assert log == ["copy", "gpu waits", "update"]
    assert not update.is_done()
    assert update.wait(0.01) is False
    FakeMark.passed |= {*copy.marks, *update.marks}
    assert update.wait(WAIT_S) is True
    assert (update.begin_s, update.end_s) == (102.0, 102.0)
    failed = made["up"].run(lambda: 1 / 0, label="launch")
    made["gpu"].wait(failed)
    with pytest.raises(DeviceError, match='"launch" failed: ZeroDivisionError'):
        failed.wait(WAIT_S)
    with pytest.raises(DeviceError, match='wait for "launch"'):
        made["gpu"].synchronize()
    for lane in made.values():
        lane._begin_close(cancel=False)
    for lane in made.values():
        lane._end_close(WAIT_S)
        assert not lane._thread.is_alive()
