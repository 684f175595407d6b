"""Adam bit for bit: DeepSpeed's op, the reference, every instruction set."""

from __future__ import annotations

import os
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowtide.core import native
from lowtide.offload import adam_reference
from lowtide.offload.adam import AdamStep, reference_update, update
from tests.offload.adam_cases import (
    LEVELS,
    NAMES,
    PLAIN,
    SAME,
    SCHEDULES,
    TYPES,
    Ours,
    Settings,
    State,
    Stock,
    bits,
    gradients,
    mismatches,
    new_state,
    run_level,
    stock_tail,
    used_state,
    wild,
)

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler on this machine"
)
SIZES = [*range(1, 34), 127, 128, 4099]


def some_step(**changes: object) -> AdamStep:
    chosen = Settings(**changes)  # type: ignore[arg-type]
    return Ours(chosen).step(3, chosen)


def stock_and_ours(
    schedule: list[tuple[int, Settings]], state: State, grads: list[Tensor]
) -> tuple[State, State]:
    """Take all steps with both; gradients reach the stock op as DeepSpeed prepares them."""
    theirs, mine = state.clone(), state
    stock, ours = Stock(schedule[0][1]), Ours(schedule[0][1])
    scale = np.float32(1) / np.float32(1024 * 1.37)
    for (step, chosen), grad in zip(schedule, grads, strict=True):
        prepared = torch.empty(grad.numel())
        prepared.copy_(grad)
        prepared.mul_(torch.tensor(scale))
        stock(theirs, prepared, step, chosen)
        update(
            *mine.arguments(grad),
            ours.step(step, chosen),
            grad_scale=float(scale),
            tail=stock_tail().of(grad.numel()),
        )
    return theirs, mine


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_stock_over_many_steps(name: str, dtype: torch.dtype) -> None:
    schedule = SCHEDULES[name]
    state = new_state(4099)
    theirs, mine = stock_and_ours(schedule, state, list(gradients(4099, len(schedule), dtype)))
    assert mismatches(theirs, mine) == SAME


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_stock_on_values_of_every_kind(name: str) -> None:
    schedule = SCHEDULES[name]
    source = np.random.default_rng(5)
    grads = [wild(16391, source) for _ in schedule]
    theirs, mine = stock_and_ours(schedule, used_state(16391), grads)
    assert mismatches(theirs, mine) == SAME


@pytest.mark.parametrize("size", SIZES)
def test_equals_stock_at_every_size(size: int) -> None:
    for name in ("plain", "l2"):
        theirs, mine = stock_and_ours(
            SCHEDULES[name], used_state(size), list(gradients(size, 12, torch.bfloat16))
        )
        assert mismatches(theirs, mine) == SAME


@pytest.mark.parametrize("adamw", [True, False])
def test_equals_stock_on_a_long_array(adamw: bool) -> None:
    size = 1_000_003
    schedule = [(step, Settings(adamw=adamw)) for step in range(1, 5)]
    theirs, mine = stock_and_ours(
        schedule, new_state(size), list(gradients(size, 4, torch.float32))
    )
    assert mismatches(theirs, mine) == SAME


def test_equals_stock_over_thousands_of_steps() -> None:
    schedule = [(step, Settings(betas=(0.9, 0.95))) for step in range(1, 2001)]
    theirs, mine = stock_and_ours(schedule, new_state(64), list(gradients(64, 2000, torch.float32)))
    assert mismatches(theirs, mine) == SAME


def test_vector_order_equals_stock_except_in_the_moments_of_its_tail() -> None:
    size = 64 + 15
    rest = stock_tail().of(size)
    step, chosen = 2, Settings()
    differing = dict(SAME)
    for seed in range(40):
        state = used_state(size, seed)
        state.exp_avg, state.exp_avg_sq = torch.rand(size), torch.rand(size)
        theirs, mine = state.clone(), state
        grad = next(gradients(size, 1, torch.float32, seed))
        Stock(chosen)(theirs, grad, step, chosen)
        update(*mine.arguments(grad), Ours(chosen).step(step, chosen))
        assert mismatches(theirs.slice(0, size - rest), mine.slice(0, size - rest)) == SAME
        for name, count in mismatches(theirs, mine).items():
            differing[name] += count
    assert (differing["exp_avg"] > 0, differing["exp_avg_sq"] > 0) == (rest > 0,) * 2


def test_stock_computes_the_tail_alone_as_within_the_whole() -> None:
    size, chosen = 1027, Settings()
    whole, parts = new_state(size), new_state(size)
    for_whole, for_parts = Stock(chosen), Stock(chosen)
    ours = Ours(chosen)
    cut = size - size % 16
    for step, grad in enumerate(gradients(size, 8, torch.float32), start=1):
        for_whole(whole, grad, step, chosen)
        update(*parts.slice(0, cut).arguments(grad[:cut]), ours.step(step, chosen))
        for_parts(parts.slice(cut, size), grad[cut:], step, chosen)
        for_parts(parts.slice(0, 0), grad[:0], step, chosen)  # asked again: nothing moves
    assert mismatches(whole, parts) == SAME


def test_equals_the_optimizer_that_users_hold() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    state = new_state(4099)
    leaf = torch.nn.Parameter(state.param.clone())
    optimizer = DeepSpeedCPUAdam([leaf], lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    chosen = Settings(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ours = Ours(chosen)
    for step, grad in enumerate(gradients(4099, 10, torch.float32), start=1):
        leaf.grad = grad.clone()
        optimizer.step()
        update(*state.arguments(grad), ours.step(step, chosen), tail=stock_tail().of(4099))
    held = optimizer.state[leaf]
    theirs = State(param=leaf.detach(), exp_avg=held["exp_avg"], exp_avg_sq=held["exp_avg_sq"])
    assert mismatches(theirs, state) == SAME


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 70_001])
@pytest.mark.parametrize("grad_type", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("low_type", TYPES, ids=NAMES.get)
def test_reference_equals_native(size: int, grad_type: torch.dtype, low_type: torch.dtype) -> None:
    grad = wild(size, np.random.default_rng(3)).to(grad_type)
    for name in ("plain", "l2", "no decay", "large", "tiny"):
        chosen = SCHEDULES[name][0][1]
        results = []
        for run in (reference_update, update):
            state = used_state(size)
            low = torch.full((size,), 7.0, dtype=low_type)
            kept = torch.full((size,), 7.0)
            run(
                *state.arguments(grad),
                Ours(chosen).step(2, chosen),
                grad_scale=0.37,
                low_precision=low,
                keep_grad=kept,
                tail=min(size, 13),
            )
            results.append((state, low, kept))
        (by_reference, low_r, kept_r), (by_native, low_n, kept_n) = results
        assert mismatches(by_reference, by_native) == SAME
        assert torch.equal(bits(kept_r), bits(kept_n))
        if low_type == torch.float32:
            assert torch.equal(bits(low_r), bits(low_n))
        else:  # here NaN has one pattern too
            assert torch.equal(low_r.view(torch.int16), low_n.view(torch.int16))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("grad_type", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("low_type", TYPES, ids=NAMES.get)
def test_levels_agree_at_any_size_and_place(
    level: str, grad_type: torch.dtype, low_type: torch.dtype
) -> None:
    for size, skip in [*((size, size % 5) for size in range(1, 50)), (4099, 3), (100_003, 1)]:
        grad = wild(size + skip, np.random.default_rng(size)).to(grad_type)[skip:]
        results = []
        for each in ("scalar", level):
            state = used_state(size + skip).slice(skip, size + skip)
            low = torch.zeros(size + skip + 1, dtype=low_type)[skip : skip + size]
            kept = torch.zeros(size + skip)[skip:]
            step = some_step(adamw=size % 2 == 0)
            run_level(each, state, grad, step, grad_scale=1.7, low=low, kept=kept, threads=2)
            results.append((state, low, kept))
        (a, low_a, kept_a), (b, low_b, kept_b) = results
        assert mismatches(a, b) == SAME, size
        assert torch.equal(bits(kept_a), bits(kept_b)), size
        assert torch.equal(low_a.view(torch.uint8), low_b.view(torch.uint8)) or (
            low_type == torch.float32 and torch.equal(bits(low_a), bits(low_b))
        ), size


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("skip", [0, 3, 8, 16])
def test_long_arrays_that_are_written_past_the_caches(level: str, skip: int) -> None:
    size = (1 << 20) + 37
    for low_type in TYPES:
        state = new_state(size)
        low = torch.zeros(skip + size + 16, dtype=low_type)
        grad = torch.ones(size, dtype=torch.bfloat16)
        run_level(level, state, grad, some_step(), low=low[skip : skip + size], threads=3)
        assert torch.equal(low[skip : skip + size], state.param.to(low_type))
        assert not low[:skip].any()
        assert not low[skip + size :].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES[1:], ids=NAMES.get)
def test_every_16_bit_gradient_is_widened_as_torch_does(level: str, dtype: torch.dtype) -> None:
    grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    kept = torch.zeros(2**16)
    run_level(level, new_state(2**16), grad, some_step(), kept=kept)
    assert torch.equal(bits(kept), bits(grad.float()))


def around_all_16_bit_values(dtype: torch.dtype) -> Tensor:
    """Return each 16-bit value, the midpoint to the next, and their float32 neighbours."""
    values = torch.arange(2**16).to(torch.int16).view(dtype).float()
    values = values[torch.isfinite(values)].unique()
    overflow = torch.tensor([65519.99, 65520.0, 65536.0, 3.4028234663852886e38, float("inf")])
    midpoints = (values[1:].double() + values[:-1].double()).div(2).float()
    centre = torch.cat([values, midpoints, overflow, -overflow])
    steps = [torch.full_like(centre, s) for s in (float("-inf"), float("inf"))]
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    # NaN first: what comes last is not computed by vectors.
    return torch.cat([nan.view(torch.float32), centre, *(centre.nextafter(s) for s in steps)])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES[1:], ids=NAMES.get)
def test_parameters_are_rounded_as_torch_does(level: str, dtype: torch.dtype) -> None:
    values = around_all_16_bit_values(dtype)
    size = values.numel()
    zeros = State(param=values.clone(), exp_avg=torch.zeros(size), exp_avg_sq=torch.zeros(size))
    low = torch.zeros(size, dtype=dtype)
    run_level(level, zeros, torch.zeros(size), some_step(weight_decay=0.0), low=low)
    assert torch.equal(bits(zeros.param), bits(values))
    expected = values.to(dtype)
    assert torch.equal(bits(low), bits(expected))
    quiet = 0x7FC0 if dtype == torch.bfloat16 else 0x7E00
    assert (low.view(torch.int16)[torch.isnan(values)] == quiet).all()


def test_float32_gradient_is_scaled_in_place_as_torch_does() -> None:
    grad = wild(1001, np.random.default_rng(0))
    expected = grad.clone().mul_(1 / 3.3)
    update(*new_state(1001).arguments(grad), some_step(), grad_scale=1 / 3.3, keep_grad=True)
    assert torch.equal(bits(grad), bits(expected))


def test_gradient_stays_as_it_is_unless_asked_for() -> None:
    grad = wild(1001, np.random.default_rng(0))
    before = grad.clone()
    update(*new_state(1001).arguments(grad), some_step(), grad_scale=1 / 3.3)
    assert torch.equal(bits(grad), bits(before))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(a=finite, b=finite, c=finite)
@settings(deadline=None, max_examples=2000)
def test_reference_fma_is_rounded_once(a: float, b: float, c: float) -> None:
    check_fma(a, b, c)


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        # Rounding to float64 first makes a tie of these.
        (1 + 2**-23, 1 + 2**-23, 2.0**30),
        (2.0**12 + 1, 2.0**12 + 1, 2.0**-60),
        (1.0, 1 + 2.0**-23, 2.0**-24 + 2.0**-47),
        (2.0**-75, 2.0**-75, 2.0**-149),
        (3.0, 2.0**-149, -(2.0**-149)),
        (-(2.0**-100), 2.0**-100, 1.0),
        (2.0**-100, 2.0**-100, 1 + 2.0**-23),
        (2.0**64, 2.0**64, -1.0),
    ],
)
def test_reference_fma_is_rounded_once_near_ties(a: float, b: float, c: float) -> None:
    for sign in (1.0, -1.0):
        check_fma(a, b, sign * c)


def check_fma(a: float, b: float, c: float) -> None:
    a, b, c = (float(np.float32(x)) for x in (a, b, c))
    with np.errstate(over="ignore"):
        found = float(adam_reference.fused(*(np.float32([x]) for x in (a, b, c)))[0])
    assert found == nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))


def nearest_float32(exact: Fraction) -> float:
    """Round by definition: try all neighbours of a first guess, ties to the even one."""
    if abs(exact) >= Fraction(2**128 - 2**103):
        return float("inf") if exact > 0 else float("-inf")
    ends = (np.float32(np.inf), np.float32(-np.inf))
    with np.errstate(over="ignore"):
        guess = np.float32(float(exact))
        near = [x for x in (guess, *(np.nextafter(guess, end) for end in ends)) if np.isfinite(x)]
    return float(
        min(near, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.int32)) & 1))
    )


def test_native_is_used_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowtide.offload.adam._update_reference", None)
    schedule = PLAIN[:2]
    for (step, chosen), grad in zip(schedule, gradients(100, 2, torch.float32), strict=True):
        update(*new_state(100).arguments(grad), Ours(chosen).step(step, chosen))


def test_reference_runs_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = next(gradients(100, 1, torch.bfloat16))
    natively, plainly = new_state(100), new_state(100)
    update(*natively.arguments(grad), some_step())
    monkeypatch.setenv("LOWTIDE_NATIVE", "0")
    native._warn_of_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="LOWTIDE_NATIVE=0"):
        update(*plainly.arguments(grad), some_step())
    native._warn_of_fallback.cache_clear()
    assert mismatches(natively, plainly) == SAME
