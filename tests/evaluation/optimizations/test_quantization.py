"""Quantised weights, held to slow and literal versions of the methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.core.errors import DataError
from lowtide.evaluation.optimizations import Context, Stack
from lowtide.evaluation.optimizations.base import storages
from lowtide.evaluation.optimizations.blocks import blocks_of, linears_of
from lowtide.evaluation.optimizations.calibration import InputStatistics, input_statistics
from lowtide.evaluation.optimizations.quantization.grids import (
    IntegerGrid,
    NormalFloat,
    normal_quantiles,
)
from lowtide.evaluation.optimizations.quantization.linear import (
    Int8Linear,
    PackedLinear,
    encode,
    int8_rows,
)
from lowtide.evaluation.optimizations.quantization.methods import Awq, Gptq, Rtn, SmoothQuant
from lowtide.evaluation.optimizations.quantization.packing import pack, unpack
from tests.evaluation.optimizations.models import seeded_model, seeded_tokens
from tests.evaluation.optimizations.test_pruning import correlated, measured


def random_weight(outputs: int = 24, inputs: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(1, 41), st.integers(0, 9))
def test_packing_is_undone_by_unpacking(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_nibbles_lie_as_documented() -> None:
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    with pytest.raises(DataError, match="codes of 3 bits have no packed form"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_integer_grid_holds_zero_and_is_half_a_step_off_at_most(bits: int) -> None:
    weight = random_weight().double()
    weight[:, 3] = 0
    weight[0] = weight[0].abs()  # one side only
    grid = IntegerGrid(bits)
    scale, zero = grid.fit(weight)
    nearest = grid.nearest(weight, scale, zero)
    assert (nearest[:, 3] == 0).all()
    # The zero point is whole, so the ends may lie half a step more inside.
    assert ((nearest - weight).abs() <= scale * 1.0001).all()
    inside = (weight > nearest.amin(1, keepdim=True)) & (weight < nearest.amax(1, keepdim=True))
    assert (
        (nearest - weight).abs()[inside] <= (scale / 2 * 1.0001).expand_as(weight)[inside]
    ).all()
    assert len(nearest[0].unique()) <= 2**bits


def test_nf4_holds_the_published_values_and_takes_the_nearest() -> None:
    published = [  # QLoRA, App. E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert normal_quantiles().tolist() == pytest.approx(published, abs=1e-6)
    weight = random_weight().double()
    grid = NormalFloat()
    scale, zero = grid.fit(weight)
    all_values = normal_quantiles() * scale
    best = (weight.unsqueeze(-1) - all_values.unsqueeze(1)).abs().amin(-1)
    assert torch.allclose((grid.nearest(weight, scale, zero) - weight).abs(), best)


@pytest.mark.parametrize("spelled", ["quant.rtn:4,g16", "quant.gptq:4,g16", "quant.nf4:g16"])
def test_a_packed_layer_computes_with_exactly_the_simulated_weight(spelled: str) -> None:
    model, context = seeded_model(), Context(calibration=seeded_tokens(seed=9))
    found = []
    for each in (spelled, spelled + ",simulated"):
        with Stack([each]).apply(model, context) as applied, torch.no_grad():
            found.append(model(input_ids=seeded_tokens()).logits)
            report = applied.bytes_report()
        is_smaller = report["after_bytes"] < report["before_bytes"]
        assert is_smaller == ("simulated" not in each)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("codes", "most"),
    [
        (encode(random_weight(256, 512), IntegerGrid(4), 128), 0.55),
        (encode(random_weight(256, 512), NormalFloat(), 128), 0.55),
        (encode(random_weight(256, 512), IntegerGrid(8), 128), 1.05),
        (encode(random_weight(256, 512), IntegerGrid(2), 128), 0.30),
    ],
)
def test_packed_weights_take_the_bytes_of_their_bits(codes: Any, most: float) -> None:
    layer = PackedLinear(codes, None)
    held = sum(storages([layer]).values())
    assert codes.grid.bits / 8 < held / (256 * 512) <= most


def test_a_packed_layer_keeps_bias_and_takes_groups_that_do_not_divide() -> None:
    linear = nn.Linear(21, 5)
    layer = PackedLinear(encode(linear.weight.detach(), IntegerGrid(8), 16), linear.bias)
    x = random_weight(3, 21)
    assert layer.decoded(torch.float32).shape == (5, 21)
    assert torch.allclose(layer(x), linear(x), atol=0.05)
    assert torch.equal(layer(torch.zeros(1, 21))[0], linear.bias)


def surgeon(weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Quantise as Optimal Brain Quantisation in fixed order does, inverting again each time."""
    left, done = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    hessian = gram + torch.eye(len(gram)) * 0.01 * gram.diagonal().mean()
    grid = IntegerGrid(bits)
    for column in range(weight.shape[1]):
        if column % group == 0:
            scale, zero = grid.fit(left[:, column : column + group])
        done[:, column] = grid.nearest(left[:, column : column + 1], scale, zero)[:, 0]
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = (left[:, column] - done[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    return done


@pytest.mark.parametrize("group", [8, 0])
def test_gptq_is_the_surgeon_in_fixed_order(group: int) -> None:
    weight, statistics = random_weight(6, 24), measured(correlated(200, 24))
    codes = Gptq(bits=4, group_size=group).encoded(weight, statistics, None)
    expected = surgeon(weight, statistics.gram, 4, group or 24)
    assert torch.allclose(codes.values(), expected)


def all_layers(model: Any) -> list[tuple[torch.Tensor, InputStatistics]]:
    tokens = seeded_tokens(seed=9, rows=16)
    linears = [place.linear for block in blocks_of(model) for place in linears_of(block)]
    statistics = input_statistics(model, linears, tokens)
    return [(x.weight.detach(), s) for x, s in zip(linears, statistics, strict=True)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_and_awq_lose_less_than_rounding_on_every_layer(bits: int) -> None:
    for weight, statistics in all_layers(seeded_model()):
        kind = {"bits": bits, "group_size": 16, "simulated": True}
        rounded, gptq, awq = (
            statistics.error(method(**kind).encoded(weight, statistics, None).values(), weight)
            for method in (Rtn, Gptq, Awq)
        )
        assert gptq < rounded
        assert awq <= rounded


def test_awq_scales_the_inputs_that_carry_much() -> None:
    x = correlated(300, 16) * 0.05
    x[:, 3] *= 200
    weight, statistics = random_weight(16, 16), measured(x)
    codes = Awq(bits=3, group_size=0, simulated=True).encoded(weight, statistics, None)
    assert codes.input_scale is not None
    assert codes.input_scale.argmax() == 3
    plain = Rtn(bits=3, group_size=0, simulated=True).encoded(weight, statistics, None)
    assert statistics.error(codes.values(), weight) < 0.5 * statistics.error(plain.values(), weight)


def test_a_mask_stays_while_gptq_compensates() -> None:
    weight, statistics = random_weight(6, 24), measured(correlated(200, 24))
    mask = random_weight(6, 24, seed=4) > 0
    codes = Gptq(bits=8, group_size=8).encoded(weight * mask, statistics, mask)
    assert (codes.values()[~mask] == 0).all()
    free = Gptq(bits=8, group_size=8).encoded(weight * mask, statistics, None)
    assert (free.values()[~mask] != 0).any()  # so it is the mask that keeps them


def test_integer_products_are_exact() -> None:
    linear = nn.Linear(300, 7)
    layer = Int8Linear(linear, None)
    x = random_weight(5, 300)
    codes, scale = int8_rows(x)
    sums = codes.to(torch.int64) @ layer.codes.to(torch.int64).T
    expected = sums.double() * scale.double() * layer.scale.double()
    assert torch.equal(layer(x), expected.float() + linear.bias)
    assert torch.allclose(layer(x), linear(x), atol=0.05)
    assert layer.codes.dtype == torch.int8
    assert int(codes.max()) == 127 or int(codes.min()) == -127


def test_smoothquant_helps_where_one_input_is_large() -> None:
    x = random_weight(200, 16)
    x[:, 5] *= 100
    linear = nn.Linear(16, 8, bias=False)
    statistics = measured(x)
    scale = SmoothQuant(strength=0.5).input_scale(linear.weight.detach(), statistics)
    assert scale is not None
    expected = (x[:, 5].abs().max() / linear.weight[:, 5].abs().max()).sqrt()
    assert float(scale[5]) == pytest.approx(expected.item(), rel=1e-5)
    exact = linear(x)
    smooth, plain = Int8Linear(linear, scale), Int8Linear(linear, None)
    assert (smooth(x) - exact).square().mean() < 0.2 * (plain(x) - exact).square().mean()
