"""Lazy float32 gradients against what DeepSpeed does at once, over random histories."""

from __future__ import annotations

import random
from collections.abc import Hashable

import pytest
import torch

from lowtide.offload.gradients import GroupGradients, Keeper, Span, as_float32

SIZES = (5, 16, 33, 8)
PIECES = ((0, 32), (32, 30))  # the third parameter lies in both


class Stock:
    """The float32 buffer of DeepSpeed: widened at the boundary, unscaled in place."""

    def __init__(self) -> None:
        self.wide = torch.zeros(sum(SIZES))

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
        self.buffers = {span.key: span.of(self.accumulated) for span in self.spans}
        self.lazy = GroupGradients(
            self.accumulated, [self.spans[k] for k in keys], self._make, self._relink
        )
        self.kept: dict[tuple[int, int], tuple[Keeper, torch.Tensor, list[tuple[int, int]]]] = {}

    def _relink(self, key: Hashable, there: torch.Tensor | None) -> None:
        span = next(each for each in self.spans if each.key == key)
        self.buffers[key] = span.of(self.accumulated) if there is None else there

    def move(self, piece: tuple[int, int]) -> None:
        """Let a piece accumulate elsewhere, or here again."""
        if piece in self.kept:
            self.kept.pop(piece)[0].release()
        else:
            keeper = self.lazy.keeper(*piece)
            assert keeper is not None
            there = torch.full((piece[1],), float("nan"), dtype=keeper.dtype)
            self.kept[piece] = keeper, there, keeper.keep(there)

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
        self.buffers[key].copy_(torch.randn(span.count, generator=generator))
        if is_last:
            self.lazy.arrive(key)
            span.of(self.stock.wide).copy_(self.buffers[key])

    def update(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what each of them updates with."""
        source = self.lazy.source(as_float32(scale))
        gradient = source.flat.clone()
        if source.is_accumulated:
            for (begin, count), (_, there, loads) in self.kept.items():
                for first, size in loads:
                    there[first : first + size] = gradient[begin + first : begin + first + size]
                gradient[begin : begin + count] = there
        return gradient.float() * source.scale, self.stock.update(as_float32(scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_any_history_gives_what_stock_gives(dtype: torch.dtype, seed: int) -> None:
    chance = random.Random(seed)
    pair = Pair(dtype)
    for _ in range(25):
        for key in range(4):
            if chance.random() < 0.8:  # a parameter may miss an update
                pair.write(key, chance)
        if chance.random() < 0.4:
            pair.move(chance.choice(PIECES))
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
        assert pair.lazy.source(0.5) == (pair.accumulated, 0.5, True)
    assert pair.made == 0


def test_what_is_kept_on_the_device_is_not_on_the_host() -> None:
    pair, chance = Pair(torch.bfloat16, keys=(0, 1, 3)), random.Random(1)
    pair.move(PIECES[0])
    keeper, there, loads = pair.kept[PIECES[0]]
    assert loads == [(21, 11)]
    for key in (0, 1, 3):
        pair.write(key, chance)
    assert not pair.accumulated[:54].any()  # 54: where parameter 3 begins
    assert there[:21].all()
    assert [each.data_ptr() for each in pair.lazy.kept()] == [
        there.data_ptr(), there[5:].data_ptr(),
    ]  # fmt: skip
    keeper.release()
    assert torch.equal(pair.accumulated[:21], there[:21])
    assert not pair.lazy.kept()


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


def test_a_move_that_fails_half_way_loses_no_gradient() -> None:
    pair, chance = Pair(torch.bfloat16), random.Random(1)
    relink = pair._relink
    for key in range(4):
        pair.write(key, chance)

    def fails_at_1(key: Hashable, there: torch.Tensor | None) -> None:
        if key == 1:
            raise RuntimeError("the host cannot")
        relink(key, there)

    keeper = pair.lazy.keeper(0, 32)
    assert keeper is not None
    there = torch.full((32,), float("nan"), dtype=keeper.dtype)
    pair.lazy._relink = fails_at_1
    with pytest.raises(RuntimeError, match="cannot"):
        keeper.keep(there)
    pair.write(1, chance)  # it still comes where it came before
    assert torch.equal(pair.lazy.widen(), pair.stock.wide)
    pair.lazy._relink = relink
    keeper.keep(there)
    pair.write(0, chance)
    pair.lazy._relink = fails_at_1
    with pytest.raises(RuntimeError, match="cannot"):
        keeper.release()
    pair.write(0, chance)  # here again
    pair.lazy._relink = relink
    keeper.release()
    assert pair.lazy.kept() == []
    assert torch.equal(pair.lazy.widen(), pair.stock.wide)


def test_a_part_without_a_whole_parameter_keeps_nothing() -> None:
    lazy = Pair(torch.bfloat16).lazy
    assert lazy.keeper(21, 32) is None  # of the third parameter, most
    assert lazy.keeper(21, 33) is not None
