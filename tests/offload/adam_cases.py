"""Optimizer state for the Adam tests, DeepSpeed's own op beside it, and comparison by bits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowtide.core.native import native, status
from lowtide.offload.adam import AdamStep, Powers, adam_step
from lowtide.offload.adam_stock import StockTail, measure_tail

TYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LEVELS = list(native().offload.adam_levels()) if status().available else []
_MAX = 3.4028234663852886e38
SPECIALS = [
    0.0, 1e-45, 2e-45, 1.1754942e-38, 1.17549435e-38, 6.1e-5, 1e-20, 1e-8, 1e-3, 0.1, 1.0,
    1.0000001, 65504.0, 65519.99, 65520.0, 1e18, 1.8446743e19, 1e30, _MAX,
    float("inf"), float("nan"),
]  # fmt: skip
_ids = itertools.count(1 << 20)  # of CPUAdam objects, far from those that DeepSpeed hands out


@dataclass(frozen=True, kw_only=True)
class Settings:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    bias_correction: bool = True
    adamw: bool = True


@functools.cache
def stock_op() -> Any:
    """Return DeepSpeed's compiled extension."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    return CPUAdamBuilder().load()


@functools.cache
def stock_tail() -> StockTail:
    return measure_tail(stock_op())


class Stock:
    """One object of DeepSpeed's compiled CPUAdam."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        self._op = stock_op()
        self._id = next(_ids)
        self._op.create_adam(self._id, s.lr, *s.betas, s.eps, s.weight_decay, s.adamw, False)

    def __call__(self, state: State, grad: Tensor, step: int, s: Settings) -> None:
        scalars = (step, s.lr, *s.betas, s.eps, s.weight_decay, s.bias_correction)
        self._op.adam_update(self._id, *scalars, state.param, grad, state.exp_avg, state.exp_avg_sq)

    def __del__(self) -> None:
        self._op.destroy_adam(self._id)


@dataclass(kw_only=True)
class State:
    """float32 tensors of shape (N,)."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def clone(self) -> State:
        return State(**{name: tensor.clone() for name, tensor in vars(self).items()})

    def slice(self, begin: int, end: int) -> State:
        return State(**{name: tensor[begin:end] for name, tensor in vars(self).items()})

    def arguments(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.param, grad, self.exp_avg, self.exp_avg_sq


@dataclass
class Ours:
    """What drives our update as CPUAdam's object drives its own."""

    settings: Settings
    powers: Powers = field(init=False)

    def __post_init__(self) -> None:
        self.powers = Powers(*self.settings.betas)

    def step(self, step: int, s: Settings) -> AdamStep:
        powers = self.powers.advance(step, *s.betas)
        return adam_step(
            powers,
            lr=s.lr,
            betas=s.betas,
            eps=s.eps,
            weight_decay=s.weight_decay,
            bias_correction=s.bias_correction,
            adamw=s.adamw,
        )


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of `tensor` as integers, all NaN as one."""
    is_wide = tensor.dtype == torch.float32
    as_bits = tensor.view(torch.int32 if is_wide else torch.int16).clone()
    as_bits[torch.isnan(tensor)] = -1
    return as_bits


def mismatches(a: State, b: State) -> dict[str, int]:
    pairs = zip(vars(a), vars(a).values(), vars(b).values(), strict=True)
    return {name: int((bits(x) != bits(y)).sum()) for name, x, y in pairs}


SAME = {"param": 0, "exp_avg": 0, "exp_avg_sq": 0}


def new_state(size: int, seed: int = 0) -> State:
    source = torch.Generator().manual_seed(seed)
    param = torch.randn(size, generator=source) * 0.05
    return State(param=param, exp_avg=torch.zeros(size), exp_avg_sq=torch.zeros(size))


def used_state(size: int, seed: int = 0) -> State:
    """Return state as after many steps, with a part of it far from the ordinary."""
    state = new_state(size, seed)
    source = np.random.default_rng(seed)
    state.exp_avg = wild(size, source)
    state.exp_avg_sq = wild(size, source).abs()
    is_usual = torch.from_numpy(source.random(size) < 0.5)
    state.param = torch.where(is_usual, state.param, wild(size, source))
    return state


def wild(size: int, source: np.random.Generator) -> Tensor:
    """Return float32 of every magnitude, a third of them special: zeros, subnormal, inf, NaN."""
    sign = source.choice([-1.0, 1.0], size)
    spread = np.exp2(source.uniform(-149, 127, size)) * source.uniform(1, 2, size)
    usual = source.normal(size=size) * 10.0 ** source.uniform(-6, 2, size)
    special = source.choice(SPECIALS, size)
    kind = source.integers(0, 3, size)
    with np.errstate(over="ignore", under="ignore"):
        chosen = np.choose(kind, [usual, sign * spread, sign * special])
        return torch.from_numpy(chosen.astype(np.float32))


def gradients(size: int, steps: int, dtype: torch.dtype, seed: int = 0) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(seed + 77)
    for _ in range(steps):
        scale = 10 ** float(torch.randn(1, generator=source))
        yield (torch.randn(size, generator=source) * scale).to(dtype)


def run_level(
    level: str,
    state: State,
    grad: Tensor,
    step: AdamStep,
    *,
    grad_scale: float = 1.0,
    low: Tensor | None = None,
    kept: Tensor | None = None,
    tail: int = 0,
    threads: int = 1,
) -> None:
    """Call the native update on one instruction set."""
    offload = native().offload
    offload.adam_update(
        offload.AdamStep(**step.scalars(), mode=step.mode, grad_scale=grad_scale),
        grad.numel(),
        param=state.param.data_ptr(),
        exp_avg=state.exp_avg.data_ptr(),
        exp_avg_sq=state.exp_avg_sq.data_ptr(),
        grad=grad.data_ptr(),
        grad_type=NAMES[grad.dtype],
        low_precision=0 if low is None else low.data_ptr(),
        low_type="float32" if low is None else NAMES[low.dtype],
        kept_grad=0 if kept is None else kept.data_ptr(),
        tail=tail,
        threads=threads,
        level=level,
    )


PLAIN = [(step, Settings()) for step in range(1, 13)]
SCHEDULES: dict[str, list[tuple[int, Settings]]] = {
    "plain": PLAIN,
    "l2": [(step, Settings(adamw=False)) for step in range(1, 13)],
    "no decay": [(step, Settings(weight_decay=0.0)) for step in range(1, 13)],
    "negative decay": [(step, Settings(weight_decay=-0.1)) for step in range(1, 4)],
    "l2 no decay": [(step, Settings(weight_decay=0.0, adamw=False)) for step in range(1, 4)],
    "no bias correction": [(step, Settings(bias_correction=False)) for step in range(1, 13)],
    "l2 no bias correction": [
        (step, Settings(bias_correction=False, adamw=False)) for step in range(1, 4)
    ],
    "resumed": [(step, Settings()) for step in (1, 2, 3, 100, 101, 102, 7, 8, 19999, 20000)],
    "resumed first": [(step, Settings()) for step in range(1234, 1240)],
    "step asked twice": [(step // 2, Settings()) for step in range(2, 14)],
    "two groups": [
        (step // 2, replace(Settings(), betas=((0.9, 0.95), (0.85, 0.999))[step % 2]))
        for step in range(2, 26)
    ],
    "one step of other betas": [
        (step, Settings(betas=(0.8, 0.99) if step == 5 else (0.9, 0.999))) for step in range(1, 12)
    ],
    "lr and decay change": [
        (step, Settings(lr=3e-4 * step / 7, weight_decay=0.1 / step, eps=10.0**-step))
        for step in range(1, 13)
    ],
    "lr 0": [(step, Settings(lr=0.0)) for step in range(1, 4)],
    "betas 0": [(step, Settings(betas=(0.0, 0.0))) for step in range(1, 4)],
    "large": [(step, Settings(lr=1e30, eps=0.0, weight_decay=1e10)) for step in range(1, 4)],
    "tiny": [(step, Settings(lr=1e-40, eps=1e-42, weight_decay=1e-3)) for step in range(1, 4)],
}
