"""Lanes, memory and disks that fail while tensors come from a device."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.staging.ring import Ring
from lowtide.core.device import Device, DeviceEvent
from lowtide.core.errors import DeviceOutOfMemoryError
from tests.checkpoint.on_device import (
    EVER_S,
    RINGS,
    Fault,
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


def is_copying(saver: Saver) -> bool:
    ring = ring_of(saver)
    return ring is not None and len(ring._free) + ring.held < 2


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
