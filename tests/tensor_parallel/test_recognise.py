"""Low-rank modules in all their forms, and what is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.bottleneck import BottleneckLinear, activation_function
from lowtide.tensor_parallel.recognise import (
    activation_name,
    factors_of,
    renaming,
    to_bottleneck,
)
from tests.tensor_parallel.models import ColaLayer


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


FORMS: dict[str, Any] = {
    "bottleneck": lambda: BottleneckLinear(9, 4, 7, "tanh", True, latent_bias=True),
    "pair": lambda: nn.Sequential(linear(9, 4), linear(4, 7)),
    "pair with biases": lambda: nn.Sequential(linear(9, 4, bias=True), linear(4, 7, bias=True)),
    "pair with SiLU": lambda: nn.Sequential(linear(9, 4), nn.SiLU(), linear(4, 7, bias=True)),
    "pair with tanh GELU": lambda: nn.Sequential(
        linear(9, 4), nn.GELU(approximate="tanh"), linear(4, 7)
    ),
    "pair with Identity": lambda: nn.Sequential(linear(9, 4), nn.Identity(), linear(4, 7)),
    "CoLA": lambda: ColaLayer(9, 4, 7, nn.SiLU()),
    "CoLA with a bias": lambda: ColaLayer(9, 4, 7, nn.SiLU(), bias=True),
    "CoLA without activation": lambda: ColaLayer(9, 4, 7, None),
    "CoLA with a function": lambda: ColaLayer(9, 4, 7, F.silu),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_low_rank_module_becomes_a_bottleneck_with_the_same_output(form: str) -> None:
    torch.manual_seed(0)
    module = FORMS[form]().double()
    factors = factors_of(module, "layer.q")
    assert factors is not None
    assert (factors.in_features, factors.rank, factors.out_features) == (9, 4, 7)
    new = to_bottleneck(factors)
    x = torch.randn(3, 9, dtype=torch.float64)
    torch.testing.assert_close(new(x), module(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", list(FORMS))
def test_renaming_tells_where_every_parameter_went(form: str) -> None:
    module = FORMS[form]()
    state = to_bottleneck(factors_of(module)).state_dict()
    names = renaming(module)
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    assert sorted(names.values()) == sorted(state)
    for old, new in names.items():
        value = module.get_parameter(old)
        assert torch.equal(value.mT if old.startswith("cola_") else value, state[new])


def test_parameters_of_the_same_layout_are_taken_over() -> None:
    module = FORMS["pair with SiLU"]()
    new = to_bottleneck(factors_of(module))
    assert new.down.weight is module[0].weight
    assert new.up.weight is module[2].weight
    assert new.up.bias is module[2].bias


@pytest.mark.parametrize("form", ["pair", "CoLA with a bias"])
def test_frozen_parameters_stay_frozen(form: str) -> None:
    module = FORMS[form]()
    names = renaming(module)
    frozen = next(iter(names))
    module.get_parameter(frozen).requires_grad_(False)
    new = to_bottleneck(factors_of(module))
    found = {name: each.requires_grad for name, each in new.named_parameters()}
    assert found == {now: old != frozen for old, now in names.items()}
    assert all(each.is_contiguous() for each in new.parameters())


def test_a_plain_linear_layer_is_full_rank() -> None:
    assert factors_of(linear(4, 5, bias=True)) is None


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Packed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        self.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def replaced(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def extended() -> nn.Module:
    module = ColaLayer(9, 4, 7, None)
    module.scale = nn.Parameter(torch.ones(4))
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv1d(4, 4, 1), r"m\.q: is torch.nn.modules.conv.Conv1d, allowed are nn.Linear"),
        (Own(4, 4), "Own computes its output or its weight in its own way"),
        (Packed(), r"its weight has shape \(32, 1\) but it says \(8, 8\)"),
        (parametrizations.weight_norm(linear(4, 4)), "computes its output or its weight"),
        (hooked(linear(4, 4)), "m.q: has hooks"),
        (replaced(linear(4, 4)), "m.q: has hooks or a replaced forward"),
        (hooked(FORMS["pair"]()), "m.q: has hooks"),
        (hooked(FORMS["CoLA"]()), "m.q: has hooks"),
        (hooked(FORMS["bottleneck"]()), "m.q: has hooks"),
        (nn.Sequential(linear(4, 2)), r"a Sequential of \(Linear\), allowed are"),
        (nn.Sequential(linear(4, 2), nn.SiLU()), r"a Sequential of \(Linear, SiLU\)"),
        (nn.Sequential(linear(4, 2), nn.Dropout(), linear(2, 4)), "m.q.1: the activation is Drop"),
        (nn.Sequential(hooked(linear(4, 2)), linear(2, 4)), "m.q.0: has hooks"),
        (nn.Sequential(linear(4, 2), linear(3, 4)), r"down has shape \(2, 4\) and up \(4, 3\)"),
        (ColaLayer(9, 4, 7, nn.Softplus()), "m.q.lr_act: the activation is Softplus"),
        (extended(), "allowed in a CoLA layer are cola_a, cola_b and bias"),
    ],
)
def test_anything_else_is_refused_by_name(module: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        factors_of(module, "m.q")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("relu", "relu"),
        ("tanh", "tanh"),
        ("linear", None),
    ],
)
def test_activations_of_transformers_are_what_their_name_says(
    name: str, expected: str | None
) -> None:
    activations = pytest.importorskip("transformers.activations")
    module = activations.ACT2FN[name]
    assert activation_name(module, "act") == expected
    x = torch.linspace(-8, 8, 161, dtype=torch.float64)
    torch.testing.assert_close(activation_function(expected)(x), module(x), rtol=1e-12, atol=1e-12)


def test_every_other_activation_of_transformers_is_refused() -> None:
    activations = pytest.importorskip("transformers.activations")
    for name in ("gelu_10", "gelu_fast", "quick_gelu", "relu2", "relu6", "leaky_relu", "mish"):
        with pytest.raises(ModelError, match=r"mlp.act: the activation is .*allowed are those"):
            activation_name(activations.ACT2FN[name], "mlp.act")


class SiLU(nn.Module):
    """Somebody else's class with a known name."""


@pytest.mark.parametrize("activation", [SiLU(), torch.sigmoid, "silu", {}])
def test_look_alikes_are_refused(activation: Any) -> None:
    with pytest.raises(ModelError, match="act: the activation is"):
        activation_name(activation, "act")
