"""The bottleneck layer against its formula, CoLA's deviation, and bad sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.bottleneck import (
    ACTIVATIONS,
    BottleneckLinear,
    activation_function,
    initial_std,
)

_erf = np.vectorize(math.erf)
FORMULAS = {
    None: lambda z: z,
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z * (1 + _erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: np.maximum(z, 0),
    "tanh": np.tanh,
}


def test_every_activation_has_a_formula() -> None:
    assert set(ACTIVATIONS) | {None} == set(FORMULAS)


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("activation", list(FORMULAS), ids=str)
def test_output_is_the_formula(activation: str | None, has_biases: bool) -> None:
    layer = BottleneckLinear(
        7, 3, 5, activation, has_biases, latent_bias=has_biases, dtype=torch.float64
    )
    state = layer.state_dict()
    assert list(state) == (
        ["down.weight", "down.bias", "up.weight", "up.bias"]
        if has_biases
        else ["down.weight", "up.weight"]
    )
    for name, value in state.items():
        if name.endswith("bias"):
            value.copy_(torch.randn(value.shape, dtype=torch.float64))
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    latent = x.numpy() @ state["down.weight"].numpy().T
    latent = latent + (state["down.bias"].numpy() if has_biases else 0)
    expected = FORMULAS[activation](latent) @ state["up.weight"].numpy().T
    expected = expected + (state["up.bias"].numpy() if has_biases else 0)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_both_factors_start_with_the_deviation_of_cola() -> None:
    torch.manual_seed(0)
    layer = BottleneckLinear(300, 100, 700, bias=True, latent_bias=True, dtype=torch.float64)
    expected = 100**-0.25 * 1000**-0.25
    down, up = layer.down.weight.detach(), layer.up.weight.detach()
    for weight in (down, up):
        # The deviation of n draws is off by about std / sqrt(2 n).
        assert float(weight.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * 30_000))
        assert abs(float(weight.mean())) < 5 * expected / math.sqrt(30_000)
    product = up @ down
    assert float(product.std()) == pytest.approx(1000**-0.5, rel=0.02)
    assert not layer.down.bias.any()
    assert not layer.up.bias.any()
    assert initial_std(300, 100, 700) == pytest.approx(expected, rel=1e-15)


def test_a_generator_decides_the_draws_and_nothing_else_is_drawn() -> None:
    layer = BottleneckLinear(9, 4, 6)
    before = torch.random.get_rng_state()
    drawn = []
    for _ in range(2):
        layer.reset_parameters(torch.Generator().manual_seed(5))
        drawn.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(before, torch.random.get_rng_state())
    layer.reset_parameters(torch.Generator().manual_seed(6))
    assert not torch.equal(drawn[0], torch.cat([p.flatten() for p in layer.parameters()]))


def test_device_dtype_and_sizes_are_what_was_asked_for() -> None:
    layer = BottleneckLinear(8, 3, 5, "silu", True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert (layer.in_features, layer.rank, layer.out_features) == (8, 3, 5)
    assert "in_features=8, rank=3, out_features=5, activation=silu" in repr(layer)


def test_the_rank_may_exceed_the_output_but_not_the_input() -> None:
    assert BottleneckLinear(8, 8, 2)(torch.ones(1, 8)).shape == (1, 2)
    with pytest.raises(ModelError, match=r"rank 9 exceeds the input width 8.*at most 8"):
        BottleneckLinear(8, 9, 20)


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 1, 1), "in_features"), ((1, 0, 1), "rank"), ((1, 1, -2), "out_feat")]
)
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}.* is {min(sizes)}, allowed is"):
        BottleneckLinear(*sizes)


def test_an_unknown_activation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'got "sillu".*"gelu_tanh".*Did you mean "silu"\?'):
        BottleneckLinear(4, 2, 4, "sillu")
    with pytest.raises(ConfigError, match="swish"):
        activation_function("swish")
