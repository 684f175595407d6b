"""All kinds of device share one behaviour; what only one kind has is in test_device_kinds.py."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lowtide.core.device import Device, DeviceEvent, open_device
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError
from tests.helpers.devices import device_kinds, device_options

WAIT_S = 30.0  # only a broken lane ever waits that long


class Spans:
    """Stands for telemetry."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float, float, dict[str, Any]]] = []

    def add_span(self, name: str, lane: str, begin_s: float, end_s: float, **args: Any) -> None:
        if name == "refuse":
            raise RuntimeError("no space")
        self.rows.append((name, lane, begin_s, end_s, args))


def boom() -> None:
    raise ValueError("the cause")


@pytest.fixture(params=device_kinds())
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    made = open_device(request.param, **device_options(request.param))
    yield made
    for lane in made._lanes.values():
        lane.clear()
    made.close()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lowtide")]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), 7, (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_copy_brings_every_bit_there_and_back(
    device: Device, shape: Any, dtype: torch.dtype
) -> None:
    there, back = device.empty(shape, dtype), device.host_empty(shape, dtype)
    source = (torch.randn(shape if isinstance(shape, tuple) else (shape,)) * 9).to(dtype)
    assert there.dtype == dtype
    assert there.shape == source.shape
    assert device.owns(there)
    lane = device.lane("link")
    lane.copy(there, source)
    event = lane.copy(back, there)
    assert event.wait(WAIT_S)
    assert torch.equal(back, source)


def test_a_lane_works_in_order_and_returns_the_same_object_for_a_name(device: Device) -> None:
    seen: list[int] = []
    for number in range(50):
        device.lane("a").run(seen.append, number)
    device.synchronize()
    assert seen == list(range(50))
    assert device.lane("a") is device.lane("a")
    assert device.lane("a") is not device.lane("b")
    assert device.lane("a") is not device.host_lane("a")


def test_wait_orders_work_of_two_lanes_in_a_chain(device: Device) -> None:
    seen: list[int] = []
    lanes = [device.lane("a"), device.lane("b"), device.host_lane("c")]
    for number in range(30):
        lane = lanes[number % 3]
        event = lane.run(seen.append, number)
        lanes[(number + 1) % 3].wait(event)
    device.synchronize()
    assert seen == list(range(30))


def test_a_copy_sees_what_earlier_work_wrote_and_keeps_its_tensors(device: Device) -> None:
    back = torch.zeros(1000)
    lane = device.lane("work")
    there = device.empty(1000, torch.float32)
    lane.run(there.fill_, 3.0)
    lane.copy(back, there)
    del there
    lane.synchronize()
    assert bool((back == 3).all())


def test_times_of_events_are_ordered(device: Device) -> None:
    lane = device.lane("x")
    events = [lane.run(lambda: None, label=str(number)) for number in range(5)]
    lane.synchronize()
    for before, after in itertools.pairwise(events):
        assert before.begin_s <= before.end_s <= after.begin_s
    assert "x" in events[0].lane
    mark = device.record_event("mark")
    device.wait_event(mark)
    assert mark.wait(WAIT_S)
    assert mark.end_s >= events[-1].begin_s


def test_spans_name_lane_label_and_bytes() -> None:
    for kind in ["cpu", "emulated"]:
        spans = Spans()
        with open_device(kind, telemetry=spans, **device_options(kind)) as device:
            lane = device.lane("up")
            there = device.empty(256, torch.float32)
            event = lane.copy(there, torch.ones(256), label="subgroup 3")
            lane.wait(event)
            other = device.host_lane("adam").run(lambda: None, label="update 3")
        assert [row[0] for row in spans.rows].count("subgroup 3") == 1
        rows = {row[0]: row for row in spans.rows}
        assert set(rows) == {"subgroup 3", "update 3"}  # waiting draws nothing
        assert rows["subgroup 3"][1:] == (
            f"{device.name}/up", event.begin_s, event.end_s, {"bytes": 1024}
        )  # fmt: skip
        assert rows["update 3"][1] == f"{device.name}/adam (host)"
        assert rows["update 3"][2:] == (other.begin_s, other.end_s, {})


def test_a_failure_is_raised_with_lane_label_and_cause_until_it_is_cleared(device: Device) -> None:
    seen: list[str] = []
    lane = device.lane("broken")
    gate = threading.Event()
    host = device.host_lane("gate")
    lane.wait(host.run(gate.wait, WAIT_S) if device.kind != "cpu" else host.run(len, ""))
    failed = lane.run(boom, label="step 7")
    behind: DeviceEvent | None = None
    if device.kind != "cpu":  # an inline lane has failed already
        behind = lane.run(seen.append, "behind")
    gate.set()
    for ask in (failed.wait, failed.wait, lane.synchronize, device.synchronize):
        with pytest.raises(DeviceError, match=r'/broken": "step 7" failed: ValueError: the cause'):
            ask()
    with pytest.raises(DeviceError) as caught:
        lane.synchronize()
    assert isinstance(caught.value.__cause__, ValueError)
    if behind is not None:
        with pytest.raises(DeviceError, match=r'"append" was cancelled.*step 7'):
            behind.wait(WAIT_S)
        assert behind.is_done()
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"call clear\(\)"):
            lane.run(seen.append, "refused")
    with pytest.raises(DeviceError, match="no times"):
        _ = failed.end_s
    cause = lane.clear()
    assert isinstance(cause, ValueError)
    assert lane.clear() is None
    lane.run(seen.append, "after").wait(WAIT_S)
    assert seen == ["after"]


def test_a_failure_reaches_the_lanes_that_wait_for_it(device: Device) -> None:
    seen: list[str] = []
    first, second = device.lane("first"), device.lane("second")
    gate = threading.Event()
    if device.kind != "cpu":
        first.run(gate.wait, WAIT_S)
    event = first.run(boom, label="load")
    second.wait(event)
    if device.kind != "cpu":
        second.run(seen.append, "computed from nothing")
    gate.set()
    with pytest.raises(
        DeviceError, match=r'"wait for "load" of .*first" failed: .*ValueError: the cause'
    ):
        second.synchronize()
    assert seen == []


def test_running_out_of_memory_in_a_lane_keeps_its_type(device: Device) -> None:
    def allocate() -> None:
        raise DeviceOutOfMemoryError("staging")

    lane = device.lane("x")
    event = lane.run(allocate)
    with pytest.raises(DeviceOutOfMemoryError, match="staging"):
        event.wait()


def test_a_span_that_cannot_be_recorded_is_not_lost_in_silence() -> None:
    device = open_device("emulated", telemetry=Spans(), memory_bytes=1 << 16)
    device.lane("x").run(lambda: None, label="refuse")
    with pytest.raises(DeviceError, match="no space"):
        device.close()


def bad_copies(device: Device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    there = device.empty((4, 4), torch.float32)
    complex_there = device.empty(4, torch.complex64)
    return {
        "a lane converts nothing": (there, torch.zeros(4, 4, dtype=torch.bfloat16)),
        r"is \(4, 4\) of": (there, torch.zeros(16)),
        "source has strides": (there, torch.zeros(4, 4).t()),
        "destination has strides": (there.t(), torch.zeros(4, 4)),
        "tensor on meta": (there, torch.zeros(4, 4, device="meta")),
        "sparse": (there, torch.zeros(4, 4).to_sparse()),
        "plain contiguous": (complex_there, torch.zeros(4, dtype=torch.complex64).conj()),
    }


@pytest.mark.parametrize("number", range(7))
def test_a_copy_that_is_not_plain_is_refused_at_once(device: Device, number: int) -> None:
    text, (dst, src) = list(bad_copies(device).items())[number]
    with pytest.raises(DeviceError, match=text):
        device.lane("x").copy(dst, src)
    device.lane("x").synchronize()


def test_host_lanes_copy_between_host_tensors_on_their_own_thread(device: Device) -> None:
    source, back = torch.randn(5000), torch.empty(5000)
    lane = device.host_lane("capture")
    names: list[str] = []
    lane.run(lambda: names.append(threading.current_thread().name))
    assert lane.copy(back, source).wait(WAIT_S)
    assert torch.equal(back, source)
    assert names[0].startswith("lowtide")


def test_close_is_idempotent_final_and_leaves_no_thread(device: Device) -> None:
    seen: list[int] = []
    lane, host = device.lane("a"), device.host_lane("b")
    for number in range(20):
        lane.run(seen.append, number)
    host.run(seen.append, 20)
    kept = device.empty(8, torch.float32).fill_(5)
    device.close()
    device.close(cancel=True)
    assert sorted(seen) == list(range(21))
    assert not [name for name in threads() if device.name in name]
    for use in (
        lambda: lane.run(seen.append, 99),
        lambda: host.run(seen.append, 99),
        lambda: device.lane("new"),
        lambda: device.host_lane("new"),
        lambda: device.empty(1, torch.float32),
    ):
        with pytest.raises(DeviceError, match="closed"):
            use()
    assert bool((kept == 5).all())  # tensors outlive their device


def test_close_raises_a_failure_that_nobody_took(device: Device) -> None:
    with pytest.raises(DeviceError, match="ValueError: the cause"), device:
        device.lane("x").run(boom)
    assert not [name for name in threads() if device.name in name]


def test_an_error_in_the_with_block_is_not_replaced(device: Device) -> None:
    def use() -> None:
        with device:
            device.lane("x").run(boom)
            raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        use()


@pytest.mark.parametrize("kind", ["cpu", "emulated"])
def test_an_operation_lets_go_of_its_arguments_before_its_event_is_done(kind: str) -> None:
    class Payload:
        pass

    class Sink:
        def add_span(self, *_: Any, **__: Any) -> None:
            dead.append(alive() is None)  # called between the work and its event

    dead: list[bool] = []
    payload = Payload()
    alive = weakref.ref(payload)
    with open_device(kind, telemetry=Sink(), **device_options(kind)) as device:
        lane = device.lane("x")
        gate = threading.Event()
        if kind == "emulated":
            lane.wait(device.host_lane("gate").run(gate.wait, WAIT_S))
        else:
            gate.set()
        event = lane.run(id, payload, label="use")
        del payload
        gate.set()
        assert event.wait(WAIT_S)
        assert alive() is None
    assert dead[-1] is (kind == "emulated")  # inline, the caller's own variable still holds it


def test_memory_of_a_copy_is_free_when_its_event_is_done() -> None:
    with open_device("emulated", memory_bytes=1 << 20) as device:
        source = torch.ones(1000)
        for _ in range(200):
            event = device.lane("x").copy(device.empty(1000, torch.float32), source)
            assert event.wait(WAIT_S)
            assert device.free_bytes() == 1 << 20


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("cdua", {}, r'Did you mean "cuda"\? Known: "auto", "cpu"'),
        ("cpu", {"index": 1}, "index 1 does not exist"),
        ("emulated", {"index": -1}, "index -1"),
        ("cpu", {"memory_bytes": 5}, 'memory_bytes is only for kind "emulated"'),
        ("cpu", {"device_to_host_bytes_per_s": 5}, "device_to_host_bytes_per_s is only for"),
        ("emulated", {"memory_bytes": 0}, "must be positive"),
        ("emulated", {"host_to_device_bytes_per_s": float("nan")}, "must be positive and finite"),
        ("emulated", {"host_to_device_bytes_per_s": -1.0}, "must be positive and finite"),
    ],
)
def test_open_device_names_what_is_wrong(kind: str, options: dict[str, Any], text: str) -> None:
    before = threads()
    with pytest.raises(DeviceError, match=text):
        open_device(kind, **options)
    assert threads() == before


def test_auto_takes_what_is_there_and_cuda_says_what_it_looked_for() -> None:
    with open_device() as device:
        assert device.kind == ("cuda" if torch.cuda.is_available() else "cpu")
        assert 0 < device.free_bytes() <= device.memory_bytes
    with pytest.raises(DeviceError, match=r"torch .* sees \d+ GPUs; install .*emulated"):
        open_device("cuda", index=99)
