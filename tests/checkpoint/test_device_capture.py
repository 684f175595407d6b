"""Tensors on a device: copied by a lane after the save, before the update, or given up honestly.

The emulated device plays the GPU; where there is one, the same tests run on it too.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.files.torch_file import Layout
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.staging import Stager
from lowtide.checkpoint.staging.ring import Ring
from lowtide.checkpoint.writer.plan import FilePlan
from lowtide.core.device import Device, DeviceEvent, open_device
from lowtide.core.device.homes import Homes
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError
from lowtide.hosts import torch_loop
from tests.checkpoint.on_device import (
    EVER_S,
    PAGE,
    RINGS,
    Fault,
    Gate,
    assert_same,
    copy_of,
    load,
    place,
    save,
    saver_for,
    state_on,
    until,
)
from tests.helpers.devices import device_kinds

KINDS = [kind for kind in device_kinds() if kind != "cpu"]
ARENA = {"memory_bytes": 48 * MIB}


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    kind = request.param
    with open_device(kind, **(ARENA if kind == "emulated" else {})) as opened:
        yield opened


def ring_of(saver: Saver) -> Ring | None:
    return saver.stager._by_lane.ring


def is_copying(saver: Saver) -> bool:
    ring = ring_of(saver)
    return ring is not None and len(ring._free) + ring.held < 2


@pytest.fixture(params=["1", "0"], ids=["native writer", "Python writer"])
def writer(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    monkeypatch.setenv("LOWTIDE_NATIVE", request.param)


@pytest.mark.parametrize("ring_bytes", RINGS.values(), ids=RINGS)
@pytest.mark.usefixtures("writer")
def test_torch_reads_what_was_on_the_device(
    device: Device, tmp_path: Path, ring_bytes: int
) -> None:
    state = state_on(device)
    with saver_for(device, ring_bytes=ring_bytes) as saver:
        saving = save(saver, tmp_path, state)
        assert saver.wait(Stage.DRAINED, EVER_S), saving.error
        ring = ring_of(saver)
        assert ring is not None
        assert ring.memory.numel() == ring_bytes
        assert saver.stager.fallbacks == 0
        assert saving.eager_bytes == 0
    loaded = load(tmp_path)
    assert_same(loaded, state)
    assert loaded["view"].data_ptr() == loaded["large"][100:].data_ptr()
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert saving.describe()["bytes"] == (tmp_path / "step1" / "state.pt").stat().st_size


@pytest.mark.parametrize("ring_bytes", RINGS.values(), ids=RINGS)
@pytest.mark.usefixtures("writer")
def test_files_are_byte_for_byte_those_of_the_host_path(tmp_path: Path, ring_bytes: int) -> None:
    with open_device("emulated", **ARENA) as known, open_device("emulated", **ARENA) as unknown:
        with saver_for(known, ring_bytes=ring_bytes) as saver:
            save(saver, tmp_path / "lane", state_on(known))
            save(saver, tmp_path / "host", state_on(unknown), step=2)
            assert saver.wait(Stage.DRAINED, EVER_S)
            assert ring_of(saver) is not None
        by_lane = (tmp_path / "lane" / "step1" / "state.pt").read_bytes()
        is_same = by_lane == (tmp_path / "host" / "step2" / "state.pt").read_bytes()
        assert is_same  # not compared here: pytest would look for the difference for minutes


def test_save_returns_before_the_lane_copies_and_the_update_waits_for_it(
    device: Device, tmp_path: Path
) -> None:
    state = state_on(device)
    expected = copy_of(state)
    order: list[str] = []
    with saver_for(device) as saver:
        gate = Gate(device)
        saving = save(saver, tmp_path, state)
        order.append("save returned")
        until(lambda: ring_of(saver) is not None)
        assert saving.stage is Stage.REQUESTED
        (part,) = saving.parts
        assert not part.ticket.is_captured

        def update() -> None:
            saver.wait_captured()
            order.append("update")
            with torch.no_grad():
                state["large"].zero_()

        training = threading.Thread(target=update)
        training.start()
        training.join(0.3)
        assert training.is_alive()
        order.append("copied")
        gate.open()
        training.join(EVER_S)
        assert saving.stage is not Stage.REQUESTED
        assert saver.wait(Stage.DRAINED, EVER_S), saving.error
    assert order == ["save returned", "copied", "update"]
    assert_same(load(tmp_path), expected)


def test_a_slow_link_is_not_waited_for_at_the_save(tmp_path: Path) -> None:
    slow = {**ARENA, "device_to_host_bytes_per_s": 60e6}
    with open_device("emulated", **slow) as device, saver_for(device) as saver:
        state = state_on(device)
        expected = copy_of(state)
        saving = save(saver, tmp_path, state)
        assert saving.stage is Stage.REQUESTED
        assert saver.wait_captured() > 0.0
        assert saving.stage is not Stage.REQUESTED
        for name in ("large", "bytes", "middle", "host"):
            state[name].zero_()  # the update
        assert saver.wait(Stage.DRAINED, EVER_S), saving.error
    assert_same(load(tmp_path), expected)


def test_the_lane_waits_for_what_was_queued_before_the_save(
    device: Device, tmp_path: Path, monkeypatch: Any
) -> None:
    queued = DeviceEvent("training", "what came before the save")
    monkeypatch.setattr(device, "record_event", lambda _label: queued)
    tensor = place(device, torch.zeros(2 * MIB))
    with saver_for(device) as saver:
        saving = save(saver, tmp_path, {"tensor": tensor})
        until(lambda: ring_of(saver) is not None)
        time.sleep(0.05)
        tensor.data.fill_(7.0)  # the queued work; nothing that PyTorch counts
        queued._settle((0.0, 0.0))
        assert saver.wait(Stage.DRAINED, EVER_S), saving.error
    assert torch.equal(load(tmp_path)["tensor"].cpu(), torch.full((2 * MIB,), 7.0))


def test_what_is_not_stable_is_copied_at_once(device: Device, tmp_path: Path) -> None:
    state = {"stable": place(device, torch.ones(MIB)), "average": place(device, torch.ones(MIB))}
    with saver_for(device) as saver:
        gate = Gate(device)
        saving = save(saver, tmp_path, state, is_stable=lambda t: t is state["stable"])
        state["average"].zero_()
        gate.open()
        assert saver.wait(Stage.DRAINED, EVER_S), saving.error
    assert saving.eager_bytes == 4 * MIB
    assert torch.equal(load(tmp_path)["average"].cpu(), torch.ones(MIB))


def test_not_lazy_is_captured_when_the_save_returns(device: Device, tmp_path: Path) -> None:
    state = state_on(device)
    expected = copy_of(state)
    with saver_for(device, lazy=False) as saver:
        saving = save(saver, tmp_path, state)
        assert saving.stage is not Stage.REQUESTED
        state["large"].zero_()
        assert saver.wait(Stage.DRAINED, EVER_S), saving.error
    assert_same(load(tmp_path), expected)


def test_several_checkpoints_in_flight(device: Device, tmp_path: Path) -> None:
    states = [{"w": place(device, torch.full((5 * MIB // 4 + n,), float(n)))} for n in range(4)]
    with saver_for(device) as saver:
        gate = Gate(device)
        for step, state in enumerate(states):
            save(saver, tmp_path, state, step=step)
        save(saver, tmp_path, {"on the host": torch.ones(10)}, step=9)
        assert {saving.stage for saving in saver.history} == {Stage.REQUESTED}
        gate.open()
        assert saver.wait(Stage.DRAINED, EVER_S)
    for step, state in enumerate(states):
        assert_same(load(tmp_path, step), state)


def test_a_change_before_the_copy_gives_the_checkpoint_up(device: Device, tmp_path: Path) -> None:
    state = state_on(device)
    with saver_for(device) as saver:
        gate = Gate(device)
        saving = save(saver, tmp_path, state)
        state["small"].add_(1.0)
        gate.open()
        assert not saver.wait(Stage.DRAINED, EVER_S)
        assert "1 tensors of state.pt were changed between" in str(saving.error)
        assert not (tmp_path / "step1").exists()
        save(saver, tmp_path, state, step=2)
        assert saver.wait(Stage.DRAINED, EVER_S)
    assert_same(load(tmp_path, 2), state)


def test_an_update_waits_no_longer_than_allowed(
    device: Device, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("lowtide.checkpoint.saving.CANCEL_S", 0.1)
    state = state_on(device)
    with saver_for(device, max_wait_s=0.2) as saver:
        gate = Gate(device)
        saving = save(saver, tmp_path, state)
        saver.wait_captured()
        assert "was not copied within 0.2 s" in str(saving.error)
        gate.open()
        until(lambda: saving.has_ended)
        until(lambda: not saver.stager._feeds)
    with saver_for(device) as saver:
        save(saver, tmp_path, state, step=2)
        assert saver.wait(Stage.DRAINED, EVER_S)
    assert_same(load(tmp_path, 2), state)


@pytest.mark.parametrize("ring_bytes", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize("how", ["refused", "fails"])
def test_whichever_copy_fails_the_training_thread_copies_the_rest(
    device: Device, tmp_path: Path, how: str, ring_bytes: int
) -> None:
    state = state_on(device)
    expected = copy_of(state)
    with saver_for(device, ring_bytes=ring_bytes) as saver:
        healthy = Fault(device, at=-1, how=how)
        save(saver, tmp_path, state, step=0)
        assert saver.wait(Stage.DRAINED, EVER_S)
        healthy.remove()
        assert healthy.copies > 6
        for at in range(healthy.copies):
            fault = Fault(device, at, how)
            saving = save(saver, tmp_path, state, step=at + 1)
            saver.wait_captured()
            assert saving.error is None
            state["large"].zero_()
            assert saver.wait(Stage.DRAINED, EVER_S), saving.error
            state["large"].copy_(expected["large"])
            fault.remove()
            assert fault.copies > at
            assert saver.stager.fallbacks == at + 1
            assert_same(load(tmp_path, at + 1), expected)
        save(saver, tmp_path, state, step=99)
        assert saver.wait(Stage.DRAINED, EVER_S)
        assert saver.stager.fallbacks == healthy.copies, "the lane is used again"


def test_a_change_before_the_fallback_gives_the_checkpoint_up(
    device: Device, tmp_path: Path
) -> None:
    state = state_on(device)
    with saver_for(device) as saver:
        Fault(device, 1, "fails")
        saving = save(saver, tmp_path, state)
        until(lambda: saver.stager.fallbacks == 1)
        state["large"].add_(1.0)
        saver.wait_captured()
        assert "were changed between" in str(saving.error)
        assert not saver.wait(Stage.DRAINED, EVER_S)
        assert not (tmp_path / "step1").exists()


@pytest.mark.parametrize("error", [DeviceOutOfMemoryError("no"), RuntimeError("no"), MemoryError()])
def test_without_pinned_memory_it_is_copied_all_the_same(
    device: Device, tmp_path: Path, monkeypatch: Any, error: Exception
) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise error

    state = state_on(device)
    with saver_for(device) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(device, "host_empty", refuse)
            for step in (1, 2):
                save(saver, tmp_path, state, step=step)
                assert saver.wait(Stage.DRAINED, EVER_S)
            assert saver.stager.fallbacks == 2
            assert ring_of(saver) is None
        save(saver, tmp_path, state, step=3)
        assert saver.wait(Stage.DRAINED, EVER_S)
        assert saver.stager.fallbacks == 2
    for step in (1, 2, 3):
        assert_same(load(tmp_path, step), state)


def test_without_any_memory_the_checkpoint_is_given_up_and_training_goes_on(
    device: Device, tmp_path: Path, monkeypatch: Any
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("there is no memory at all")

    state = state_on(device)
    with saver_for(device) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(device, "host_empty", refuse)
            patch.setattr(Ring, "plain", refuse)
            saving = save(saver, tmp_path, state)
            saver.wait_captured()
            expected = "state.pt: tensors on a device cannot be copied: there is no memory"
            assert expected in str(saving.error)
            assert not saver.wait(Stage.DRAINED, EVER_S)
        save(saver, tmp_path, state, step=2)
        assert saver.wait(Stage.DRAINED, EVER_S)
    assert not (tmp_path / "step1").exists()
    assert_same(load(tmp_path, 2), state)


def test_an_event_that_cannot_be_recorded_means_copying_at_once(
    device: Device, tmp_path: Path, monkeypatch: Any
) -> None:
    def refuse(_label: str) -> DeviceEvent:
        raise RuntimeError("no event")

    state = state_on(device)
    with saver_for(device) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(device, "record_event", refuse)
            save(saver, tmp_path, state)
            assert saver.wait(Stage.DRAINED, EVER_S)
        assert saver.stager.fallbacks == 1
    assert_same(load(tmp_path), state)


def test_a_disk_that_fails_leaves_no_copy_under_way(device: Device, tmp_path: Path) -> None:
    state = state_on(device)
    with saver_for(device) as saver:
        gate = Gate(device)
        saving = save(saver, tmp_path, state)
        (part,) = saving.parts
        until(lambda: is_copying(saver))
        part.ticket.cancel()  # as an error of the disk would end it
        training = threading.Thread(target=saver.wait_captured)
        training.start()
        training.join(0.2)
        assert training.is_alive(), "the lane is not through with the tensors"
        gate.open()
        training.join(EVER_S)
        assert not training.is_alive()
        assert not saver.stager._feeds
        assert not saver.wait(Stage.DRAINED, EVER_S)


def test_a_state_that_cannot_be_pickled_leaves_nothing_behind(
    device: Device, tmp_path: Path
) -> None:
    state = {"w": place(device, torch.ones(9 * MIB)), "odd": lambda: None}
    with saver_for(device) as saver:
        saver.begin(tmp_path, "step1", step=1, details={"config": {}, "client_keys": []})
        with pytest.raises(Exception, match="pickle"):
            saver.add(state, "state.pt", is_stable=lambda _: True)
        assert not saver.stager._feeds
        save(saver, tmp_path, {"w": state["w"]}, step=2)
        assert saver.wait(Stage.DRAINED, EVER_S)
    assert_same(load(tmp_path, 2), {"w": state["w"]})


def close_in_the_middle(device: Device, folder: Path, *, is_failed: bool) -> None:
    with saver_for(device, max_wait_s=0.2) as saver:
        gate = Gate(device)
        if is_failed:
            Fault(device, 0, "refused")
        saving = save(saver, folder, state_on(device))
        threading.Timer(0.5, gate.open).start()
        saver.close(0.5)
        until(lambda: saving.has_ended)
        thread = saver.stager._thread
        assert thread is not None
        thread.join(EVER_S)
        assert not thread.is_alive()
    assert not (folder / "step1").exists() or load(folder)


@pytest.mark.parametrize("is_failed", [False, True], ids=["lane stands still", "lane has failed"])
def test_closing_in_the_middle(
    device: Device, tmp_path: Path, is_failed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    free_bytes = device.free_bytes()
    close_in_the_middle(device, tmp_path, is_failed=is_failed)
    caplog.clear()  # its records keep errors, and these the frames that they went through
    until(lambda: gc.collect() >= 0 and device.free_bytes() >= free_bytes)


def test_fifty_saves_take_no_more_memory_than_ten(device: Device, tmp_path: Path) -> None:
    made: list[int] = []
    stock = device.host_empty

    def host_empty(shape: Any, dtype: torch.dtype) -> torch.Tensor:
        made.append(shape)
        return stock(shape, dtype)

    device.host_empty = host_empty  # type: ignore[method-assign]
    free_bytes, after_ten = device.free_bytes(), 0
    with saver_for(device, keep=1) as saver:
        for step in range(50):
            weights = place(device, torch.full((5 * MIB // 4,), float(step)))
            save(saver, tmp_path, {"w": weights}, step=step)
            saver.wait_captured()
            weights.zero_()
            if step % 10 == 9:
                assert saver.wait(Stage.DRAINED, EVER_S)
            after_ten = _resident_bytes() if step == 9 else after_ten
        grown = _resident_bytes() - after_ten
        assert torch.equal(load(tmp_path, 49)["w"].cpu(), torch.full((5 * MIB // 4,), 49.0))
        del weights
        gc.collect()
        saver.writer.facts()  # lets go of what is captured
        assert device.kind != "emulated" or device.free_bytes() == free_bytes
    assert made == [8 * MIB]
    assert grown < 16 * MIB


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


def test_a_model_on_a_device_trains_on_while_it_is_saved(tmp_path: Path, monkeypatch: Any) -> None:
    with open_device("emulated", **ARENA) as device:
        monkeypatch.setattr("lowtide.checkpoint.plugin.Homes", lambda **_: Homes([device]))
        model = torch.nn.Linear(64, 64)
        for parameter in model.parameters():
            parameter.data = place(device, parameter.data)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = {"lowtide": {"checkpoint": {"host_buffer_bytes": 16 * MIB}}}
        loop = torch_loop.attach(model, optimizer, config=config)
        checkpoint = loop.session.checkpoint
        for step in range(4):
            loop.backward(model(torch.ones(2, 64)).square().mean())
            gate = Gate(device)
            expected = {name: value.clone() for name, value in model.state_dict().items()}
            checkpoint.save(tmp_path, {"state.pt": model.state_dict()}, tag=f"step{step}")
            gate.open()
            optimizer.step()
            assert checkpoint.wait("committed", EVER_S)
            assert_same(load(tmp_path, step), expected)
            assert not torch.equal(model.weight, expected["weight"])
        resolved = loop.session.config.as_dict()
        loop.close()
        assert resolved["checkpoint"]["pinned_buffer_bytes"] == 16 * MIB
        counters = loop.session.telemetry.snapshot()["counters"]
        assert counters["lowtide.checkpoint.eager_bytes"] == 0


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE
