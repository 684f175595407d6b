"""When plans are made, and what happens to rates that turn out wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lowtide.core.device import Device, open_device
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError
from lowtide.offload import scheduler as scheduler_module
from lowtide.offload.config import OffloadConfig
from lowtide.offload.executor import HABIT
from lowtide.offload.rates import Rates
from lowtide.offload.scheduler import Scheduler, corrected
from tests.offload.test_executor import KEEPERS, Bench, assert_same, expected

RATES = Rates(
    host_to_device_bytes_per_s=1e9,
    device_to_host_bytes_per_s=1e9,
    host_params_per_s=2e7,
    device_params_per_s=2e8,
)


@pytest.fixture
def device() -> Iterator[Device]:
    with open_device("emulated", memory_bytes=1 << 20) as opened:
        yield opened


class Ranks:
    """The other ranks: what they say each time they are asked, and at which step that was."""

    def __init__(self, *others: list[float]) -> None:
        self.others = list(others)
        self.said: list[list[float]] = []

    def __call__(self, numbers: list[float]) -> list[float]:
        self.said.append(numbers)
        return [min(column) for column in zip(numbers, *self.others, strict=True)]


def other(
    *, can: float = 1.0, wish: float = 0.0, memory: float = 1e12, rates: list[float] | None = None
) -> list[float]:
    """Return what another rank says."""
    return [can, -wish, memory, memory, *(rates or [1e12] * 5)]


def make(device: Device, ranks: Ranks | None = None, **settings: Any) -> Scheduler:
    config = OffloadConfig(device="emulated", replan_every_n_steps=3, **settings)
    return Scheduler(config, device, ranks or Ranks())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Rates]:
    """Rates that the coming measurements give; the last one stays."""
    given = [RATES]
    monkeypatch.setattr(
        scheduler_module, "measure", lambda *_: given.pop(0) if len(given) > 1 else given[0]
    )
    return given


def test_one_plan_is_kept_while_it_fits(device: Device, measured: list[Rates]) -> None:
    bench, scheduler = Bench(device), make(device)
    plans = [scheduler.next_plan(bench.executor) for _ in range(9)]
    assert all(plan is plans[0] for plan in plans)
    assert plans[0].device_order
    assert scheduler.plans == 1
    assert measured


def test_ranks_use_the_slowest_rates_of_all(device: Device, measured: list[Rates]) -> None:
    slow = [1e8, 2e9, 1e7, 2e8, 5e9]
    scheduler = make(device, Ranks(other(rates=slow)))
    bench = Bench(device)
    scheduler.next_plan(bench.executor)
    assert scheduler.rates == RATES.replace(
        host_to_device_bytes_per_s=1e8, host_params_per_s=1e7, host_memory_bytes_per_s=5e9
    )
    assert measured


def test_a_prediction_that_does_not_hold_makes_a_new_plan(
    device: Device, measured: list[Rates]
) -> None:
    bench, ranks = Bench(device), Ranks()
    scheduler = make(device, ranks)
    for _ in range(6):
        works = bench.works()
        scheduler.observe(bench.executor.run(scheduler.next_plan(bench.executor), works))
    # These tiny updates take far longer than the rates say.
    assert scheduler.plans >= 2
    assert scheduler.rates is not None
    assert scheduler.rates.host_params_per_s < RATES.host_params_per_s or (
        scheduler.rates.device_params_per_s < RATES.device_params_per_s
    )
    assert measured
    assert len(ranks.said) == 3, "at steps 1, 3 and 6, whatever happens"


def test_gradients_that_come_unplanned_say_nothing_about_rates_until_plans_count_on_them(
    device: Device, measured: list[Rates]
) -> None:
    bench = Bench(device)
    scheduler = make(device)

    def update(*, is_whole: bool) -> bool:
        plan = scheduler.next_plan(bench.executor)
        trace = bench.executor.run(plan, bench.works(is_whole=is_whole))
        assert set(plan.device_order) & set(KEEPERS)
        assert bench.executor.resident_bytes() == plan.resident_bytes
        scheduler.observe(trace)
        return trace.is_typical

    def told() -> list[tuple[int, bool]]:
        pieces = bench.executor.pieces()
        return [(pieces[i].gradient_upload_bytes, pieces[i].keeps_gradient) for i in KEEPERS]

    assert [update(is_whole=False) for _ in range(2)] == [False, False]
    assert update(is_whole=True), "a layer that is left out now and then changes no plan"
    assert [update(is_whole=False) for _ in range(HABIT)] == [False] * HABIT
    assert scheduler.rates == RATES
    assert scheduler.plans == 1
    assert told() == [(4, False)] * len(KEEPERS)
    assert update(is_whole=False), "this is what the plan counts on now"
    assert scheduler.plans == 2
    assert [update(is_whole=True) for _ in range(HABIT)] == [False] * HABIT
    assert told() == [(2, True)] * len(KEEPERS)
    assert update(is_whole=True)
    assert scheduler.plans == 3
    bench.executor.drain()
    assert_same(bench.state(), expected(11))
    assert measured


def test_another_rank_that_wants_a_new_plan_gets_one(device: Device, measured: list[Rates]) -> None:
    bench = Bench(device)
    scheduler = make(device, Ranks(other(wish=1.0, rates=[1e9, 1e9, 1e7, 2e8, 1e12])))
    for _ in range(4):
        scheduler.next_plan(bench.executor)
    assert scheduler.plans == 2
    assert scheduler.rates is not None
    assert scheduler.rates.host_params_per_s == 1e7
    assert measured


@pytest.mark.parametrize("is_here", [True, False])
def test_no_room_on_any_rank_means_the_host_on_all(
    device: Device, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    def measure(*_: Any) -> Rates:
        if is_here:
            raise DeviceOutOfMemoryError("full")
        return RATES

    monkeypatch.setattr(scheduler_module, "measure", measure)
    bench = Bench(device)
    ranks = Ranks() if is_here else Ranks(other(can=0.0, rates=[0.0] * 5))
    scheduler = make(device, ranks)
    plan = scheduler.next_plan(bench.executor)
    assert plan.is_host_only
    assert [each[0] for each in ranks.said] == [0.0 if is_here else 1.0]


def test_a_device_that_fails_while_measured_is_left_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(*_: Any) -> Rates:
        raise DeviceError("broken")

    monkeypatch.setattr(scheduler_module, "measure", measure)
    bench, scheduler = Bench(device), make(device)
    assert scheduler.next_plan(bench.executor).is_host_only
    monkeypatch.setattr(scheduler_module, "measure", lambda *_: RATES)
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 18)  # a reason to plan again
    for _ in range(4):
        assert scheduler.next_plan(bench.executor).is_host_only
    assert "the host updates all: broken" in caplog.text


def test_residents_fit_into_what_forward_leaves_free(
    device: Device, measured: list[Rates], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(device)
    monkeypatch.setattr(device, "least_free_bytes", lambda: 12 * 1100)
    plan = make(device).next_plan(bench.executor)
    assert 0 < plan.resident_bytes <= 12 * 1100
    assert measured


def test_no_residents_where_they_are_not_allowed(device: Device, measured: list[Rates]) -> None:
    bench = Bench(device)
    config = OffloadConfig(device="emulated")
    scheduler = Scheduler(config, device, Ranks(), allows_residents=False)
    assert scheduler.next_plan(bench.executor).residents == ()
    random = OffloadConfig(device="emulated", plan="random:1")
    scheduler = Scheduler(random, device, Ranks(), allows_residents=False)
    for _ in range(8):
        assert scheduler.next_plan(bench.executor).residents == ()
    assert measured


def test_without_kernels_the_device_updates_nothing(device: Device) -> None:
    bench = Bench(device)
    scheduler = Scheduler(OffloadConfig(device="emulated"), device, Ranks(), may_update=False)
    assert scheduler.next_plan(bench.executor).is_host_only


def test_real_measurement_finds_the_emulated_rates() -> None:
    with open_device(
        "emulated", memory_bytes=8 << 20, host_to_device_bytes_per_s=2e8,
        device_to_host_bytes_per_s=1e8,
    ) as device:  # fmt: skip
        bench = Bench(device)
        scheduler = make(device)
        scheduler.next_plan(bench.executor)
        rates = scheduler.rates
        assert rates is not None
        # Small copies on a busy machine: slower than the link, never faster.
        assert 1e7 < rates.host_to_device_bytes_per_s <= 2.2e8
        assert 1e7 < rates.device_to_host_bytes_per_s <= 1.1e8


def test_correction_follows_the_ratio_of_predicted_and_measured() -> None:
    predicted = {"host": 1.0, "prefetch": 1.0, "upload": 1.0, "device": 0.0, "flush": 2.0}
    measured_s = {"host": 4.0, "prefetch": 0.5, "upload": 0.0, "device": 1.0, "flush": 2.0}
    found = corrected(RATES, predicted, measured_s)
    assert found.host_params_per_s == pytest.approx(RATES.host_params_per_s / 2)
    assert found.host_to_device_bytes_per_s == pytest.approx(2e9)
    assert found.device_to_host_bytes_per_s == RATES.device_to_host_bytes_per_s
    assert found.device_params_per_s == RATES.device_params_per_s


@pytest.mark.parametrize("trouble", ["none", "failed", "no kernels", "full", "no subgroups"])
def test_every_rank_confers_at_the_same_steps(
    device: Device, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def measure(*_: Any) -> Rates:
        if trouble == "full":
            raise DeviceOutOfMemoryError("full")
        return RATES

    monkeypatch.setattr(scheduler_module, "measure", measure)
    bench, ranks = Bench(device), Ranks()
    if trouble == "no subgroups":
        bench.executor.subgroups = []
    config = OffloadConfig(device="emulated", replan_every_n_steps=3)
    scheduler = Scheduler(config, device, ranks, may_update=trouble != "no kernels")
    steps = []
    for step in range(1, 10):
        if trouble == "failed" and step == 2:
            bench.executor.failure = DeviceError("broken")
        known = len(ranks.said)
        plan = scheduler.next_plan(bench.executor)
        if len(ranks.said) > known:
            steps.append(step)
        if trouble != "none" and step > 2:
            assert plan.is_host_only
    assert steps == [1, 3, 6, 9]


def test_a_rank_that_has_failed_stops_the_devices_of_all(
    device: Device, measured: list[Rates]
) -> None:
    bench, ranks = Bench(device), Ranks()
    scheduler = make(device, ranks)
    assert not scheduler.next_plan(bench.executor).is_host_only
    ranks.others = [other(can=0.0, rates=[0.0] * 5)]
    scheduler.next_plan(bench.executor)
    assert scheduler.next_plan(bench.executor).is_host_only
    ranks.others = []
    plans = [scheduler.next_plan(bench.executor) for _ in range(3)]
    assert plans[0].is_host_only
    assert not plans[-1].is_host_only, "and goes on when all can again"
    assert measured


def test_memory_in_pieces_leads_to_smaller_plans(device: Device, measured: list[Rates]) -> None:
    bench = Bench(device)
    scheduler = make(device)
    sizes = []
    for _ in range(7):
        plan = scheduler.next_plan(bench.executor)
        sizes.append(scheduler._budget)
        trace = bench.run(plan)
        trace.is_degraded = True
        scheduler.observe(trace)
    assert sizes[-1] < 0.5 * sizes[0]
    assert measured
