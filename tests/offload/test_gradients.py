"""Lazy float32 gradients against what DeepSpeed does at once, over random histories."""

from __future__ import annotations

import random

import pytest
import torch

from lowtide.offload.gradients import GroupGradients, Span, as_float32

SIZES = (5, 16, 33, 8)


class Stock:
    """The float32 buffer of DeepSpeed: widened at the boundary, unscaled in place."""

    def __init__(self) -> None:
        self.wide = torch.zeros(sum(SIZES))

    def arrive(self, span: Span, accumulated: torch.Tensor) -> None:
        span.of(self.wide).copy_(span.of(accumulated))

    def update(self, scale: float) -> torch.Tensor:
        return self.wide.mul_(scale).clone()


def spans() -> list[Span]:
    found, begin = [], 0
    for key, count in enumerate(SIZES):
        found.append(Span(key, begin, count))
        begin += count
    return found


class Pair:
    """Both, with one accumulation buffer; `made` counts float32 buffers."""

    def __init__(self, dtype: torch.dtype, keys: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.accumulated = torch.zeros(sum(SIZES), dtype=dtype)
        self.spans = spans()
        self.stock = Stock()
        self.made = 0
        self._wide: torch.Tensor | None = None
        self.lazy = GroupGradients(self.accumulated, [self.spans[k] for k in keys], self._make)

    def _make(self) -> torch.Tensor:
        if self._wide is None:
            self._wide = torch.zeros(sum(SIZES))
            self.made += 1
        return self._wide

    def write(self, key: int, chance: random.Random, *, is_last: bool = True) -> None:
        """A micro-batch brings a parameter's gradient."""
        if not is_last:
            self.lazy.overwrite(key)
        generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
        span = self.spans[key]
        span.of(self.accumulated).copy_(torch.randn(span.count, generator=generator))
        if is_last:
            self.lazy.arrive(key)
            self.stock.arrive(span, self.accumulated)

    def update(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each of them updates with."""
        gradient, factor = self.lazy.source(as_float32(scale))
        return gradient.float() * factor, self.stock.update(as_float32(scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_any_history_gives_what_stock_gives(dtype: torch.dtype, seed: int) -> None:
    chance = random.Random(seed)
    pair = Pair(dtype)
    for _ in range(25):
        for key in range(4):
            if chance.random() < 0.8:  # a parameter may miss an update
                pair.write(key, chance)
        action = chance.random()
        if action < 0.2:  # an overflow: no update
            continue
        if action < 0.4:  # somebody reads, and perhaps writes
            assert torch.equal(pair.lazy.widen(), pair.stock.wide)
            if action < 0.3:
                pair.lazy.widen()[3:30] *= 0.5
                pair.stock.wide[3:30] *= 0.5
        ours, stock = pair.update(chance.choice([1.0, 0.3, 1 / 3, 2.0**-12]))
        assert torch.equal(ours, stock)
        if action > 0.9:
            assert torch.equal(pair.lazy.widen(), pair.stock.wide)


def test_all_parameters_in_every_update_need_no_float32_buffer() -> None:
    pair, chance = Pair(torch.bfloat16), random.Random(1)
    for _ in range(3):
        for micro in range(2):
            for key in range(4):
                pair.write(key, chance, is_last=micro == 1)
        gradient, factor = pair.lazy.source(0.5)
        assert gradient is pair.accumulated
        assert factor == 0.5
    assert pair.made == 0


def test_padding_is_zero_in_both() -> None:
    pair, chance = Pair(torch.bfloat16, keys=(1, 2)), random.Random(1)
    for _ in range(3):
        pair.write(1, chance)
        pair.write(2, chance)
        ours, stock = pair.update(0.25)
        assert torch.equal(ours, stock)
    assert not ours[: SIZES[0]].any()


def test_a_parameter_that_missed_the_last_micro_batch(caplog: pytest.LogCaptureFixture) -> None:
    pair, chance = Pair(torch.bfloat16), random.Random(1)
    for key in range(4):
        pair.write(key, chance)
    pair.update(0.5)
    # The window's first micro-batch brings all, its last one all but parameter 2.
    for key in range(4):
        pair.write(key, chance, is_last=False)
    for key in (0, 1, 3):
        pair.write(key, chance)
    ours, stock = pair.update(0.5)
    span = pair.spans[2]
    assert torch.equal(span.of(ours), span.of(pair.accumulated).float() * 0.5)
    assert "did not come with the window's last micro-batch" in caplog.text
    # From then on it is watched, and the same thing gives what stock gives.
    for key in (0, 1, 2, 3):
        pair.write(key, chance)
    ours, stock = pair.update(0.5)
    assert torch.equal(ours, stock)
    for key in range(4):
        pair.write(key, chance, is_last=False)
    for key in (0, 1, 3):
        pair.write(key, chance)
    ours, stock = pair.update(0.25)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("value", [1.0, 1 / 3, torch.tensor(1 / 3, dtype=torch.float64), 0.1])
def test_factor_is_rounded_as_torch_rounds_it(value: float | torch.Tensor) -> None:
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gradient * as_float32(value), gradient.clone().mul_(value))
