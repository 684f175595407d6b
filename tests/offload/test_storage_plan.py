"""Plans and simulations with storage: hand-worked cases, invariants, native code against Python."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lowtide.cli import app
from lowtide.core.errors import ConfigError
from lowtide.core.native import status
from lowtide.offload.outlook import choose_buffers, cut, store
from lowtide.offload.plan import host_only_plan, make_plan, predict, random_plan
from lowtide.offload.rates import PathRates, Rates
from lowtide.offload.schedule import Piece, Plan, build_plan, check_plan
from lowtide.offload.scheduler import corrected_paths
from lowtide.offload.simulate import Simulation, simulate, simulate_reference
from lowtide.offload.storage.layout import assign
from tests.helpers.offload import MILLION, between, random_pieces, random_rates

SEEDS = st.integers(0, 2**32 - 1)
SLOW = 1e15
# 1 s of host update, 3 s of read, 4 s of write for a piece of a million parameters.
ROUND = Rates(
    host_to_device_bytes_per_s=SLOW,
    device_to_host_bytes_per_s=SLOW,
    host_params_per_s=1e6,
    device_params_per_s=SLOW,
    paths=(PathRates(read_bytes_per_s=4e6, write_bytes_per_s=3e6),),
)


def stored(count: int, path: int = 0) -> list[Piece]:
    piece = Piece(numel=MILLION, low_precision_bytes=0, is_movable=False, path=path)
    return [piece] * count


def case(seed: int) -> tuple[list[Piece], Plan, Rates, list[float]]:
    chance = random.Random(seed)
    paths = [
        PathRates(
            read_bytes_per_s=between(chance, 1e8, 2e10),
            write_bytes_per_s=between(chance, 1e8, 2e10),
        )
        for _ in range(chance.randint(1, 3))
    ]
    pieces = [
        Piece(
            numel=p.numel, gradient_upload_bytes=p.gradient_upload_bytes, is_movable=False,
            path=chance.randrange(len(paths)),
        ) if chance.random() < 0.6 else p
        for p in random_pieces(chance, chance.randint(1, 12))
    ]  # fmt: skip
    plan = random_plan(pieces, seed, memory_bytes=1e9, buffers=chance.randint(1, 7))
    release = [chance.uniform(0, 0.2) for _ in pieces] if chance.random() < 0.4 else []
    return pieces, plan, random_rates(chance).replace(paths=tuple(paths)), release


def test_a_stored_piece_is_read_updated_written() -> None:
    plan = host_only_plan(stored(1), buffers=1)
    result = simulate(stored(1), build_plan(
        stored(1), residents=(), device_order=(), host_order=(), slots=0, buffers=1
    ), ROUND)  # fmt: skip
    assert [span[1:] for span in result.trace] == [
        ("read0", 0.0, 3.0), ("host", 3.0, 4.0), ("write0", 4.0, 8.0),
    ]  # fmt: skip
    assert result.lower_bound_s == pytest.approx(4.0)
    assert simulate(stored(1), plan, ROUND).makespan_s == 1.0  # it stays in its buffer


def test_buffers_decide_how_far_reads_run_ahead() -> None:
    in_turn = {"residents": (), "device_order": (), "host_order": (), "slots": 0}
    times = {}
    for buffers in (1, 2, 3):
        plan = build_plan(stored(3), **in_turn, buffers=buffers)  # type: ignore[arg-type]
        times[buffers] = simulate(stored(3), plan, ROUND).makespan_s
    # One: 8 s each. Three: reads end at 9 s, writes at 8, 12 and 16. Two: the third read waits
    # for the first write, 8 s.
    assert times == {1: 24.0, 2: 16.0, 3: 16.0}


def test_the_host_updates_what_is_in_memory_while_reads_are_under_way() -> None:
    pieces = [*stored(1), *[Piece(numel=MILLION, low_precision_bytes=0, is_movable=False)] * 4]
    plan = build_plan(
        pieces, residents=(), device_order=(), host_order=range(5), slots=0, buffers=1
    )
    assert plan.host_order == (1, 2, 3, 4)
    result = simulate(pieces, plan, ROUND)
    assert [s.piece for s in result.trace if s.lane == "host"] == [1, 2, 3, 0, 4]


@pytest.mark.skipif(not status().available, reason="needs the native code")
@settings(max_examples=200, deadline=None)
@given(SEEDS)
def test_native_code_and_reference_agree(seed: int) -> None:
    pieces, plan, rates, release = case(seed)
    fast = simulate(pieces, plan, rates, release_s=release)
    slow = simulate_reference(pieces, plan, rates, release_s=release)
    assert [span[:2] for span in fast.trace] == [span[:2] for span in slow.trace]
    for a, b in zip(fast.trace, slow.trace, strict=True):
        assert a[2:] == pytest.approx(b[2:], rel=1e-12, abs=0)
    assert fast.busy_s == pytest.approx(slow.busy_s, rel=1e-12, abs=0)
    check_trace(plan, fast)
    assert fast.makespan_s >= fast.lower_bound_s > 0


def check_trace(plan: Plan, result: Simulation) -> None:
    spans: dict[tuple[int, str], Any] = {
        (s.piece, s.lane.rstrip("0123456789")): s for s in result.trace
    }
    order, uses = plan.stored_order, []
    for turn, i in enumerate(order):
        host = spans[i, "host"]
        is_first, is_last = turn < plan.carried, turn >= len(order) - plan.carried
        assert ((i, "read") in spans) == (not is_first)
        assert ((i, "write") in spans) == (not is_last)
        begin_s, end_s = 0.0, result.makespan_s
        if not is_first:
            assert spans[i, "read"].end_s <= host.begin_s
            begin_s = spans[i, "read"].begin_s
        if not is_last:
            assert spans[i, "write"].begin_s >= host.end_s
            end_s = spans[i, "write"].end_s
        uses.append((begin_s, end_s))
    for begin_s, _ in uses:
        assert sum(b <= begin_s < e for b, e in uses) <= plan.buffers
    assert [s.piece for s in result.trace if s.lane == "host" and s.piece in order] == list(order)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_plans_are_valid_and_never_slower_than_all_on_the_host(seed: int) -> None:
    pieces, other, rates, _ = case(seed)
    plan = make_plan(pieces, rates, memory_bytes=5e8, buffers=max(1, other.buffers))
    check_plan(pieces, plan, memory_bytes=5e8)
    host = host_only_plan(pieces, buffers=max(1, other.buffers))
    assert plan.makespan_s is not None
    host_s = simulate(pieces, host, rates).makespan_s
    assert plan.makespan_s <= host_s * (1 + 1e-9)
    assert plan.makespan_s >= (plan.lower_bound_s or 0.0) > 0
    assert predict(pieces, plan, rates, memory_bytes=5e8).makespan_s == plan.makespan_s


def test_what_stays_in_buffers_is_chosen_by_what_it_saves() -> None:
    chance, chosen = random.Random(1), []
    for _ in range(60):
        paths = tuple(
            PathRates(
                read_bytes_per_s=between(chance, 1e6, 1e7),
                write_bytes_per_s=between(chance, 1e6, 1e7),
            )
            for _ in range(2)
        )
        rates = ROUND.replace(paths=paths, host_params_per_s=between(chance, 1e5, 1e7))
        pieces = [stored(1, path=j)[0] for j in assign(7, paths)]
        host = host_only_plan(pieces, buffers=4)
        times = [
            simulate(pieces, dataclasses.replace(host, carried=carried), rates).makespan_s
            for carried in range(5)
        ]
        plan = make_plan(pieces, rates, memory_bytes=0, buffers=4)
        assert plan.makespan_s == pytest.approx(min(times), rel=1e-6)
        chosen.append(plan.carried)
    assert min(chosen) < 4  # reads begin at once ...
    assert max(chosen) == 4  # ... or the most is saved


def test_paths_without_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rates\.paths: got 1 paths, and .* on path 1; allowed"):
        make_plan(stored(2, path=1), ROUND, memory_bytes=0)
    wrong = Plan(residents=(), device_order=(), host_order=(0,), slots=0)
    with pytest.raises(ConfigError, match=r"stored_order has those with a path"):
        check_plan(stored(1), wrong)
    with pytest.raises(ConfigError, match=r"rates\.paths\.read_bytes_per_s: got 0"):
        PathRates(read_bytes_per_s=0, write_bytes_per_s=1)
    with pytest.raises(ConfigError, match=r"piece\.path: got 0, allowed is None"):
        Piece(numel=1, path=0)


def test_measured_times_correct_the_rates_of_paths() -> None:
    # Four times as fast as the rate of 4 MB/s, a quarter of 3 MB/s; half of that is believed.
    paths = (*ROUND.paths, PathRates(read_bytes_per_s=1.0, write_bytes_per_s=2.0))
    better = corrected_paths(paths, {"read0": (32_000_000, 2.0), "write0": (3_000_000, 4.0)})
    assert better[0].read_bytes_per_s == pytest.approx(8e6)
    assert better[0].write_bytes_per_s == pytest.approx(1.5e6)
    assert better[1] == paths[1]


def test_pieces_are_stored_as_a_run_would_divide_them() -> None:
    fast, slow = (PathRates(read_bytes_per_s=r, write_bytes_per_s=r) for r in (3e9, 1e9))
    pieces = store(
        cut(100 * MILLION, 4 * MILLION), [fast, slow], memory_bytes=12 * 40 * MILLION, buffers=5
    )
    kept = [p for p in pieces if p.path is None]
    assert sum(p.numel for p in pieces) == 100 * MILLION
    assert 12 * (sum(p.numel for p in kept) + 5 * 4 * MILLION) <= 12 * 40 * MILLION
    count = len(pieces) - len(kept)
    assert sum(p.path == 1 for p in pieces) == pytest.approx(count / 4, abs=1)


def predicted_s(pieces: list[Piece], paths: list[PathRates], memory: float, buffers: int) -> float:
    stored = store(pieces, paths, memory_bytes=memory, buffers=buffers)
    rates = ROUND.replace(host_params_per_s=1e12, paths=tuple(paths))
    return make_plan(stored, rates, memory_bytes=0, buffers=buffers).makespan_s or 0.0


@pytest.mark.parametrize(
    ("speeds", "is_more"),
    [((1,), False), ((1, 1), False), ((4, 1), True), ((4, 4, 1), True), ((4, 2, 1), True)],
)
def test_fast_paths_get_buffers_to_run_ahead_of_slow_ones(
    speeds: tuple[int, ...], is_more: bool
) -> None:
    paths = [PathRates(read_bytes_per_s=s * 1e8, write_bytes_per_s=s * 1e8) for s in speeds]
    pieces, memory = cut(600 * MILLION, 10 * MILLION), 20 * 120.0 * MILLION
    buffers, fewest = choose_buffers(pieces, paths, memory_bytes=memory), 2 * len(speeds) + 1
    assert (buffers > fewest) == is_more
    gain = 1 - predicted_s(pieces, paths, memory, buffers) / predicted_s(
        pieces, paths, memory, fewest
    )
    assert gain > 0.15 if is_more else gain == 0.0
    for more in range(fewest, min(fewest + 9, 20)):  # none is much better
        assert predicted_s(pieces, paths, memory, more) > 0.97 * predicted_s(
            pieces, paths, memory, buffers
        )


def test_buffers_are_no_more_than_memory_holds() -> None:
    fast, slow = (PathRates(read_bytes_per_s=r, write_bytes_per_s=r) for r in (8e8, 1e8))
    pieces = cut(600 * MILLION, 10 * MILLION)
    for held in (5, 6, 7):
        memory = (held + 0.5) * 120 * MILLION
        assert 5 <= choose_buffers(pieces, [fast, slow], memory_bytes=memory) <= held
    with pytest.raises(ConfigError, match="5 staging buffers"):
        choose_buffers(pieces, [fast, slow], memory_bytes=4.5 * 120 * MILLION)


def test_the_command_shows_storage_lanes() -> None:
    words = [
        "plan", "offload", "--params", "8e9", "--gpu", "H100-80GB", "--storage", "6/3",
        "--storage", "2", "--host-memory-gb", "30",
    ]  # fmt: skip
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for text in ("read, update, write in turn", "read1", "write0", "from storage in 5 buffers"):
        assert text in result.output
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    plan = Plan.from_dict(found["plan"])
    assert len(plan.stored_order) > 40
    assert found["schedules"][0]["storage_bytes"] > found["schedules"][-1]["storage_bytes"] > 0
    assert found["rates"]["paths"][1] == {"read_bytes_per_s": 2e9, "write_bytes_per_s": 2e9}


def test_no_figure_is_cut_short_in_a_terminal_of_80_columns() -> None:
    words = [
        "plan", "offload", "--params", "40e9", "--gpu", "H100-80GB", "--ranks", "4", "--storage",
        "1.6/1.2", "--storage", "1", "--host-memory-gb", "40",
    ]  # fmt: skip
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "…" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--storage", "fast", "--host-memory-gb", "30"], "READ/WRITE in GB/s"),
        (["--storage", "6/3"], "--host-memory-gb: got None"),
        (["--host-memory-gb", "30"], "name a --storage too"),
        (["--storage", "6/3", "--host-memory-gb", "1"], "staging buffers"),
    ],
)
def test_nonsense_is_refused_by_the_command(words: list[str], said: str) -> None:
    start = ["plan", "offload", "--params", "8e9", "--gpu", "H100-80GB"]
    result = CliRunner().invoke(app, [*start, *words], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert said in result.output
