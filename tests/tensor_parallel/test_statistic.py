"""Three bfloat16 columns carry a float32 sum exactly, whoever adds them up and in which order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lowtide.tensor_parallel.group import Traffic
from lowtide.tensor_parallel.statistic import (
    PIECES,
    columns,
    local_scale,
    message_dtype,
    read,
    statistic_dtype,
    write,
)

SIZES = range(1, 9)
# Below it the last of the 24 bits is smaller than the smallest bfloat16, 2^-133.
SMALLEST = 2.0**-109
LARGEST = float(np.finfo(np.float32).max)
HALF_LARGEST = torch.finfo(torch.bfloat16).max


def message(values: Tensor, order: list[int] | None = None) -> Tensor:
    """Sum the columns that each rank writes for its row of `values`, in bfloat16."""
    size, tokens = values.shape
    rooms = []
    for rank in range(size):
        room = torch.full((tokens, size * PIECES), float("nan"), dtype=torch.bfloat16)
        write(room, values[rank], rank)
        rooms.append(room)
    total = torch.zeros_like(rooms[0])
    for rank in order if order is not None else range(size):
        total += rooms[rank]
    return total


def spread(size: int, *, low: int, high: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """Random significands with exponents from `low` to `high`."""
    generator = np.random.default_rng(seed)
    significands = generator.integers(2**23, 2**24, (size, tokens)).astype(np.float64)
    exponents = generator.integers(low, high + 1, (size, tokens))
    return torch.from_numpy(np.ldexp(significands, exponents - 23).astype(np.float32))


def in_order(values: Tensor) -> Tensor:
    total = values[0].numpy().copy()
    for row in values[1:].numpy():
        total = total + row
    return torch.from_numpy(total)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_is_read_to_the_last_bit(size: int) -> None:
    values = spread(size, low=-109, high=126)
    for rank in range(size):
        alone = torch.zeros_like(values)
        alone[rank] = values[rank]
        assert same_bits(read(message(alone)), values[rank])


@pytest.mark.parametrize("size", SIZES)
def test_sum_is_that_of_float32(size: int) -> None:
    values = spread(size, low=-109, high=120)
    got, exact = read(message(values)).double(), values.double().sum(0)
    # Each of size - 1 float32 additions of positive numbers rounds once.
    bound = (size - 1) * 2.0**-24
    assert ((got - exact).abs() <= bound * exact).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_bits_do_not_depend_on_the_order_of_the_reduction(size: int) -> None:
    values = spread(size, low=-20, high=20)
    first = read(message(values))
    for order in itertools.permutations(range(size)):
        assert same_bits(read(message(values, list(order))), first)


@pytest.mark.parametrize("size", SIZES)
def test_negative_sums_travel_too(size: int) -> None:
    values = spread(size, low=-30, high=30) * (2.0 * (torch.arange(size * 400) % 2) - 1).view(
        size, -1
    )
    error = (read(message(values)).double() - values.double().sum(0)).abs()
    assert (error <= size * 2.0**-24 * values.double().abs().sum(0)).all()


@pytest.mark.parametrize("size", SIZES)
def test_zero_is_zero(size: int) -> None:
    assert torch.equal(read(message(torch.zeros(size, 3))), torch.zeros(3))


@pytest.mark.parametrize("size", SIZES)
def test_subnormal_numbers_lose_only_what_no_bfloat16_can_hold(size: int) -> None:
    values = torch.cat(
        (
            spread(size, low=-126, high=-110),
            torch.tensor([2.0**-149, 2.0**-140, 2.0**-133, 2.0**-126]).expand(size, -1),
        ),
        dim=1,
    )
    assert (values < SMALLEST).all()
    error = (read(message(values)).double() - values.double().sum(0)).abs()
    assert (error <= size * 2.0**-133).all()


@pytest.mark.parametrize("size", SIZES)
def test_the_largest_numbers_stay_finite(size: int) -> None:
    values = torch.zeros(size, 4)
    values[size - 1] = torch.tensor([LARGEST, HALF_LARGEST, HALF_LARGEST * 1.0019, -LARGEST])
    assert values.isfinite().all()
    assert (values[size - 1, 2] > HALF_LARGEST).item()
    assert same_bits(read(message(values)), values[size - 1])


@pytest.mark.parametrize("size", SIZES)
def test_infinity_and_not_a_number_come_out_as_they_went_in(size: int) -> None:
    values = torch.ones(size, 4)
    values[0] = torch.tensor([float("inf"), float("nan"), 1.0, LARGEST])
    values[size - 1, 3] = LARGEST
    got = read(message(values))
    assert got[0].item() == float("inf")
    assert got[1].isnan()
    assert got[2].item() == size
    if size > 1:
        assert got[3].item() == float("inf")  # the sum itself is too large


@pytest.mark.parametrize("size", SIZES)
def test_wider_messages_carry_one_number(size: int) -> None:
    for dtype in (torch.float32, torch.float64):
        total = torch.zeros(400, columns(dtype, size) or 1, dtype=dtype)
        values = spread(size, low=-30, high=30).to(dtype)
        for rank in range(size):
            room = torch.full_like(total, float("nan"))
            write(room, values[rank], rank)
            total += room
        assert torch.equal(read(total), in_order(values.float()) if dtype == torch.float32
                           else values.cumsum(0)[-1])  # fmt: skip


def test_what_is_read_is_no_view_of_the_message() -> None:
    room = torch.ones(3, 1)
    got = read(room)
    room.zero_()
    assert torch.equal(got, torch.ones(3))


def test_columns_and_dtypes() -> None:
    assert [columns(torch.bfloat16, size) for size in (1, 2, 8)] == [0, 6, 24]
    assert [columns(torch.float32, size) for size in (1, 2, 8)] == [0, 1, 1]
    assert [columns(torch.float64, size) for size in (1, 2)] == [0, 1]
    assert [columns(torch.float16, size) for size in (1, 2)] == [0, 1]
    assert message_dtype(torch.float16) == torch.float32
    assert message_dtype(torch.bfloat16) == torch.bfloat16
    assert statistic_dtype(torch.float64) == torch.float64
    assert {statistic_dtype(each) for each in (torch.float16, torch.bfloat16)} == {torch.float32}


def test_bytes_of_a_ring() -> None:
    """An all-reduce passes the ring twice, 1/p at a time, and each other collective once."""
    traffic = Traffic()
    traffic.add("forward", "all_reduce", 800)
    traffic.add("backward", "all_reduce", 200)
    traffic.add("forward", "all_gather", 400)
    traffic.add("backward", "reduce_scatter", 80)
    assert traffic.wire_bytes(4) == 2 * 0.75 * 1000 + 0.75 * 480
    assert traffic.wire_bytes(1) == 0


def test_scale_of_halves() -> None:
    x = torch.tensor([[3e4, -4e4], [0.0, 0.0], [1e-3, 1e-3]])
    scale = local_scale(x.square().sum(-1), 2)
    assert scale.shape == (3, 1)
    assert scale[0].item() == pytest.approx(float(np.sqrt(12.5e8)), rel=1e-6)
    assert scale[1:].flatten().tolist() == [1.0, 1.0]
