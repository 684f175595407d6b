"""The planner: near the true optimum, within the memory, and honest when the device loses."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core.errors import ConfigError, UnknownNameError
from lowtide.core.native import status
from lowtide.offload.fluid import Fluid, best_staged, kinds_of, lower_bound_s
from lowtide.offload.plan import (
    Piece,
    Plan,
    build_plan,
    check_plan,
    host_only_plan,
    make_plan,
    predict,
    random_plan,
    stride_plan,
)
from lowtide.offload.rates import PROFILES, Rates, profile
from lowtide.offload.search import Search, Wish
from lowtide.offload.simulate import Options, simulate
from tests.helpers.offload import (
    MILLION,
    best_makespan_s,
    random_memory,
    random_pieces,
    random_rates,
)

needs_native = pytest.mark.skipif(not status().available, reason="minutes without native code")
SEEDS = st.integers(0, 2**32 - 1)
H100 = profile("H100-80GB").rates(ranks=4)
EMULATED = Rates(
    host_to_device_bytes_per_s=1e9,
    device_to_host_bytes_per_s=1e9,
    host_params_per_s=40e6,
    device_params_per_s=1e9,
    launch_s=1e-4,
)
REALISTIC = {
    "H100, 1 rank": profile("H100-80GB").rates(),
    "H100, 4 ranks": H100,
    "A100, 4 ranks": profile("A100-80GB").rates(ranks=4),
    "emulated": EMULATED,
    "emulated, half duplex": EMULATED.replace(is_duplex=False),
}


def equal(count: int, numel: int = 20 * MILLION, **changes: Any) -> list[Piece]:
    return [Piece(numel=numel, **changes)] * count


def check_near_optimum(seed: int, count: int) -> float:
    chance = random.Random(seed)
    pieces = random_pieces(chance, count)
    rates, memory = random_rates(chance), random_memory(chance)
    plan = make_plan(pieces, rates, memory_bytes=memory)
    check_plan(pieces, plan, memory_bytes=memory)
    best_s = best_makespan_s(pieces, rates, memory)
    assert plan.makespan_s is not None
    assert plan.lower_bound_s is not None
    assert plan.lower_bound_s <= best_s <= plan.makespan_s * (1 + 1e-12)
    assert plan.makespan_s <= 1.02 * best_s, (seed, pieces, rates, memory)
    return plan.makespan_s / best_s


@needs_native
@pytest.mark.parametrize("count", [4, 5, 6])
def test_plan_is_within_two_per_cent_of_the_best_of_all_plans(count: int) -> None:
    ratios = [check_near_optimum(1000 * count + seed, count) for seed in range(64)]
    assert sum(ratios) / len(ratios) < 1.002


@needs_native
@pytest.mark.parametrize(
    ("seed", "is_small"),
    [(24, False), (290, False), (332, False), (112, True), (213, True)],
)
def test_plan_of_five_pieces_is_the_best_where_single_changes_lead_nowhere(
    seed: int, is_small: bool
) -> None:
    # Found among 1500 such instances: a few good orders of the best divisions, and single changes
    # from there, end 1.3 to 8 % above the best plan.
    chance = random.Random(seed * 7919 + 13)
    if is_small:
        pieces = [
            Piece(
                numel=chance.randint(1000, 100_000),
                gradient_upload_bytes=2,
                keeps_gradient=chance.random() < 0.5,
            )
            for _ in range(5)
        ]
    else:
        pieces = random_pieces(chance, 5)
    rates = random_rates(chance)
    everything = sum(p.resident_bytes for p in pieces)
    memory = chance.random() * 1.3 * everything if chance.random() < 0.6 else random_memory(chance)
    plan = make_plan(pieces, rates, memory_bytes=memory)
    assert plan.makespan_s is not None
    assert plan.makespan_s <= 1.001 * best_makespan_s(pieces, rates, memory)


@needs_native
@pytest.mark.slow
def test_plan_of_seven_pieces_is_within_two_per_cent_of_the_best() -> None:
    for seed in range(16):
        check_near_optimum(7000 + seed, 7)


@pytest.mark.parametrize(
    ("millions", "memory", "best_s", "rates"),
    [
        (
            (37, 29, 68, 44, 56, 10),
            6.59e9,
            0.0837164,
            Rates(
                host_to_device_bytes_per_s=9.796e9,
                device_to_host_bytes_per_s=7.628e9,
                host_params_per_s=1.0635e9,
                device_params_per_s=2.0814e9,
                launch_s=297e-6,
            ),
        ),
        (
            (53, 76, 60, 23, 40, 23, 98),
            2.415e9,
            0.1204703,
            Rates(
                host_to_device_bytes_per_s=37.8e9,
                device_to_host_bytes_per_s=41.25e9,
                is_duplex=False,
                host_params_per_s=1.347e9,
                device_params_per_s=2.4385e9,
                launch_s=16e-6,
            ),
        ),
    ],
)
def test_residents_are_put_where_they_bridge_the_first_load(
    millions: tuple[int, ...], memory: float, best_s: float, rates: Rates
) -> None:
    # The best of all plans, by trying them all, has residents early; behind all that is staged
    # they cost 2.5 and 6 % more.
    pieces = [Piece(numel=m * MILLION, gradient_upload_bytes=2) for m in millions]
    plan = make_plan(pieces, rates, memory_bytes=memory)
    assert plan.makespan_s == pytest.approx(best_s, rel=2e-3)


@pytest.mark.parametrize("memory", [2e9, 16e9])
@pytest.mark.parametrize("gradient", [0, 4])
@pytest.mark.parametrize("name", REALISTIC)
def test_a_thousand_subgroups_come_near_the_bound(name: str, gradient: int, memory: float) -> None:
    pieces = equal(1000, gradient_upload_bytes=gradient)
    plan = make_plan(pieces, REALISTIC[name], memory_bytes=memory)
    check_plan(pieces, plan, memory_bytes=memory)
    assert plan.makespan_s is not None
    assert plan.lower_bound_s is not None
    assert plan.lower_bound_s <= plan.makespan_s <= 1.05 * plan.lower_bound_s
    if (name, gradient) == ("H100, 4 ranks", 0):
        # 7 % above the slowest lane: memory and link are both full only if the host goes slow all
        # the time, but it takes its fair share and is over early. The bound knows that.
        lane_s = lower_bound_s(kinds_of(pieces), H100, memory_bytes=memory)
        assert 1.05 * lane_s < plan.makespan_s <= 1.08 * lane_s


def test_subgroups_of_nearly_one_size_take_no_more_planning_than_equal_ones() -> None:
    def simulations(pieces: list[Piece]) -> int:
        search = Search(
            pieces, H100, Wish(memory_bytes=16e9, fraction=None, residents=None, max_slots=2)
        )
        search.run()
        return search.simulations

    chance = random.Random(1)  # as DeepSpeed cuts them: where a parameter ends
    nearly = [Piece(numel=20 * MILLION + chance.randint(0, 400_000)) for _ in range(200)]
    assert simulations(nearly) <= simulations(equal(200)) + 3


def test_unequal_subgroups_come_near_the_bound_too() -> None:
    chance = random.Random(5)
    pieces = [Piece(numel=chance.randint(5, 40) * MILLION) for _ in range(400)]
    pieces.append(Piece(numel=600 * MILLION))  # an embedding
    plan = make_plan(pieces, H100, memory_bytes=4e9)
    check_plan(pieces, plan, memory_bytes=4e9)
    assert plan.makespan_s is not None
    assert plan.makespan_s <= 1.05 * (plan.lower_bound_s or 0.0)


@settings(max_examples=120, deadline=None)
@given(SEEDS, st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_plans_are_valid_and_never_slower_than_the_host_alone(
    seed: int, count: int, max_slots: int
) -> None:
    chance = random.Random(seed)
    pieces = random_pieces(chance, count)
    rates, memory = random_rates(chance), random_memory(chance)
    plan = make_plan(pieces, rates, memory_bytes=memory, max_slots=max_slots)
    check_plan(pieces, plan, memory_bytes=memory)
    assert sorted(plan.device_order + plan.host_order) == list(range(count))
    assert plan.slots <= max_slots
    assert plan.device_bytes <= memory
    assert plan.makespan_s == simulate(pieces, plan, rates).makespan_s
    alone_s = simulate(pieces, host_only_plan(pieces), rates).makespan_s
    assert plan.makespan_s <= alone_s * (1 + 1e-9)
    assert plan == make_plan(pieces, rates, memory_bytes=memory, max_slots=max_slots)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_the_bound_is_below_any_plan(seed: int) -> None:
    chance = random.Random(seed)
    pieces = random_pieces(chance, chance.randint(1, 30))
    rates, memory = random_rates(chance), random_memory(chance)
    plan = random_plan(pieces, seed, memory_bytes=memory)
    kinds = kinds_of(pieces)
    bound_s = lower_bound_s(kinds, rates, memory_bytes=memory)
    fair_s = lower_bound_s(kinds, rates, memory_bytes=memory, is_fair=True)
    assert bound_s <= fair_s * (1 + 1e-9)
    assert fair_s <= simulate(pieces, plan, rates).makespan_s


def test_no_memory_means_host_only() -> None:
    for memory in (0, 1000):
        plan = make_plan(equal(8), H100, memory_bytes=memory)
        assert plan.is_host_only
        assert (plan.slots, plan.device_bytes, plan.fraction) == (0, 0, 0.0)


def test_the_device_is_refused_where_it_loses() -> None:
    slow_link = EMULATED.replace(host_to_device_bytes_per_s=1e6, device_to_host_bytes_per_s=1e6)
    launch_bound = EMULATED.replace(launch_s=10.0)
    for rates in (slow_link, launch_bound, EMULATED.replace(device_params_per_s=1e5)):
        pieces = equal(20, low_precision_bytes=0)
        plan = make_plan(pieces, rates, memory_bytes=16e9)
        assert plan.is_host_only, rates


def test_small_subgroups_do_not_lose_as_a_fixed_stride_does() -> None:
    # 1 ms to launch what the host does in 0.25 ms: every second on the device costs time.
    pieces = equal(200, numel=10_000, gradient_upload_bytes=0)
    rates = EMULATED.replace(launch_s=1e-3)
    stock_s, stride_s = (
        simulate(pieces, plan, rates, options=Options.artifact()).makespan_s
        for plan in (host_only_plan(pieces), stride_plan(pieces, 2))
    )
    assert stride_s > 2 * stock_s
    plan = make_plan(pieces, rates, memory_bytes=1e9)
    assert (plan.makespan_s or 0) < stock_s
    assert len(plan.device_order) < 50


def test_residents_fill_what_the_slots_leave() -> None:
    pieces = equal(100)
    with_residents = make_plan(pieces, H100, memory_bytes=8e9)
    without = make_plan(pieces, H100, memory_bytes=8e9, keep_residents=False)
    assert with_residents.residents
    assert not without.residents
    assert (with_residents.makespan_s or 0) < (without.makespan_s or 0)
    assert without.fraction > 0.5  # which no stride can express
    # Where all of it fits, a few pieces still go to the host, which is there anyway.
    plenty = make_plan(equal(100, gradient_upload_bytes=0), H100, memory_bytes=100e9)
    assert 90 <= len(plenty.residents) < 100
    assert not plenty.staged


def test_given_residents_are_kept() -> None:
    pieces = equal(20)
    plan = make_plan(pieces, H100, memory_bytes=8e9, keep_residents=[3, 11])
    assert plan.residents == (3, 11)
    with pytest.raises(ConfigError, match=r"keep_residents: \[20\]"):
        make_plan(pieces, H100, memory_bytes=8e9, keep_residents=[20])
    with pytest.raises(ConfigError, match=r"keep_residents: 2 pieces .* 560000000 bytes"):
        make_plan(pieces, H100, memory_bytes=0.1e9, keep_residents=[3, 11])
    fixed = equal(3, is_movable=False)
    with pytest.raises(ConfigError, match="not movable"):
        make_plan(fixed, H100, memory_bytes=8e9, keep_residents=[1])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1 / 3, 0.5, 0.62, 1.0])
def test_any_fraction_can_be_asked_for(fraction: float) -> None:
    for keep in (True, False):
        plan = make_plan(equal(120), H100, memory_bytes=4e9, fraction=fraction, keep_residents=keep)
        assert plan.fraction == pytest.approx(fraction, abs=0.5 / 100)
        assert bool(plan.residents) == keep


def test_pieces_that_may_not_move_stay_on_the_host() -> None:
    pieces = [*equal(10), *equal(10, is_movable=False)]
    plan = make_plan(pieces, H100, memory_bytes=8e9, fraction=1.0, keep_residents=False)
    assert set(plan.device_order) == set(range(10))
    assert make_plan(equal(4, is_movable=False), H100, memory_bytes=8e9).is_host_only


def test_nonsense_is_refused() -> None:
    for arguments, message in (
        ({"memory_bytes": -1}, "memory_bytes: got -1"),
        ({"memory_bytes": float("nan")}, "memory_bytes"),
        ({"memory_bytes": 1, "fraction": 1.5}, "fraction: got 1.5"),
        ({"memory_bytes": 1, "fraction": "half"}, "fraction: got 'half'"),
        ({"memory_bytes": 1, "max_slots": 0}, "max_slots: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_plan(equal(3), H100, **arguments)
    for changes, message in (
        ({"numel": 0}, "numel"),
        ({"gradient_upload_bytes": 3}, "allowed is 0, 2 or 4"),
        ({"low_precision_bytes": -1}, "low_precision_bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            Piece(**{"numel": 1, **changes})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Rates) if f.name != "paths"])
def test_impossible_rates_are_refused(field: str) -> None:
    values = [0.0, -1.0, float("nan"), float("inf"), "fast", True]
    if field == "is_duplex":
        return
    for value in values:
        if field == "launch_s" and value == 0.0:
            continue
        with pytest.raises(ConfigError, match=rf"rates.{field}: got"):
            H100.replace(**{field: value})
    if field in ("downcast_params_per_s", "host_memory_bytes_per_s"):
        assert getattr(H100.replace(**{field: None}), field) is None
    else:
        with pytest.raises(ConfigError):
            H100.replace(**{field: None})


def test_profiles_share_the_host_among_ranks() -> None:
    assert profile("h100-80gb") is PROFILES["H100-80GB"]
    one, four = (profile("A100-40GB").rates(ranks=ranks) for ranks in (1, 4))
    assert one.host_memory_bytes_per_s == 4 * (four.host_memory_bytes_per_s or 0)
    assert one.host_params_per_s == 4 * four.host_params_per_s
    assert one.device_params_per_s == four.device_params_per_s
    with pytest.raises(UnknownNameError, match='Did you mean "h100-80gb"'):
        profile("H100-80")
    with pytest.raises(ConfigError, match="ranks: got 0"):
        profile("H100-80GB").rates(ranks=0)


def test_random_plans_cover_every_choice() -> None:
    pieces = random_pieces(random.Random(1), 8)
    plans = [random_plan(pieces, seed, memory_bytes=8e9) for seed in range(300)]
    for plan in plans:
        check_plan(pieces, plan, memory_bytes=8e9)
    assert {plan.slots for plan in plans if plan.staged} == {1, 2, 3}
    assert any(plan.residents for plan in plans)
    assert any(plan.residents and plan.device_order[-1] in plan.staged for plan in plans)
    assert any(list(plan.host_order) != sorted(plan.host_order) for plan in plans)
    movable = sum(piece.is_movable for piece in pieces)
    assert {0, movable} <= {len(plan.device_order) for plan in plans}
    assert plans[7] == random_plan(pieces, 7, memory_bytes=8e9)
    assert all(random_plan(pieces, s, memory_bytes=0).is_host_only for s in range(20))


def test_gradients_that_stay_count_as_memory() -> None:
    pieces = [
        Piece(numel=MILLION * n, gradient_upload_bytes=4, keeps_gradient=True) for n in range(1, 9)
    ]
    for seed in range(100):
        memory = 1.6e7 * (seed % 36 + 1)
        check_plan(pieces, random_plan(pieces, seed, memory_bytes=memory), memory_bytes=memory)
    make_plan(pieces, H100, memory_bytes=16 * 8e6, keep_residents=[7])
    with pytest.raises(ConfigError, match="128000000"):
        make_plan(pieces, H100, memory_bytes=16 * 8e6 - 1, keep_residents=[7])


def test_a_plan_survives_json_and_reads_well(tmp_path: Path) -> None:
    plan = make_plan(equal(50), H100, memory_bytes=2e9)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Plan.from_dict(json.loads(path.read_text())) == plan
    assert hash(plan)
    text = str(plan)
    assert f"{len(plan.staged)} staged in 2 slot(s)" in text
    assert "predicted" in text
    for bad in ({}, {**plan.as_dict(), "colour": 1}, {**plan.as_dict(), "residents": None}):
        with pytest.raises(ConfigError, match="plan: "):
            Plan.from_dict(bad)


def test_memory_of_a_plan_is_slots_and_residents() -> None:
    pieces = [Piece(numel=10), Piece(numel=30), Piece(numel=20, gradient_upload_bytes=0)]
    plan = build_plan(pieces, residents=[1], device_order=[0, 1], host_order=[2], slots=2)
    assert plan.slot_bytes == max(10 * (12 + 4), 30 * 4)
    assert plan.device_bytes == 2 * 160 + 30 * 12
    assert plan.fraction == 10 / 30
    check_plan(pieces, plan, memory_bytes=680)
    with pytest.raises(ConfigError, match="needs 680 bytes of device memory, allowed are 679"):
        check_plan(pieces, plan, memory_bytes=679)
    assert predict(pieces, plan, H100, memory_bytes=680).makespan_s


def test_a_gradient_that_stays_takes_memory_and_no_slot() -> None:
    pieces = [Piece(numel=10, gradient_upload_bytes=2, keeps_gradient=True), Piece(numel=30)]
    plan = build_plan(pieces, residents=[0], device_order=[0], host_order=[1], slots=2)
    assert (plan.slots, plan.slot_bytes, plan.resident_bytes) == (0, 0, 10 * (12 + 2))
    assert predict(pieces, plan, H100, memory_bytes=140).busy_s["prefetch"] == 0
    staged = build_plan(pieces, residents=[], device_order=[0], host_order=[1], slots=2)
    assert staged.slot_bytes == 10 * (12 + 2)
    check_plan(pieces, plan, memory_bytes=140)
    with pytest.raises(ConfigError, match="needs 140 bytes"):
        check_plan(pieces, plan, memory_bytes=139)


def test_stride_plan_is_the_published_one() -> None:
    plan = stride_plan(equal(7), 3)
    assert (plan.device_order, plan.host_order) == ((2, 5), (0, 1, 3, 4, 6))
    assert plan.slots == 1
    split = stride_plan(equal(7), 2, residents=3)
    assert (split.residents, split.device_order) == ((0, 1, 2), (0, 1, 2, 4, 6))
    for stride in (1, 8, -2):
        with pytest.raises(ConfigError, match="stride"):
            stride_plan(equal(7), stride)


def test_no_pieces_is_a_plan_too() -> None:
    plan = make_plan([], H100, memory_bytes=1e9)
    assert (plan.device_order, plan.host_order, plan.makespan_s) == ((), (), 0.0)


def test_fluid_optimum_is_the_closed_form() -> None:
    # Closed form: without a memory limit, full duplex, gradients on the device, the host and the
    # inward lane meet at f = (a - 2 / B) / (a + 10 / B), a = 1 / U_c.
    rates = H100.replace(host_memory_bytes_per_s=None)
    pieces = equal(10, gradient_upload_bytes=0)
    staged, seconds = best_staged(Fluid.of(kinds_of(pieces)), rates, 0.0, slots=10**6)
    a, b = 1 / rates.host_params_per_s, rates.host_to_device_bytes_per_s
    fraction = (a - 2 / b) / (a + 10 / b)
    total = 200 * MILLION
    assert staged / total == pytest.approx(fraction)
    assert seconds == pytest.approx((1 - fraction) * total * a)
