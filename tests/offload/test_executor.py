"""The executor: any plan, on any device, with any failure, gives the bits of the host alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch

from lowtide.core.device import Device, Lane, open_device
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError, StorageError
from lowtide.core.state import Location, StateAuthority
from lowtide.offload import executor as executor_module
from lowtide.offload import one_update
from lowtide.offload.adam import Powers, adam_step
from lowtide.offload.executor import Executor
from lowtide.offload.gradients import GroupGradients, Span
from lowtide.offload.one_update import Pace, Work
from lowtide.offload.plan import build_plan, host_only_plan, random_plan
from lowtide.offload.schedule import Plan
from lowtide.offload.subgroup import ALIGNMENT, Subgroup, cuts
from tests.helpers.devices import device_kinds, device_options

SIZES = (48, 1024, 16, 640, 2048, 352)
BETAS = (0.9, 0.95)
KEEPERS = (1, 3, 4)  # those whose gradients may accumulate on the device


class Accumulation:
    """The accumulation buffer of one subgroup: two parameters, and a rest that stays there."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(numel, dtype=dtype)
        third = numel // 3
        self._spans = [Span(0, 0, third), Span(1, third, numel - third - 5)]
        self._buffers = {span.key: span.of(self.flat) for span in self._spans}
        self.gradients = GroupGradients(
            self.flat, self._spans, lambda: torch.zeros(numel), self._relink
        )

    def _relink(self, key: Hashable, there: torch.Tensor | None) -> None:
        span = next(each for each in self._spans if each.key == key)
        self._buffers[key] = span.of(self.flat) if there is None else there

    def write(self, gradient: torch.Tensor) -> None:
        """A backward pass."""
        self.flat[-5:] = gradient[-5:]
        for span in self._spans:
            self._buffers[span.key].copy_(span.of(gradient))


class Bench:
    """Some subgroups, their gradients of every step, and an executor."""

    def __init__(
        self,
        device: Device,
        dtype: torch.dtype = torch.bfloat16,
        memory_bytes: float = math.inf,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        place = device.torch_device

        def draw(numel: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(numel, generator=generator) * scale

        self.accumulations = {i: Accumulation(SIZES[i], dtype) for i in KEEPERS}
        self.subgroups = [
            Subgroup(
                key=f"subgroup/{i}", group=0, flat=i, begin=0, master=draw(numel),
                exp_avg=draw(numel, 0.1), exp_avg_sq=draw(numel, 0.1).square(),
                weights=torch.zeros(numel, dtype=dtype, device=place),
                keeper=self.accumulations[i].gradients.keeper(0, numel) if i in KEEPERS else None,
            )
            for i, numel in enumerate(SIZES)
        ]  # fmt: skip
        self.gradients = [[draw(numel).to(dtype) for numel in SIZES] for _ in range(12)]
        self.authority = StateAuthority()
        self.executor = Executor(device, self.subgroups, self.authority, memory_bytes=memory_bytes)
        self._powers = Powers(*BETAS)
        self.step = 0

    def works(self, *, is_whole: bool = True) -> list[Work]:
        """Return what the coming update needs; not whole: with gradients that somebody changed."""
        self.step += 1
        step = adam_step(
            self._powers.advance(self.step, *BETAS), lr=0.01, betas=BETAS, eps=1e-8,
            weight_decay=0.1,
        )  # fmt: skip
        works = []
        for i, gradient in enumerate(self.gradients[self.step - 1]):
            if i not in KEEPERS:
                works.append(Work(gradient, 0.25, step))
                continue
            self.accumulations[i].write(gradient)
            found = Work(self.accumulations[i].flat, 0.25, step, is_accumulated=True)
            works.append(found if is_whole else Work(gradient.float() * 0.25, 1.0, step))
        return works

    def run(self, plan: Plan | None = None) -> Any:
        """Do one update."""
        works = self.works()
        return self.executor.run(plan or host_only_plan(self.executor.pieces()), works)

    def plan(
        self, *, residents: tuple[int, ...] = (), staged: tuple[int, ...] = (), slots: int = 1
    ) -> Plan:
        """Return a plan with these on the device, in this order."""
        pieces = self.executor.pieces()
        device = (*staged, *residents)
        return build_plan(
            pieces, residents=residents, device_order=device,
            host_order=[i for i in range(len(SIZES)) if i not in device], slots=slots,
        )  # fmt: skip

    def state(self) -> list[torch.Tensor]:
        """Return copies of all state, as it is on the host, and of the weights."""
        tensors = [t for each in self.subgroups for t in (*each.state(), each.weights)]
        return [t.detach().cpu().clone() for t in tensors if t is not None]


@pytest.fixture(params=device_kinds())
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param, **device_options(request.param)) as opened:
        yield opened


@pytest.fixture
def emulated() -> Iterator[Device]:
    opened = open_device("emulated", **device_options("emulated"))
    yield opened
    with pytest.MonkeyPatch.context() as patch:  # a lane may hold a failure that a test wanted
        patch.setattr(opened, "synchronize", lambda: None)
        for lane in opened._lanes.values():
            lane.clear()
        opened.close()


def expected(steps: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Return the state after some updates on the host alone."""
    with open_device("cpu") as cpu:
        bench = Bench(cpu, dtype)
        for _ in range(steps):
            bench.run()
        return bench.state()


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def can_move(device: Device) -> bool:
    return device.kind != "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_plans_give_the_bits_of_the_host(device: Device, dtype: torch.dtype) -> None:
    bench = Bench(device, dtype)
    lanes = set()
    for seed in range(12):
        works = bench.works(is_whole=seed not in (5, 6))
        pieces = bench.executor.pieces()
        memory = 1 << 20 if can_move(device) else 0
        trace = bench.executor.run(random_plan(pieces, seed, memory_bytes=memory), works)
        lanes |= {each.lane for each in trace.operations()}
        assert not trace.is_degraded
    bench.executor.drain()
    assert_same(bench.state(), expected(12, dtype))
    moving = {"prefetch", "device", "flush", "upload"} if can_move(device) else set()
    assert lanes == {"host", *moving}


def test_trace_lists_every_update_once_with_its_bytes(emulated: Device) -> None:
    bench = Bench(emulated)
    trace = bench.run(bench.plan(residents=(0,), staged=(4, 1), slots=2))
    operations = trace.operations()
    updated = {each.subgroup: each.lane for each in operations if each.params}
    assert updated == {
        "subgroup/0": "device", "subgroup/1": "device", "subgroup/4": "device",
        "subgroup/2": "host", "subgroup/3": "host", "subgroup/5": "host",
    }  # fmt: skip
    moved = {
        lane: sum(each.nbytes for each in operations if each.lane == lane)
        for lane in ("prefetch", "flush", "upload")
    }
    staged = SIZES[4] + SIZES[1]
    assert moved["prefetch"] == 14 * (staged + SIZES[0])  # a new resident is brought there too
    assert moved["flush"] == 12 * staged
    assert moved["upload"] == 2 * (SIZES[2] + SIZES[3] + SIZES[5])
    assert all(trace.begin_s <= e.begin_s <= e.end_s <= trace.end_s for e in operations)
    again = bench.run(bench.plan(residents=(0,), staged=(4, 1), slots=2)).operations()
    assert sum(e.nbytes for e in again if e.subgroup == "subgroup/0") == 2 * SIZES[0]


def test_a_residents_gradients_stay_on_the_device(emulated: Device) -> None:
    bench = Bench(emulated)
    plan = bench.plan(residents=(1, 3))
    assert (plan.slots, plan.resident_bytes) == (0, (12 + 2) * (SIZES[1] + SIZES[3]))
    first = bench.run(plan).operations()
    assert sum(e.nbytes for e in first if e.lane == "prefetch") == plan.resident_bytes
    assert bench.executor.resident_bytes() == plan.resident_bytes
    for _ in range(2):
        again = bench.run(plan).operations()
        assert sum(e.nbytes for e in again if e.lane == "prefetch") == 2 * 2 * 5
    assert not bench.accumulations[1].flat[:-5].any()
    bench.run(bench.plan(residents=(3,)))  # one goes home, with the gradients that came meanwhile
    assert torch.equal(bench.accumulations[1].flat, bench.gradients[3][1])
    unusual = bench.executor.run(bench.plan(residents=(3,)), bench.works(is_whole=False))
    sizes = [e.nbytes for e in unusual.operations() if e.lane == "prefetch"]
    assert sizes == [4 * SIZES[3]]  # somebody had changed the float32 gradients
    assert not unusual.is_degraded
    bench.executor.close()
    assert torch.equal(bench.accumulations[3].flat, bench.gradients[4][3])
    assert_same(bench.state(), expected(5))


@pytest.mark.parametrize(
    ("plan", "is_whole", "slots", "on_device"),
    [
        ({"residents": (1, 3)}, False, [], set()),  # no slot was planned, as gradients stay
        ({"residents": (1, 3), "staged": (4,), "slots": 2}, False, [16 * 2048], {1, 3, 4}),
        ({"residents": (1, 3), "staged": (4,), "slots": 1}, False, [4 * 1024], {1, 3}),
        ({"residents": (0,), "staged": (1,), "slots": 2}, True, [14 * 1024] * 2, {0, 1}),
        ({"residents": (4, 5), "staged": (2,), "slots": 1}, True, [2 * 352], {2, 4, 5}),
    ],
)
def test_an_update_takes_no_more_memory_than_was_planned(
    emulated: Device,
    monkeypatch: pytest.MonkeyPatch,
    plan: dict[str, Any],
    is_whole: bool,
    slots: list[int],
    on_device: set[int],
) -> None:
    wanted = Bench(emulated).plan(**plan)
    bench = Bench(emulated, memory_bytes=wanted.device_bytes)
    found: list[int] = []
    make = executor_module.make_slots

    def noted(*args: Any) -> Any:
        made = make(*args)
        found[:] = [slot.memory.nbytes for slot in made]
        assert sum(found) + bench.executor.resident_bytes() <= wanted.device_bytes
        return made

    monkeypatch.setattr(executor_module, "make_slots", noted)
    bench.run(wanted)
    trace = bench.executor.run(wanted, bench.works(is_whole=is_whole))
    assert found == slots
    assert {int(e.subgroup[-1]) for e in trace.operations() if e.lane == "device"} == on_device
    assert not trace.is_degraded, "there is no less memory than was planned with"
    bench.run(wanted)
    bench.executor.close()
    assert_same(bench.state(), expected(3))


def test_slots_are_not_filled_before_they_are_free(emulated: Device) -> None:
    slow = open_device("emulated", memory_bytes=1 << 20, host_to_device_bytes_per_s=2e6,
                       device_to_host_bytes_per_s=1e6)  # fmt: skip
    with slow:
        bench = Bench(slow)
        trace = bench.run(bench.plan(staged=(4, 1, 3, 5), slots=2))
        by_lane: dict[str, dict[str, tuple[float, float]]] = {}
        for each in trace.operations():
            known = by_lane.setdefault(each.lane, {}).get(each.subgroup, (each.begin_s, 0.0))
            by_lane[each.lane][each.subgroup] = (known[0], each.end_s)
        order = ["subgroup/4", "subgroup/1", "subgroup/3", "subgroup/5"]
        for turn, key in enumerate(order):
            assert by_lane["device"][key][0] >= by_lane["prefetch"][key][1]
            assert by_lane["flush"][key][0] >= by_lane["device"][key][1]
            if turn >= 2:
                assert by_lane["prefetch"][key][0] >= by_lane["flush"][order[turn - 2]][1]
        bench.executor.drain()
        assert_same(bench.state(), expected(1))


def test_authority_knows_where_the_newest_copy_is(emulated: Device) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(residents=(1, 3)))
    keys = bench.authority.keys()
    where = {key: bench.authority.where(key) for key in keys}
    assert {key for key, entry in where.items() if entry.location is Location.DEVICE} == {
        "subgroup/1", "subgroup/3",
    }  # fmt: skip
    assert {entry.version for entry in where.values()} == {1}
    assert set(bench.authority.ensure_host().values()) == {1}
    assert_same(bench.state(), expected(1))
    bench.executor.close()
    assert bench.authority.keys() == []


def test_state_that_was_brought_home_may_be_changed_there(emulated: Device) -> None:
    bench = Bench(emulated)
    plan = bench.plan(residents=(1, 3))
    bench.run(plan)
    bench.executor.drain()
    bench.subgroups[1].master.data.mul_(0.5)
    bench.run(plan)
    bench.executor.drain()
    with open_device("cpu") as cpu:
        other = Bench(cpu)
        other.run()
        other.subgroups[1].master.data.mul_(0.5)
        other.run()
        assert_same(bench.state(), other.state())


def test_without_room_to_stage_the_host_does_it(
    emulated: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(residents=(1,), staged=(4,)))

    def full(*_args: Any, **_kwargs: Any) -> Any:
        raise DeviceOutOfMemoryError("full")

    monkeypatch.setattr(executor_module, "make_slots", full)
    trace = bench.run(bench.plan(residents=(1,), staged=(4,)))
    assert trace.is_degraded
    assert bench.executor.failure is None, "memory may be there again in the next step"
    assert "no room to stage" in caplog.text
    monkeypatch.undo()
    assert not bench.run(bench.plan(residents=(1,), staged=(4,))).is_degraded
    bench.executor.drain()
    assert_same(bench.state(), expected(3))


def test_fewer_residents_than_planned(emulated: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(emulated)
    real, calls = executor_module.make_resident, itertools.count()

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise DeviceOutOfMemoryError("full")
        return real(*args, **kwargs)

    monkeypatch.setattr(executor_module, "make_resident", second_fails)
    trace = bench.run(bench.plan(residents=(1, 3, 4)))
    assert trace.is_degraded
    on_device = {e.subgroup for e in trace.operations() if e.lane == "device"}
    assert on_device == {"subgroup/1"}
    bench.executor.drain()
    assert_same(bench.state(), expected(1))


class InjectedError(RuntimeError):
    """A failure that a test wanted."""


def fail_at(monkeypatch: pytest.MonkeyPatch, lane_name: str, nth: int) -> None:
    """Let the `nth` operation of a lane fail when it runs (before it changes anything)."""
    submit, count = Lane._submit, itertools.count()

    def wrapped(self: Lane, label: str, action: Any, *tensors: Any, nbytes: int = 0) -> Any:
        is_due = self.name.endswith(f"/{lane_name}") and "wait for" not in label
        if is_due and next(count) == nth:

            def fails(_operation: Any) -> None:
                raise InjectedError(f"{lane_name} {nth}")

            action = fails
        return submit(self, label, action, *tensors, nbytes=nbytes)

    monkeypatch.setattr(Lane, "_submit", wrapped)


PLAN: dict[str, Any] = {"residents": (0, 3), "staged": (4, 1), "slots": 1}
OPERATIONS = {"prefetch": 8 + 2, "device": 4, "flush": 6, "upload": 4}


@pytest.mark.parametrize("is_home", [False, True])
@pytest.mark.parametrize(
    ("lane", "nth"), [(lane, nth) for lane, count in OPERATIONS.items() for nth in range(count)]
)
def test_a_failure_anywhere_loses_nothing(
    emulated: Device, monkeypatch: pytest.MonkeyPatch, lane: str, nth: int, is_home: bool
) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(**PLAN))  # residents are on the device, and only there
    if is_home:
        bench.executor.drain()
    fail_at(monkeypatch, lane, nth)
    trace = bench.run(bench.plan(**PLAN))
    assert trace.is_degraded
    assert isinstance(bench.executor.failure, DeviceError)
    assert f"{lane} {nth}" in str(bench.executor.failure)
    monkeypatch.undo()
    assert_same(bench.state(), expected(2))
    after = bench.run(bench.plan(**PLAN))
    assert {e.lane for e in after.operations()} == {"host"}, "the device is not trusted any more"
    bench.executor.drain()
    assert_same(bench.state(), expected(3))


@pytest.mark.parametrize("nth", range(4))
def test_an_update_that_breaks_half_way(
    emulated: Device, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(**PLAN))
    real, count = one_update.update_there, itertools.count()

    def breaks(where: str, *args: Any) -> None:
        if where == "device" and next(count) == nth:
            args[2][0].zero_()  # the master on the device is half written
            raise InjectedError("kernel")
        real(where, *args)

    monkeypatch.setattr(one_update, "update_there", breaks)
    if nth >= 2:  # a resident's: its state was nowhere else
        with pytest.raises(DeviceError, match=r"only on emulated:0.*load the last checkpoint"):
            bench.run(bench.plan(**PLAN))
        return
    bench.run(bench.plan(**PLAN))
    bench.executor.drain()
    assert_same(bench.state(), expected(2))


@pytest.mark.parametrize("error", [StorageError, KeyboardInterrupt])
def test_whoever_saves_after_an_update_was_broken_off_finds_what_the_device_did(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    slow = open_device("emulated", memory_bytes=1 << 20, host_to_device_bytes_per_s=1e5)
    bench, wanted = Bench(slow), expected(1)
    whole = Executor._updates

    def stops(self: Executor, *args: Any) -> None:
        whole(self, *args)
        raise error("stop")

    monkeypatch.setattr(Executor, "_updates", stops)
    with pytest.raises(error, match="stop"):
        bench.run(bench.plan(residents=(1, 3)))
    assert bench.authority.where("subgroup/1").location is Location.DEVICE
    bench.executor.drain()
    assert_same(bench.state(), wanted)
    slow.close()


def test_pace_slows_down_and_changes_no_bit(emulated: Device) -> None:
    bench = Bench(emulated)
    bench.executor._pace = Pace(device=1e5, host=1e5)
    trace = bench.run(bench.plan(staged=(4,)))
    for each in trace.operations():
        if each.params:
            assert each.end_s - each.begin_s >= each.params / 1e5
    assert_same(bench.state(), expected(1))


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 1000, 4096, 4097])
@pytest.mark.parametrize("limit", [16, 100, 1024, 1 << 30])
def test_cuts_cover_and_are_aligned(numel: int, limit: int) -> None:
    pieces = list(cuts(numel, limit))
    assert sum(count for _, count in pieces) == numel
    position = 0
    for begin, count in pieces:
        assert begin == position
        assert begin % ALIGNMENT == 0
        assert 0 < count < limit + ALIGNMENT
        position += count


def test_lanes_hold_no_memory_after_an_update(emulated: Device) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(staged=(4, 1), slots=2))
    settled = emulated.free_bytes()
    for _ in range(5):
        bench.run(bench.plan(staged=(4, 1), slots=2))
    assert emulated.free_bytes() == settled
    assert settled > (emulated.memory_bytes - (1 << 16))


def test_weights_elsewhere_get_there_without_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU holds the model, and the host updates all: ``"device": "cpu"``."""
    monkeypatch.setattr("lowtide.offload.staging.Landings.is_far", lambda *_: True)
    with open_device("cpu") as cpu:
        bench = Bench(cpu)
        for _ in range(3):
            trace = bench.run()
            assert {e.lane for e in trace.operations()} == {"host"}
        assert_same(bench.state(), expected(3))


@pytest.mark.parametrize("nth", range(0, 12, 3))
def test_an_upload_that_fails_when_the_host_updates_all(
    emulated: Device, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    bench = Bench(emulated)
    bench.run()
    fail_at(monkeypatch, "upload", nth)
    assert bench.run().is_degraded
    assert_same(bench.state(), expected(2))
    assert f"upload {nth}" in str(bench.executor.failure)
    monkeypatch.undo()
    bench.run()
    assert_same(bench.state(), expected(3))


def test_a_way_home_that_fails_once_is_taken_again(
    emulated: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(emulated)
    bench.run(bench.plan(residents=(1, 3)))
    fail_at(monkeypatch, "flush", 1)
    bench.executor.drain()
    assert_same(bench.state(), expected(1))
    monkeypatch.undo()
    bench.run(bench.plan(residents=(1, 3)))
    bench.executor.drain()
    assert_same(bench.state(), expected(2))
