"""AdamW in torch's order: torch's own fused kernel, the reference, every instruction set."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from lowtide.core.errors import OptimizerError
from lowtide.offload.adam import reference_update, torch_step, update, update_cuda
from lowtide.offload.adapters import torch_adamw
from tests.helpers.ranks import environment
from tests.offload.adam_cases import (
    LEVELS,
    NAMES,
    SAME,
    TYPES,
    State,
    bits,
    gradients,
    mismatches,
    new_state,
    run_level,
    used_state,
    wild,
)

SIZE = 16 * 257
SETTINGS = {
    "plain": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "no decay": {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0},
    "beta1 next to the limit": {"lr": 0.1, "betas": (0.5001, 0.5), "eps": 1e-5, "weight_decay": 1},
    "lr 0": {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    "large": {"lr": 1e30, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 1e10},
    "tiny": {"lr": 1e-40, "betas": (0.9, 0.999), "eps": 1e-42, "weight_decay": 1e-3},
}


def stock(state: State, gradient: Tensor, step: int, settings: dict[str, object]) -> None:
    tensors = (state.param, state.exp_avg, state.exp_avg_sq)
    torch_adamw.stock_update(tensors, gradient, torch.tensor(float(step)), settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_torch_over_many_steps(name: str) -> None:
    theirs, settings = new_state(SIZE), SETTINGS[name]
    mine = theirs.clone()
    for step, gradient in enumerate(gradients(SIZE, 200, torch.float32), start=1):
        stock(theirs, gradient, step, settings)
        update(*mine.arguments(gradient), torch_step(step, **settings))  # type: ignore[arg-type]
    assert mismatches(theirs, mine) == SAME


@pytest.mark.parametrize("step", [1, 2, 7, 1000, 123_457, 10_000_000])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_torch_on_values_of_every_kind(name: str, step: int) -> None:
    theirs, settings = used_state(SIZE, seed=step), SETTINGS[name]
    mine, gradient = theirs.clone(), wild(SIZE, np.random.default_rng(step))
    stock(theirs, gradient, step, settings)
    update(*mine.arguments(gradient), torch_step(step, **settings))  # type: ignore[arg-type]
    assert mismatches(theirs, mine) == SAME


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_equals_the_reference_at_every_size(level: str, dtype: torch.dtype) -> None:
    made = torch_step(3, **SETTINGS["plain"])  # type: ignore[arg-type]
    for size in (*range(1, 34), 4099):
        gradient = wild(size, np.random.default_rng(size)).to(dtype)
        wanted, found = used_state(size), used_state(size)
        low, low_wanted = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        options = {"grad_scale": 0.73, "tail": size % 16}
        reference_update(*wanted.arguments(gradient), made, low_precision=low_wanted, **options)  # type: ignore[arg-type]
        run_level(level, found, gradient, made, low=low, **options)  # type: ignore[arg-type]
        assert mismatches(wanted, found) == SAME
        assert torch.equal(bits(low), bits(low_wanted))


def test_the_order_of_cpu_adam_gives_other_bits() -> None:
    """Why there is an order of its own: what 20 steps in the other one do."""
    from lowtide.offload.adam import Powers, adam_step

    theirs, settings = new_state(SIZE), SETTINGS["plain"]
    mine, powers = theirs.clone(), Powers(0.9, 0.999)
    for step, gradient in enumerate(gradients(SIZE, 20, torch.float32), start=1):
        stock(theirs, gradient, step, settings)
        scalars = adam_step(powers.advance(step, 0.9, 0.999), **settings)  # type: ignore[arg-type]
        update(*mine.arguments(gradient), scalars)
    assert mismatches(theirs, mine)["param"] > SIZE // 4


@pytest.mark.parametrize(
    ("step", "betas", "said"),
    [
        (0, (0.9, 0.9), "step: got 0, allowed is an int from 1"),
        (True, (0.9, 0.9), "step: got True"),
        (1, (0.5, 0.9), r"betas: got \(0.5, 0.9\), allowed is 0.5 < beta1"),
        (1, (1.0, 0.9), "betas: got"),
        (1, (0.9, 1.0), "betas: got"),
    ],
)
def test_bad_scalars_are_refused(step: int, betas: tuple[float, float], said: str) -> None:
    with pytest.raises(OptimizerError, match=said):
        torch_step(step, lr=1e-3, betas=betas, eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize(("capability", "said"), [("avx2", "equal"), ("default", "HostError")])
def test_a_torch_that_computes_otherwise_is_noticed(capability: str, said: str) -> None:
    script = (
        "from lowtide.core.errors import HostError\n"
        "from lowtide.offload.adapters.torch_adamw import check_torch\n"
        "try:\n    check_torch()\n    print('equal')\n"
        "except HostError as error:\n    print('HostError', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True,
        env=environment({"ATEN_CPU_CAPABILITY": capability}),
    )  # fmt: skip
    assert said in done.stdout
    assert said == "equal" or "ATEN_CPU_CAPABILITY" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
def test_gpu_equals_cpu_bit_for_bit(dtype: torch.dtype) -> None:
    size, source = 100_003, np.random.default_rng(2)
    here = used_state(size)
    there = State(**{name: tensor.cuda() for name, tensor in vars(here).items()})
    for step in range(1, 9):
        gradient = wild(size, source).to(dtype)
        made = torch_step(step, **SETTINGS["plain"])  # type: ignore[arg-type]
        update(*here.arguments(gradient), made)
        update_cuda(*there.arguments(gradient.cuda()), made)
        back = State(**{name: tensor.cpu() for name, tensor in vars(there).items()})
        assert mismatches(here, back) == SAME
