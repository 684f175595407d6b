"""Tensors on a device: copied by a lane after the save, before the update, or given up honestly.

The emulated device plays the GPU; where there is one, the same tests run on it too.
"""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saving import Stage
from lowtide.core.device import Device, DeviceEvent, open_device
from lowtide.core.device.homes import Homes
from lowtide.hosts import torch_loop
from tests.checkpoint.on_device import (
    ARENA,
    EVER_S,
    RINGS,
    Gate,
    assert_same,
    copy_of,
    load,
    place,
    ring_of,
    save,
    saver_for,
    state_on,
    until,
)
from tests.helpers.plugin_suite import resident_bytes


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
            after_ten = resident_bytes() if step == 9 else after_ten
        grown = resident_bytes() - after_ten
        assert torch.equal(load(tmp_path, 49)["w"].cpu(), torch.full((5 * MIB // 4,), 49.0))
        del weights
        gc.collect()
        saver.writer.facts()  # lets go of what is captured
        assert device.kind != "emulated" or device.free_bytes() == free_bytes
    assert made == [8 * MIB]
    assert grown < 16 * MIB


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
