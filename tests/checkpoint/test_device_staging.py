"""The way from a device to the writer by itself: slots, what is told when, and homes."""

from __future__ import annotations

import ctypes
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.files.torch_file import Layout
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.staging import Stager
from lowtide.checkpoint.staging.movers import LANE
from lowtide.checkpoint.writer.plan import LITERAL, FilePlan
from lowtide.core.device import Device, open_device
from lowtide.core.device.homes import Homes
from lowtide.core.errors import DeviceError
from tests.checkpoint.on_device import (
    ARENA,
    EVER_S,
    Fault,
    Operations,
    assert_same,
    copy_of,
    load,
    many_on,
    place,
    save,
    saver_for,
    until,
)


def fill(device: Device) -> list[torch.Tensor]:
    """Take all memory that a device has left."""
    taken, size = [], device.memory_bytes
    while size >= 512:
        try:
            taken.append(device.empty(size, torch.uint8))
        except DeviceError:
            size //= 2
    return taken


class SlowTicket:
    """A writer that captures what the test says."""

    error = None

    def __init__(self) -> None:
        self.captured = 0
        self.told: list[FilePlan] = []
        self.is_whole = False

    def extend(self, plan: FilePlan, *, is_partial: bool = False) -> None:
        self.told.append(plan)
        self.is_whole = not is_partial

    def captured_chunks(self) -> int:
        return self.captured

    def bytes_of(self, chunk: int, chunk_bytes: int) -> bytes:
        """Return what the plan told last says about a chunk, read when this is called."""
        plan, found = self.told[-1], b""
        columns = (plan.offsets, plan.lengths, plan.addresses)
        for offset, length, address in zip(*(each.tolist() for each in columns), strict=True):
            begin = max(offset, chunk * chunk_bytes)
            end = min(offset + length, (chunk + 1) * chunk_bytes)
            if begin < end:
                found += ctypes.string_at(address + begin - offset, end - begin)
        return found


def test_a_slot_is_used_again_when_the_writer_has_captured_it_and_not_before(
    tmp_path: Path,
) -> None:
    chunk = 4096
    state = {"w": torch.arange(5 * chunk // 4)}  # 10 chunks, and their headers
    with open_device("emulated", **ARENA) as device:
        placed = {"w": place(device, state["w"])}
        stager = Stager(Homes([device]), pinned_bytes=2 * chunk, chunk_bytes=chunk)
        lay = {"path": tmp_path / "file", "is_stable": lambda _: True}
        plan = Layout(placed, homes=stager.homes, **lay).finish().plan
        expected = read_plan(Layout({"w": state["w"]}, **lay).finish().plan)
        assert plan.size_bytes == len(expected)
        ticket = SlowTicket()
        feed = stager.open(ticket)  # type: ignore[arg-type]
        feed.put(plan, is_partial=False)
        chunks = -(-plan.size_bytes // chunk)
        for number in range(chunks):
            until(lambda n=number: known(ticket) > n * chunk)  # type: ignore[misc]
            time.sleep(0.01)  # if it told too much, it would do it now
            assert known(ticket) <= (number + 2) * chunk + 512, "two slots hold two chunks"
            until(lambda n=number: known(ticket) >= min((n + 1) * chunk, plan.size_bytes))  # type: ignore[misc]
            assert ticket.bytes_of(number, chunk) == expected[number * chunk :][:chunk]
            ticket.captured = number + 1
        assert ticket.is_whole
        assert feed.wait_over(EVER_S)
        assert stager.close(timeout_s=EVER_S)


def test_a_file_that_is_told_in_parts_keeps_what_has_landed(
    tmp_path: Path, monkeypatch: Any
) -> None:
    chunk = 4096
    monkeypatch.setattr("lowtide.checkpoint.files.ranges.FIRST_BATCH_BYTES", chunk)
    state = {str(n): torch.arange(3 * chunk // 8) + n for n in range(12)}
    lay = {"path": tmp_path / "file", "is_stable": lambda _: True}
    with open_device("emulated", **ARENA) as device:
        stager = Stager(Homes([device]), pinned_bytes=64 * chunk, chunk_bytes=chunk)
        placed = {name: place(device, value) for name, value in state.items()}
        layout = Layout(placed, homes=stager.homes, **lay)
        ticket = SlowTicket()
        feed = stager.open(ticket)  # type: ignore[arg-type]
        parts = 0
        for parts, plan in enumerate(layout.beginnings(), 1):  # noqa: B007 - looked at below
            feed.put(plan, is_partial=True)
            until(lambda size=plan.size_bytes: known(ticket) >= size // chunk * chunk)  # type: ignore[misc]
            assert not ticket.is_whole
        assert parts > 1
        feed.put(layout.finish().plan, is_partial=False)
        assert feed.wait_over(EVER_S)
        assert ticket.is_whole
        for longer, shorter in itertools.pairwise(reversed(ticket.told)):
            is_tensor = shorter.entries != LITERAL
            count = len(shorter.offsets)
            assert (longer.addresses[:count] == shorter.addresses)[is_tensor].all()
        found = read_plan(ticket.told[-1])
        assert found == read_plan(layout_on_host(placed, lay))
        assert stager.close(timeout_s=EVER_S)


def layout_on_host(state: dict[str, Any], lay: dict[str, Any]) -> FilePlan:
    layout = Layout(state, **lay)  # without homes, an emulated device is host memory
    plan = layout.finish().plan
    plan.owners.append(layout)
    return plan


def known(ticket: SlowTicket) -> int:
    return ticket.told[-1].size_bytes if ticket.told else 0


def read_plan(plan: FilePlan) -> bytes:
    columns = (plan.addresses.tolist(), plan.lengths.tolist())
    return b"".join(ctypes.string_at(*piece) for piece in zip(*columns, strict=True))


def test_homes_know_host_memory_and_given_devices() -> None:
    with open_device("emulated", **ARENA) as device:
        homes = Homes([device])
        assert homes.of(torch.ones(3)) is None
        assert homes.of(device.empty(3, torch.float32)[1:]) is device
        assert Homes().of(device.empty(3, torch.float32)) is None
        with pytest.raises(DeviceError, match="meta"):
            homes.of(torch.ones(3, device="meta"))
        homes.close()
        assert device.empty(1, torch.uint8).numel() == 1, "it belongs to who opened it"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_homes_open_a_gpu_once() -> None:
    homes, tensor = Homes(), torch.ones(3, device="cuda:0")
    device = homes.of(tensor)
    assert device is not None
    assert device.owns(tensor)
    assert homes.of(tensor[1:]) is device
    homes.close(timeout_s=EVER_S)


@pytest.mark.parametrize("has_room", [True, False], ids=["packed", "no room to pack"])
def test_small_neighbours_are_copied_together(tmp_path: Path, has_room: bool) -> None:
    with open_device("emulated", **ARENA) as device:
        state = many_on(device, 500)
        expected = copy_of(state)
        rest = [] if has_room else [fill(device)]
        operations = Operations(device)
        with saver_for(device) as saver:
            saving = save(saver, tmp_path, state)
            assert saver.wait(Stage.DRAINED, EVER_S), saving.error
            assert saver.stager.fallbacks == 0
            assert saving.eager_bytes == 0
        del rest
    assert_same(load(tmp_path), expected)
    assert operations.count < 20 if has_room else operations.count >= 500


def test_memory_to_pack_in_is_not_written_before_its_stream_is_through_with_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[str] = []
    with open_device("emulated", **ARENA) as device:
        state, lane = many_on(device, 500), device.lane(LANE)
        stock = {name: getattr(owner, name) for owner, name in ((device, "empty"), (lane, "run"))}
        wait = lane.wait

        def noted(name: str) -> Any:
            return lambda *args, **rest: asked.append(name) or stock[name](*args, **rest)

        monkeypatch.setattr(device, "empty", noted("empty"))
        monkeypatch.setattr(lane, "run", noted("run"))
        monkeypatch.setattr(lane, "wait", lambda event: asked.append(event.label) or wait(event))
        with saver_for(device) as saver:
            save(saver, tmp_path, state)
            assert saver.wait(Stage.DRAINED, EVER_S)
    first = asked.index("empty")
    assert asked[first : first + 3] == ["empty", "packing", "run"]
    assert asked.count("packing") == 1


def test_small_neighbours_are_copied_together_when_the_lane_is_ill(tmp_path: Path) -> None:
    with open_device("emulated", **ARENA) as device:
        state = many_on(device, 500)
        expected = copy_of(state)
        fault = Fault(device, 1, "fails")
        with saver_for(device) as saver:
            saving = save(saver, tmp_path, state)
            assert saver.wait(Stage.DRAINED, EVER_S), saving.error
            assert saver.stager.fallbacks == 1
        fault.remove()
    assert_same(load(tmp_path), expected)
