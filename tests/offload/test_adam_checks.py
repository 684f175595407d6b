"""Adam around its arithmetic: scalars, threads, forks, what is refused, what the op is asked."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowtide.core.errors import HostError, LowtideError, NativeUnavailableError, OptimizerError
from lowtide.core.native import native, status
from lowtide.offload.adam import Powers, adam_step, reference_update, update, update_cuda
from lowtide.offload.adam_stock import StockTail, measure_tail
from tests.helpers.sanitizers import needs_compiler, run_under_sanitizers
from tests.offload.adam_cases import (
    LEVELS,
    SAME,
    Ours,
    Settings,
    State,
    bits,
    gradients,
    mismatches,
    new_state,
    run_level,
    stock_op,
    stock_tail,
    used_state,
    wild,
)

needs_native = pytest.mark.skipif(not status().available, reason="the native code is not built")
STEP = Ours(Settings()).step(1, Settings())


def test_powers_are_products_while_steps_follow_and_powers_after_a_jump() -> None:
    beta = np.float32(0.999)
    powers = Powers(0.9, 0.999)
    product = np.float32(1)
    for step in range(1, 40):
        product = product * beta
        assert powers.advance(step, 0.9, 0.999)[1] == float(product)
        assert powers.advance(step, 0.9, 0.999)[1] == float(product)
    jumped = powers.advance(100, 0.9, 0.999)
    assert jumped[1] == float(np.float32(math.pow(float(beta), 100)))
    product = np.float32(jumped[1]) * beta
    assert powers.advance(101, 0.9, 0.999)[1] == float(product)


def test_other_betas_give_a_power_even_at_the_next_step() -> None:
    powers = Powers(0.9, 0.999)
    powers.advance(1, 0.9, 0.999)
    beta = float(np.float32(0.95))
    assert powers.advance(2, 0.9, 0.95)[1] == float(np.float32(beta**2))
    assert powers.advance(3, 0.9, 0.95)[1] == float(np.float32(beta**2) * np.float32(beta))


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_powers_refuse_what_is_no_step(step: Any) -> None:
    with pytest.raises(OptimizerError, match=r"step: got .*allowed is an int from 0"):
        Powers(0.9, 0.999).advance(step, 0.9, 0.999)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (-0.1, 0.9), (0.9, float("nan"))])
def test_betas_out_of_range_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(OptimizerError, match=r"beta[12]: got .*allowed is 0 <= beta"):
        Powers(*betas)
    with pytest.raises(OptimizerError, match=r"beta[12]: got"):
        adam_step((0.9, 0.9), lr=1.0, betas=betas, eps=0.0, weight_decay=0.0)


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_number_of_threads_does_not_show(level: str) -> None:
    size = 300_007
    grad = wild(size, np.random.default_rng(9)).to(torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 4, 64):
        state, low = used_state(size), torch.zeros(size, dtype=torch.bfloat16)
        run_level(level, state, grad, STEP, low=low, threads=threads, tail=7)
        results.append((state, low))
    for state, low in results[1:]:
        assert mismatches(state, results[0][0]) == SAME
        assert torch.equal(low.view(torch.int16), results[0][1].view(torch.int16))


@needs_native
def test_several_threads_update_their_own_pieces_at_once() -> None:
    size, count = 100_003, 4
    expected = used_state(size)
    grad = next(gradients(size, 1, torch.float32))
    states = [expected.clone() for _ in range(count)]
    update(*expected.arguments(grad), STEP)

    def work(state: State) -> None:
        update(*state.arguments(grad), STEP, threads=3)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [mismatches(state, expected) for state in states] == [SAME] * count


@needs_native
def test_child_of_a_fork_updates_with_threads_of_its_own() -> None:
    size = 200_003
    grad = next(gradients(size, 1, torch.float32))
    expected = used_state(size)
    update(*expected.arguments(grad), STEP, threads=4)  # now this process has threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 advises against it
        child = os.fork()
    if child == 0:
        status_code = 1
        try:
            state = used_state(size)
            run_level("auto", state, grad, STEP, threads=4)
            is_same = mismatches(state, expected) == SAME
            has_threads = len(os.listdir("/proc/self/task")) == 4
            status_code = 0 if is_same and has_threads else 2
        finally:
            os._exit(status_code)
    _, ended = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended) == 0


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_callers_flushing_of_subnormals_does_not_show(level: str) -> None:
    values = torch.full((64,), 1e-40)
    grad = torch.zeros(64)
    usual, flushing = (
        State(param=values.clone(), exp_avg=values.clone(), exp_avg_sq=values.clone())
        for _ in range(2)
    )
    run_level(level, usual, grad, STEP)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        run_level(level, flushing, grad, STEP)
        still_flushes = bool((values * 1.0 == 0).all())
    finally:
        torch.set_flush_denormal(False)
    assert still_flushes  # the caller's setting is as it was
    assert (usual.exp_avg != 0).all()
    assert mismatches(usual, flushing) == SAME


Call = Callable[..., None]


def tensors(size: int = 32) -> dict[str, Any]:
    state = new_state(size)
    return {**vars(state), "grad": torch.ones(size), "step": STEP}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not a tensor": ({"grad": [1.0]}, r"grad: got list, allowed is a contiguous tensor"),
    "wrong type": (
        {"exp_avg": torch.ones(32).bfloat16()},
        r"exp_avg: got torch.bfloat16 .*convert",
    ),
    "wrong gradient": ({"grad": torch.ones(32).double()}, r"grad: got torch.float64 .*or torch.f"),
    "wrong output": ({"low_precision": torch.ones(32).int()}, r"low_precision: got torch.int32"),
    "two dimensions": ({"param": torch.ones(4, 8)}, r"param: .*\(4, 8\).*pass tensor.view\(-1\)"),
    "gaps": ({"exp_avg_sq": torch.ones(64)[::2]}, r"exp_avg_sq: .*with gaps"),
    "other size": ({"grad": torch.ones(31)}, r"grad: .*\(31,\).*allowed is \(32,\)"),
    "other device": ({"grad": torch.ones(32, device="meta")}, r"grad: .*on meta, allowed is .*cpu"),
    "16-bit place": (
        {"grad": torch.ones(32).bfloat16(), "keep_grad": True},
        r"keep_grad: got torch.bfloat16 .*float32",
    ),
}


@pytest.mark.parametrize("call", [update, reference_update])
@pytest.mark.parametrize("problem", BAD)
def test_tensors_that_do_not_fit_are_refused(call: Call, problem: str) -> None:
    changes, message = BAD[problem]
    with pytest.raises(OptimizerError, match=message):
        call(**{**tensors(), **changes})


@pytest.mark.parametrize("call", [update, reference_update])
def test_overlapping_tensors_are_refused(call: Call) -> None:
    whole = torch.zeros(48)
    with pytest.raises(OptimizerError, match=r"exp_avg: got memory that overlaps that of param"):
        call(**{**tensors(), "param": whole[:32], "exp_avg": whole[16:]})
    given = tensors()
    with pytest.raises(OptimizerError, match=r"overlaps"):
        call(**given, low_precision=given["param"])
    call(**given, keep_grad=given["grad"].view(32))  # the gradient's own place is allowed


def test_tail_and_threads_out_of_range_are_refused() -> None:
    for tail in (-1, 33):
        for call in (update, reference_update):
            with pytest.raises(ValueError, match=rf"tail: got {tail}, allowed is 0 to 32"):
                call(**tensors(), tail=tail)
    if status().available:
        for threads in (0, -1, 1025):
            with pytest.raises(ValueError, match=rf"threads: got {threads}, allowed is 1 to 1024"):
                update(**tensors(), threads=threads)


def test_nothing_is_changed_when_an_update_is_refused() -> None:
    given = tensors()
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises(LowtideError):
        update(**given, low_precision=torch.ones(31))
    assert all(torch.equal(before[name], given[name]) for name in before)


def raw_call(**changes: Any) -> None:
    state, grad = new_state(32), torch.ones(32)
    offload = native().offload
    named = {name: tensor.data_ptr() for name, tensor in vars(state).items()}
    arguments = {**named, "grad": grad.data_ptr(), "grad_type": "float32", "count": 32, **changes}
    scalars = offload.AdamStep(**STEP.scalars(), mode=STEP.mode, grad_scale=1.0)
    offload.adam_update(scalars, arguments.pop("count"), **arguments)


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, r"count: got -1, allowed is 0 to \d+ elements"),
        ({"count": 1 << 62}, r"count: got 4611686018427387904, allowed is 0 to"),
        ({"count": (1 << 60) - 1}, r"got memory that overlaps that of"),
        ({"grad": 0}, r"grad: got a null address with 32 elements"),
        ({"param": 0}, r"param: got a null address"),
        ({"exp_avg": 4097 * 4 + 2}, r"exp_avg: got address 16390, allowed is a multiple of .* 4"),
        ({"low_precision": 1}, r"low_precision: got address 1, allowed is a multiple of .* 2"),
        ({"param": 2**64 - 64}, r"param: got 32 elements .*beyond the address space"),
        ({"grad_type": "int8"}, r"grad: got 'int8', allowed is 'float32', 'bfloat16' or"),
        ({"low_type": ""}, r"low_precision: got '', allowed"),
        ({"level": "sse"}, r"level: got 'sse', allowed is 'auto', 'scalar', 'avx2' or 'avx512'"),
        ({"tail": 33}, r"tail: got 33"),
    ],
)
def test_addresses_are_checked_where_they_enter_native_code(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        raw_call(**changes)


@needs_native
def test_overlap_is_checked_where_it_enters_native_code() -> None:
    grad = torch.ones(64)
    for place in ("param", "low_precision", "kept_grad"):
        with pytest.raises(ValueError, match=r"got memory that overlaps that of"):
            raw_call(grad=grad.data_ptr(), **{place: grad.data_ptr() + 64})
    raw_call(grad=grad.data_ptr(), kept_grad=grad.data_ptr())
    with pytest.raises(TypeError):
        raw_call(grad=1.5)


@needs_native
def test_level_that_the_processor_lacks_is_refused() -> None:
    for level in {"scalar", "avx2", "avx512"} - set(LEVELS):
        with pytest.raises(RuntimeError, match=rf"level '{level}' cannot run on this processor"):
            raw_call(level=level)
    assert LEVELS[0] == "scalar"


def test_gpu_update_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptimizerError, match=r"param: .*on cpu, allowed is .*cuda"):
        update_cuda(**tensors())
    monkeypatch.setenv("LOWTIDE_NATIVE", "0")
    monkeypatch.setattr("lowtide.offload.adam._check_tensor", lambda *_: None)
    with pytest.raises(NativeUnavailableError, match=r"_native_cuda is switched off"):
        update_cuda(**tensors())


class FakeOp:
    """Stands in for DeepSpeed's op: our own update with a tail of its own rule."""

    def __init__(self, tail: Callable[[int], int], beta2_error: float = 0.0) -> None:
        self.tail, self.error, self.destroyed = tail, beta2_error, 0
        self.powers = Powers(0.9, 0.999)

    def create_adam(self, *_: Any) -> None:
        pass

    def destroy_adam(self, _: int) -> None:
        self.destroyed += 1

    def adam_update(self, _id: int, step: int, lr: float, beta1: float, *rest: Any) -> None:
        beta2, eps, decay, bias_correction, param, grad, exp_avg, exp_avg_sq = rest
        made = adam_step(
            self.powers.advance(step, beta1, beta2 + self.error),
            lr=lr,
            betas=(beta1, beta2 + self.error),
            eps=eps,
            weight_decay=decay,
            bias_correction=bias_correction,
        )
        update(param, grad, exp_avg, exp_avg_sq, made, tail=self.tail(param.numel()))


@pytest.mark.parametrize("width", [0, 1, 4, 8, 16])
def test_rule_of_the_tail_is_found_by_asking(width: int) -> None:
    op = FakeOp(lambda size: size % width if width else size)
    assert measure_tail(op) == StockTail(width=width)
    assert op.destroyed == 1


def test_op_of_other_arithmetic_is_refused() -> None:
    for op in (FakeOp(lambda _: 0, beta2_error=1e-7), FakeOp(lambda _: 5)):
        with pytest.raises(HostError, match=r"cpu_adam op: got results that no known order"):
            measure_tail(op)
        assert op.destroyed == 1


@needs_compiler
def test_rule_of_the_tail_holds_for_the_op_of_this_machine() -> None:
    assert stock_tail().width in (1, 4, 8, 16)
    assert stock_tail().of(1003) == 1003 % stock_tail().width
    assert measure_tail(stock_op()) == stock_tail()
    assert StockTail(width=0).of(5) == 5


@needs_compiler
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_stay_within_their_arrays(sanitizers: str) -> None:
    sources = [f"csrc/offload/{name}.cpp" for name in ("adam", "adam_avx2", "adam_avx512")]
    sources += ["csrc/common/thread_pool.cpp", "tests/csrc/test_adam.cpp"]
    run_under_sanitizers(sanitizers, sources)


def test_comparison_by_bits_sees_what_equality_does_not() -> None:
    a, b = torch.tensor([0.0, math.nan]), torch.tensor([-0.0, -math.nan])
    assert torch.equal(a[:1], b[:1])
    assert (bits(a) == bits(b)).tolist() == [False, True]
