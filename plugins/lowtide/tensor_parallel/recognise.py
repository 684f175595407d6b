"""What stands in the place of a linear map: a full matrix, or a low-rank pair in one of its forms.

Known low-rank forms: `BottleneckLinear`; ``nn.Sequential`` of two linear layers, with or without an
activation between them; CoLA's layer, by its parameters ``cola_a`` and ``cola_b``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.core.errors import ModelError, listed
from lowtide.tensor_parallel.bottleneck import ACTIVATIONS, BottleneckLinear
from lowtide.tensor_parallel.factors import Factors

_MODULES: Mapping[str, str | None] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "Tanh": "tanh",
    "Identity": None,
    "LinearActivation": None,
}
_FUNCTIONS = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", torch.relu: "relu"} | {
    torch.tanh: "tanh"
}
_OF_BOTTLENECK = ("down.weight", "down.bias", "up.weight", "up.bias")


def activation_name(activation: Any, where: str) -> str | None:
    """Return the name in `ACTIVATIONS` of an activation module or function; None: the identity.

    Args:
        activation: A module of torch or transformers, a function of torch, or None.
        where: Its path, for messages.

    Raises:
        ModelError: It is none of the known ones.
    """
    kind = type(activation)
    if activation is None:
        return None
    if isinstance(activation, nn.Module) and kind.__module__.startswith(
        ("torch.nn.", "transformers.")
    ):
        if isinstance(activation, nn.GELU):
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        if kind.__name__ in _MODULES:
            return _MODULES[kind.__name__]
    elif callable(activation) and activation.__hash__ is not None and activation in _FUNCTIONS:
        return _FUNCTIONS[activation]
    name = getattr(activation, "__name__", kind.__name__)
    raise ModelError(
        f"{where}: the activation is {name}, allowed are those of torch and transformers that "
        f"mean {listed(ACTIVATIONS)} or the identity"
    )


def factors_of(module: nn.Module, where: str = "") -> Factors | None:
    """Return the factors of a low-rank `module`, or None for a full-rank ``nn.Linear``.

    Args:
        module: What stands in the place of a linear map.
        where: Its path, for messages.

    Returns:
        Factors that share memory with the module's parameters, where their layout allows.

    Raises:
        ModelError: It is something else, or a linear layer whose weight or forward is not
            its own any more (quantised, wrapped, hooked).
    """
    place = where or type(module).__name__
    if isinstance(module, BottleneckLinear):
        check_own_forward(module, place)
        return _pair(module.down, module.up, module.activation)
    if isinstance(module, nn.Sequential):
        return _of_sequential(module, place)
    if _is_cola(module):
        return _of_cola(module, place)
    _check_linear(module, place)
    return None


def renaming(module: nn.Module) -> dict[str, str]:
    """Return the parameter names of a low-rank `module` and what `to_bottleneck` calls them."""
    if isinstance(module, nn.Sequential):
        first, last = "0", str(len(module) - 1)
        names = {
            f"{child}.{parameter}": f"{part}.{parameter}"
            for child, part in ((first, "down"), (last, "up"))
            for parameter in ("weight", "bias")
        }
    elif _is_cola(module):
        names = {"cola_a": "down.weight", "cola_b": "up.weight", "bias": "up.bias"}
    else:
        names = {name: name for name in _OF_BOTTLENECK}
    present = {name for name, _ in module.named_parameters()}
    return {old: new for old, new in names.items() if old in present}


def to_bottleneck(factors: Factors) -> BottleneckLinear:
    """Return a module that computes `factors`. Parameters in it are taken over, not copied."""
    module = BottleneckLinear(
        factors.in_features,
        factors.rank,
        factors.out_features,
        factors.activation,
        bias=factors.up_bias is not None,
        latent_bias=factors.down_bias is not None,
        device="meta",
    )
    for linear, weight, bias in (
        (module.down, factors.down, factors.down_bias),
        (module.up, factors.up, factors.up_bias),
    ):
        linear.weight = _parameter(weight)
        if bias is not None:
            linear.bias = _parameter(bias)
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and tensor.is_contiguous():
        return tensor
    is_trained = tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=is_trained)


def _pair(down: nn.Linear, up: nn.Linear, activation: str | None) -> Factors:
    return Factors(
        down=down.weight,
        up=up.weight,
        down_bias=down.bias,
        up_bias=up.bias,
        activation=activation,
    )


def _of_sequential(module: nn.Sequential, where: str) -> Factors:
    parts: list[Any] = list(module)
    is_pair = len(parts) in (2, 3) and all(isinstance(parts[i], nn.Linear) for i in (0, -1))
    if not is_pair:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ModelError(
            f"{where}: is a Sequential of ({kinds}), allowed are (Linear, Linear) and (Linear, "
            f"activation, Linear)"
        )
    check_own_forward(module, where)
    for index in (0, len(parts) - 1):
        _check_linear(parts[index], f"{where}.{index}")
    activation = activation_name(parts[1], f"{where}.1") if len(parts) == 3 else None
    return _pair(parts[0], parts[-1], activation)


def _is_cola(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, n, None), nn.Parameter) for n in ("cola_a", "cola_b"))


def _of_cola(module: Any, where: str) -> Factors:
    names = {name for name, _ in module.named_parameters()}
    if names - {"cola_a", "cola_b", "bias"}:
        raise ModelError(
            f"{where}: has parameters {sorted(names)}, allowed in a CoLA layer are cola_a, cola_b "
            f"and bias"
        )
    check_own_forward(module, where)

    def turned(parameter: nn.Parameter) -> nn.Parameter:  # CoLA keeps inputs first
        return nn.Parameter(parameter.detach().mT, requires_grad=parameter.requires_grad)

    return Factors(
        down=turned(module.cola_a),
        up=turned(module.cola_b),
        up_bias=getattr(module, "bias", None),
        activation=activation_name(getattr(module, "lr_act", None), f"{where}.lr_act"),
    )


def _check_linear(module: nn.Module, where: str) -> None:
    """Raise `ModelError` unless `module` is a linear layer and nothing but that."""
    kind = type(module)
    if not isinstance(module, nn.Linear):
        raise ModelError(
            f"{where}: is {kind.__module__}.{kind.__qualname__}, allowed are nn.Linear and the "
            f"known low-rank forms (BottleneckLinear, Sequential of two linear layers, CoLA's "
            f"layer); merge adapters and remove quantisation first"
        )
    if kind.forward is not nn.Linear.forward or hasattr(module, "parametrizations"):
        raise ModelError(
            f"{where}: {kind.__qualname__} computes its output or its weight in its own way, "
            f"allowed is a plain nn.Linear"
        )
    check_own_forward(module, where)
    sizes = (module.out_features, module.in_features)
    if tuple(module.weight.shape) != sizes:
        raise ModelError(
            f"{where}: its weight has shape {tuple(module.weight.shape)} but it says {sizes}; "
            f"packed and sharded weights cannot be converted"
        )


def check_own_forward(module: nn.Module, where: str) -> None:
    """Raise `ModelError` where a replacement of `module` would lose hooks."""
    hooks = [module._forward_hooks, module._forward_pre_hooks]
    hooks += [module._backward_hooks, module._backward_pre_hooks]
    if any(hooks) or "forward" in vars(module):
        raise ModelError(
            f"{where}: has hooks or a replaced forward, which a conversion would lose; convert "
            f"the model first and hook it afterwards"
        )
