"""The quantiser's promise, in exact arithmetic, and what it does to extreme values."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from lowtide.compression.activations import quantiser as module
from lowtide.compression.activations.quantiser import SLACK, Quantiser

BITS = (2, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantiser(bits: int = 8, size: int = 32, stochastic: bool = True, **more: float) -> Quantiser:
    return Quantiser(bits=bits, group_size=size, is_stochastic=stochastic, **more)  # type: ignore[arg-type]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kinds(numel: int, dtype: torch.dtype) -> dict[str, Tensor]:
    normal = torch.randn(numel, generator=generator(1))
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    made = {
        "normal": normal,
        "relu": normal.relu(),
        "constant": torch.full((numel,), 0.3),
        "zero": torch.zeros(numel),
        "offset": normal + 1000.0,
        "outlier": normal.clone().index_fill_(0, torch.tensor([numel // 2]), 3e4),
        "denormal": normal * tiny / 4,
        "small": normal * 1e-7,
        "huge": normal.sign() * largest,
        "large": normal * largest / 64,
        "nan": normal.clone().index_fill_(0, torch.tensor([0]), torch.nan),
        "infinite": normal.clone().index_fill_(0, torch.tensor([numel - 1]), -torch.inf),
    }
    return {name: values.to(dtype) for name, values in made.items()}


def half_ulp(value: float, dtype: torch.dtype) -> Fraction:
    info = torch.finfo(dtype)
    scale = max(abs(Fraction(value)), Fraction(info.tiny))
    exponent = scale.numerator.bit_length() - scale.denominator.bit_length() + 1
    return Fraction(info.eps) * Fraction(2) ** exponent / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 33, 96])
def test_every_value_is_within_its_groups_promise(dtype: torch.dtype, numel: int) -> None:
    for (kind, values), bits, stochastic in product(
        kinds(numel, dtype).items(), BITS, (True, False)
    ):
        codec = quantiser(bits, stochastic=stochastic)
        codes = codec.encode(values, generator())
        decoded = codes.decode()
        assert (decoded.dtype, decoded.shape) == (dtype, values.shape)
        kept = set() if codes.kept is None else set(codes.kept.tolist())
        pairs = list(zip(values.tolist(), decoded.tolist(), strict=True))
        for place, (before, after) in enumerate(pairs):
            group = place // codec.group_size
            if group in kept:
                assert before == after or before != before, (kind, place)
                continue
            assert abs(after) <= torch.finfo(dtype).max, (kind, place)
            step = Fraction(codes.step[group].item())
            part = (1 if stochastic else Fraction(1, 2)) + Fraction(SLACK)
            rounding = half_ulp(after, torch.float32)
            if dtype != torch.float32:
                rounding += half_ulp(after, dtype)
            assert abs(Fraction(after) - Fraction(before)) <= step * part + rounding, (
                kind, bits, stochastic, place, before, after,
            )  # fmt: skip
        members = [values[g * 32 : (g + 1) * 32].float() for g in range(codes.low.numel())]
        for group, each in enumerate(members):
            if group not in kept:  # the step is what the range and the bits say
                levels = codec.levels - int(each.min() == 0)
                span = ((each.max() - each.min()) / levels).item()
                assert codes.step[group].item() == pytest.approx(span, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_cannot_be_quantised_keep_their_bits(dtype: torch.dtype) -> None:
    values = torch.randn(4 * 32 + 7, generator=generator()).to(dtype)
    values[3], values[40], values[-1] = torch.nan, torch.inf, -torch.inf
    codes = quantiser(2).encode(values, generator())
    assert codes.kept is not None
    assert codes.kept.tolist() == [0, 1, 4]
    decoded = codes.decode()
    for part in (slice(0, 64), slice(128, None)):
        assert torch.equal(decoded[part].view(torch.uint8), values[part].view(torch.uint8))
    assert decoded[64:128].isfinite().all()
    assert not torch.equal(decoded[64:128], values[64:128])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_zero_or_positive_stays_so_behind_relu(
    bits: int, scale: float, dtype: torch.dtype
) -> None:
    values = (torch.randn(4096, generator=generator()).relu_() * scale).to(dtype)
    for stochastic in (True, False):
        decoded = quantiser(bits, stochastic=stochastic).encode(values, generator()).decode()
        assert torch.equal(decoded > 0, values > 0)
        assert torch.equal(decoded == 0, values == 0)


@pytest.mark.parametrize("bits", BITS)
def test_random_rounding_is_right_in_the_mean(bits: int) -> None:
    values = torch.rand(64, generator=generator(5)) * 3 - 1
    values[:32].relu_()  # one group each of the two kinds
    codec, source = quantiser(bits), generator(6)
    draws = torch.stack([codec.encode(values, source).decode().double() for _ in range(4000)])
    step = codec.encode(values, source).step.repeat_interleave(32).double()
    # A draw's deviation is half a step at most; 5 deviations of the mean of 4000 draws.
    assert ((draws.mean(0) - values).abs() <= 5 * 0.5 * step / 4000**0.5).all()
    nearest = quantiser(bits, stochastic=False).encode(values).decode().double()
    assert ((nearest - values).abs() > 5 * 0.5 * step / 4000**0.5).any()


def test_bytes_are_what_the_bits_say() -> None:
    values = torch.randn(256 * 100)
    for bits in BITS:
        codes = quantiser(bits, 256).encode(values, generator())
        assert codes.nbytes == 256 * 100 * bits // 8 + 8 * 100
        assert codes.packed.numel() == 256 * 100 * bits // 8


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    values[500] = torch.inf
    whole = quantiser(4, stochastic=False).encode(values)
    monkeypatch.setattr(module, "CHUNK_ELEMS", 96)
    parts = quantiser(4, stochastic=False).encode(values)
    assert torch.equal(whole.packed, parts.packed)
    assert torch.equal(whole.decode(), parts.decode())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_bound_holds_with_all_rounding(dtype: torch.dtype, stochastic: bool) -> None:
    for kind, values in kinds(96, dtype).items():
        codec = quantiser(8, stochastic=stochastic, bound=0.005)
        decoded = codec.encode(values, generator()).decode()
        for before, after in zip(values.split(32), decoded.split(32), strict=True):
            if torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
                continue
            exact = [Fraction(each) for each in before.tolist()]
            limit = (max(exact) - min(exact)) * Fraction(0.005)
            pairs = zip(exact, after.tolist(), strict=True)
            assert all(abs(Fraction(b) - a) <= limit for a, b in pairs), kind


def test_a_bound_that_dtype_rounding_breaks_keeps_groups() -> None:
    # Steps are 3 and the upper neighbours 4 apart, so that a decoded value may be 4 off.
    values = torch.arange(256, 1020, 4).to(torch.bfloat16)
    assert quantiser(8, 256).encode(values, generator()).kept is None
    assert quantiser(8, 256, bound=0.00395).encode(values, generator()).kept is not None
