"""The lane simulator: hand-worked cases, invariants of its traces, native code against Python."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core.errors import ConfigError
from lowtide.core.native import native, status
from lowtide.offload.plan import host_only_plan, random_plan, stride_plan
from lowtide.offload.rates import Rates
from lowtide.offload.reference import LANES, Job, ReferenceMachine, speeds
from lowtide.offload.schedule import Piece, Plan, build_plan
from lowtide.offload.simulate import (
    Options,
    Simulation,
    machine,
    plan_job,
    simulate,
    simulate_reference,
)
from tests.helpers.offload import MILLION, random_memory, random_pieces, random_rates

needs_native = pytest.mark.skipif(not status().available, reason="needs the native code")
SEEDS = st.integers(0, 2**32 - 1)
# Round numbers: 1 s of host update, 12 s of load without gradient, 2 s of upload, 0.5 s on device.
ROUND = Rates(
    host_to_device_bytes_per_s=1e6,
    device_to_host_bytes_per_s=2e6,
    host_params_per_s=1e6,
    device_params_per_s=2e6,
)


def pieces_of(count: int, **changes: Any) -> list[Piece]:
    return [Piece(numel=MILLION, **{"gradient_upload_bytes": 0, **changes}) for _ in range(count)]


def plan_of(pieces: list[Piece], device: list[int], slots: int, residents: list[int]) -> Plan:
    host = [i for i in range(len(pieces)) if i not in device]
    return build_plan(
        pieces, residents=residents, device_order=device, host_order=host, slots=slots
    )


def case(seed: int) -> tuple[list[Piece], Plan, Rates, Options, list[float]]:
    chance = random.Random(seed)
    pieces = random_pieces(chance, chance.randint(1, 12))
    plan = random_plan(pieces, seed, memory_bytes=random_memory(chance))
    options = chance.choice([Options(), Options(), Options.artifact(), Options.stock()])
    release = [chance.uniform(0, 0.2) for _ in pieces] if chance.random() < 0.4 else []
    return pieces, plan, random_rates(chance), options, release


def test_host_piece_is_updated_then_uploaded() -> None:
    result = simulate(pieces_of(1), host_only_plan(pieces_of(1)), ROUND)
    assert result.trace == ((0, "host", 0.0, 1.0), (0, "upload", 1.0, 3.0))
    assert result.makespan_s == result.host_end_s == 3.0
    assert result.device_end_s == 0.0
    assert result.busy_s["host"] == 1.0


def test_staged_piece_is_loaded_updated_flushed() -> None:
    rates = ROUND.replace(launch_s=0.25)
    for gradient, load_s in ((0, 12.0), (2, 14.0), (4, 16.0)):
        pieces = pieces_of(1, gradient_upload_bytes=gradient)
        result = simulate(pieces, plan_of(pieces, [0], 1, []), rates)
        assert [span[1:] for span in result.trace] == [
            ("prefetch", 0.0, load_s),
            ("device", load_s, load_s + 0.75),
            ("flush", load_s + 0.75, load_s + 6.75),
        ]


def test_resident_moves_its_gradient_only() -> None:
    for gradient, end_s in ((0, 0.5), (4, 4.5)):
        pieces = pieces_of(1, gradient_upload_bytes=gradient)
        plan = plan_of(pieces, [0], 1, [0])
        assert simulate(pieces, plan, ROUND).makespan_s == end_s
        assert plan.slots == (1 if gradient else 0)


def test_slots_decide_whether_the_next_load_waits_for_the_flush() -> None:
    pieces = pieces_of(3)
    one, two = (
        simulate(pieces, plan_of(pieces, [0, 1, 2], slots, []), ROUND).makespan_s
        for slots in (1, 2)
    )
    assert one == 3 * (12 + 0.5 + 6)
    assert two == 3 * 12 + 0.5 + 6  # loads in a row; each flush hides behind the next load


def test_upload_and_prefetch_share_their_direction() -> None:
    pieces = pieces_of(2)
    result = simulate(pieces, plan_of(pieces, [1], 1, []), ROUND)
    spans = {span.lane: span for span in result.trace}
    # From 1 s on the upload of 2 MB has half of 1 MB/s; the load of 12 MB ends 2 s later for it.
    assert (spans["upload"].begin_s, spans["upload"].end_s) == (1.0, 5.0)
    assert spans["prefetch"].end_s == 14.0


def test_half_duplex_link_shares_its_time() -> None:
    pieces = pieces_of(2)
    plan = plan_of(pieces, [0, 1], 2, [])
    full = simulate(pieces, plan, ROUND).makespan_s
    half = simulate(pieces, plan, ROUND.replace(is_duplex=False)).makespan_s
    assert full == 12 + 12 + 0.5 + 6
    # The second load has done 0.5 MB alone when the first flush (12 MB at half of 2 MB/s)
    # begins; at 24.5 s that is over and 11.5 - 6 = 5.5 MB are left.
    assert half == pytest.approx(24.5 + 5.5 + 0.5 + 6)


def test_host_memory_is_shared_by_max_min_fairness() -> None:
    # Host wants 30 MB/s, prefetch 1 MB/s, flush 2 MB/s.
    rates = ROUND.replace(host_memory_bytes_per_s=9e6)
    host, prefetch, flush = (1 << LANES.index(lane) for lane in ("host", "prefetch", "flush"))
    assert speeds(rates, host)[0] == pytest.approx(1e6 * 9 / 30)
    found = speeds(rates, host | prefetch | flush)
    assert found[LANES.index("prefetch")] == 1e6  # the modest get all they want
    assert found[LANES.index("flush")] == 2e6
    assert found[0] == pytest.approx(1e6 * 6 / 30)
    tight = speeds(rates.replace(host_memory_bytes_per_s=1.5e6), host | prefetch | flush)
    assert tight[LANES.index("prefetch")] == pytest.approx(0.5e6)
    assert tight[LANES.index("flush")] == pytest.approx(0.5e6)
    assert tight[0] * 30 == pytest.approx(0.5e6)


def test_unfused_downcast_holds_the_host_or_runs_behind_it() -> None:
    pieces = pieces_of(2, low_precision_bytes=0)
    rates = ROUND.replace(downcast_params_per_s=1e6)
    plan = host_only_plan(pieces)
    assert simulate(pieces, plan, rates).makespan_s == 4.0
    behind = simulate(pieces, plan, rates, options=Options(is_downcast_background=True))
    assert behind.makespan_s == 3.0


def test_stock_loop_does_one_thing_after_another() -> None:
    pieces = pieces_of(3, gradient_upload_bytes=4)
    rates = ROUND.replace(downcast_params_per_s=4e6)
    result = simulate(pieces, host_only_plan(pieces), rates, options=Options.stock())
    assert result.makespan_s == 3 * (1 + 0.25 + 2)
    split = stride_plan(pieces, 0, residents=1)
    result = simulate(pieces, split, rates, options=Options.stock())
    assert result.makespan_s == (4 + 0.5) + 2 * (1 + 0.25 + 2)


def test_artifact_alternates_as_published() -> None:
    # No 16-bit weights, so that the link carries the chain alone: with stride 2 each pair takes
    # max(host, flush + load) + device, except the first, which has nothing to flush.
    pieces = pieces_of(6, low_precision_bytes=0)
    for host_s in (1.0, 30.0):
        rates = ROUND.replace(host_params_per_s=MILLION / host_s, downcast_params_per_s=1e12)
        result = simulate(pieces, stride_plan(pieces, 2), rates, options=Options.artifact())
        chain = max(host_s, 12) + 0.5 + 2 * (max(host_s, 6 + 12) + 0.5) + 6
        assert result.makespan_s == pytest.approx(chain)


def test_nothing_starts_before_its_gradient() -> None:
    pieces = pieces_of(3)
    plan = plan_of(pieces, [1], 1, [])
    release = (5.0, 2.0, 7.5)
    result = simulate(pieces, plan, ROUND, release_s=release)
    begins = {(span.piece, span.lane): span.begin_s for span in result.trace}
    assert begins[(0, "host")] == 5.0
    assert begins[(1, "prefetch")] == 2.0
    assert begins[(2, "host")] == 7.5
    assert (
        result.makespan_s == simulate_reference(pieces, plan, ROUND, release_s=release).makespan_s
    )


@needs_native
@settings(max_examples=300, deadline=None)
@given(SEEDS)
def test_native_code_and_reference_agree(seed: int) -> None:
    pieces, plan, rates, options, release = case(seed)
    fast = simulate(pieces, plan, rates, options=options, release_s=release)
    slow = simulate_reference(pieces, plan, rates, options=options, release_s=release)
    assert len(fast.trace) == len(slow.trace)
    for a, b in zip(fast.trace, slow.trace, strict=True):
        assert a[:2] == b[:2]
        assert a[2:] == pytest.approx(b[2:], rel=1e-12, abs=0)
    for name in ("makespan_s", "host_end_s", "device_end_s"):
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), rel=1e-12, abs=0)
    assert fast.busy_s == pytest.approx(slow.busy_s, rel=1e-12, abs=0)


def check_trace(pieces: list[Piece], plan: Plan, result: Simulation) -> None:
    lanes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    spans = {(span.piece, span.lane): span for span in result.trace}
    for span in result.trace:
        lanes[span.lane].append((span.begin_s, span.end_s))
    for lane, times in lanes.items():
        for (_, end_s), (begin_s, _) in itertools.pairwise(sorted(times)):
            assert begin_s >= end_s, lane
        assert result.busy_s[lane] == pytest.approx(sum(e - b for b, e in times))
    residents = set(plan.residents)
    uses = []
    for i in plan.device_order:
        device = spans[(i, "device")]
        is_loaded = i not in residents or pieces[i].resident_load_bytes > 0
        assert ((i, "prefetch") in spans) == is_loaded
        assert ((i, "flush") in spans) == (i not in residents)
        last = spans.get((i, "flush"), device)
        if is_loaded:
            assert spans[(i, "prefetch")].end_s <= device.begin_s
            uses.append((spans[(i, "prefetch")].begin_s, last.end_s))
        assert device.end_s <= last.begin_s or last is device
    for i in plan.host_order:
        assert spans[(i, "host")].end_s <= spans[(i, "upload")].begin_s
    for begin_s, _ in uses:
        assert sum(b <= begin_s < e for b, e in uses) <= plan.slots
    assert result.makespan_s == max(span.end_s for span in result.trace)
    expected = 2 * len(plan.host_order) + len(plan.device_order) + len(uses) + len(plan.staged)
    downcasts = len(lanes["downcast"])
    assert downcasts in (0, len(plan.host_order))
    assert len(result.trace) == expected + downcasts


@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_lanes_never_overlap_and_slots_are_never_exceeded(seed: int) -> None:
    pieces, plan, rates, options, release = case(seed)
    result = simulate(pieces, plan, rates, options=options, release_s=release)
    check_trace(pieces, plan, result)
    begins = {span.piece: span.begin_s for span in reversed(result.trace)}
    assert all(begins[i] >= time_s for i, time_s in enumerate(release))
    assert result.makespan_s >= result.lower_bound_s > 0
    order = [span.piece for span in result.trace if span.lane == "device"]
    loop = plan_job(plan, options)
    assert order == list(loop.device_order)
    assert [s.piece for s in result.trace if s.lane == "host"] == list(loop.host_order)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.1, 10))
def test_time_scales_with_all_rates(seed: int, factor: float) -> None:
    pieces, plan, rates, options, _ = case(seed)
    changes = {
        field.name: getattr(rates, field.name) * factor
        for field in dataclasses.fields(rates)
        if field.name.endswith("_per_s") and getattr(rates, field.name) is not None
    }
    faster = rates.replace(**changes, launch_s=rates.launch_s / factor)
    before, after = (simulate(pieces, plan, r, options=options).makespan_s for r in (rates, faster))
    assert after * factor == pytest.approx(before, rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(SEEDS, st.sampled_from(["host", "device", "host_to_device", "device_to_host"]))
def test_a_faster_lane_never_costs_time(seed: int, lane: str) -> None:
    # Where lanes share nothing. With sharing an earlier upload can delay a load: no law then.
    pieces, plan, rates, _, release = case(seed)
    pieces = [dataclasses.replace(piece, low_precision_bytes=0) for piece in pieces]
    rates = rates.replace(is_duplex=True, host_memory_bytes_per_s=None)
    unit = "params" if lane in ("host", "device") else "bytes"
    name = f"{lane}_{unit}_per_s"
    faster = rates.replace(**{name: 1.7 * getattr(rates, name)})
    before, after = (
        simulate(pieces, plan, r, release_s=release).makespan_s for r in (rates, faster)
    )
    assert after <= before * (1 + 1e-12)


def test_plans_that_do_not_fit_are_refused() -> None:
    pieces = pieces_of(3)
    good = plan_of(pieces, [1], 1, [])
    for bad, message in (
        (dataclasses.replace(good, host_order=(0,)), "each of 0 to 2 once"),
        (dataclasses.replace(good, host_order=(0, 2, 1)), "each of 0 to 2 once"),
        (dataclasses.replace(good, residents=(0,)), "not in device_order"),
        (dataclasses.replace(good, slots=0), r"plan.slots: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            simulate(pieces, bad, ROUND)
    fixed = [pieces[0], dataclasses.replace(pieces[1], is_movable=False), pieces[2]]
    with pytest.raises(ConfigError, match="not movable"):
        simulate(fixed, good, ROUND)
    for release in ([1.0], [0.0, -1.0, 0.0], [0.0, float("nan"), 0.0]):
        with pytest.raises(ConfigError, match="release_s"):
            simulate(pieces, good, ROUND, release_s=release)


def test_a_plan_that_waits_for_itself_is_refused() -> None:
    pieces = pieces_of(2)
    job = Job([1], [0], [], 1, host_gates=[1], device_gates=[1])
    for simulator in (ReferenceMachine(pieces, ROUND), machine(pieces, ROUND)):
        with pytest.raises(ValueError, match="can never end"):
            simulator.run(job)


@needs_native
def test_native_code_refuses_what_it_cannot_simulate() -> None:
    offload = native().offload
    rates = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 30.0]
    for arguments, message in (
        (([1.0], [2.0], [4.0], [0.0], [-1], rates[:8], []), "rates: got 8 numbers"),
        (([1.0], [2.0], [], [0.0], [-1], rates, []), "same length"),
        (([1.0], [2.0], [4.0], [], [-1], rates, []), "same length"),
        (([1.0], [2.0], [4.0], [0.0], [-1, -1], rates, []), "same length"),
        (([0.0], [2.0], [4.0], [0.0], [-1], rates, []), "numel"),
        (([1.0], [2.0], [4.0], [-1.0], [-1], rates, []), "sizes"),
        (([1.0], [-2.0], [4.0], [0.0], [-1], rates, []), "sizes"),
        (([1.0], [2.0], [4.0], [0.0], [-1], [0.0, *rates[1:]], []), "above 0"),
        (([1.0], [2.0], [4.0], [0.0], [-1], [*rates[:6], float("nan"), 0.0, 30.0], []), "from 0"),
        (([1.0], [2.0], [4.0], [0.0], [1], rates, [(1.0, 1.0)]), "path: got 1"),
        (([1.0], [2.0], [4.0], [0.0], [0], rates, [(1.0, 0.0)]), "paths: allowed"),
        (([1.0], [2.0], [4.0], [0.0], [0], rates, [(1.0, 1.0)] * 9), "at most 8"),
    ):
        with pytest.raises(ValueError, match=message):
            offload.Simulator(*arguments)
    simulator = offload.Simulator([1.0], [2.0], [4.0], [0.0], [-1], rates, [])
    for changes, message in (
        ({"host_order": [1]}, "host_order: got piece 1"),
        ({"device_order": [-1]}, "device_order: got piece -1"),
        ({"residents": [7]}, "residents: got piece 7"),
        ({"host_gates": [0, 0]}, "host_gates: got 2 entries"),
        ({"release_s": [float("nan")]}, "release_s"),
        ({"stored_order": [0]}, "piece 0 has no path"),
        ({"buffers": -1}, "buffers and carried"),
    ):
        job = {"device_order": [], "host_order": [0], "residents": [], "slots": 0}
        job |= {"release_s": [], "host_gates": [], "device_gates": [], "flags": 0}
        job |= {"stored_order": [], "buffers": 0, "carried": 0}
        with pytest.raises(ValueError, match=message):
            simulator.run(**{**job, **changes}, is_traced=False)
