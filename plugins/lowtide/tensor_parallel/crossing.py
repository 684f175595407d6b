"""Latent crossing (LaX): a low-rank layer also reads the latent of the one before it.

``y_i = B_i (h_i + gate_i(h_{i-1}))``, ``h_i = act(A_i x_i + a_i)``, where layer i - 1 is the same
projection of the decoder layer before. What crosses is h_{i-1} as it left its own A: it holds
nothing that crossed into it.

A model with crossings stays an ordinary model. For each call of it, a `Latents` travels to the
decoder layers as one more keyword argument. It belongs to that call alone, so calls may be nested,
repeated before their backward, or recomputed by activation checkpointing.

Shape letters: R rank, S rank of the layer before, G rank of a gate, C projections that share an
input.

Source: LaX (arXiv 2505.21732), inter-layer form. The paper's own starting values of gates are not
known to us; ours start at zero, so that a crossing changes nothing before the first step.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.gates import gate_shapes

ARGUMENT = "crossing_latents"

_in_use = threading.local()


@dataclass(frozen=True)
class Place:
    """Where a projection stands in its chain of crossings.

    Attributes:
        path: Of the projection, relative to its decoder layer; names the chain.
        layer: Index of the decoder layer.
        is_last: Whether nobody reads its latent.
    """

    path: str
    layer: int
    is_last: bool


def gated(kind: str, parameters: Mapping[str, Tensor], latent: Tensor, members: int = 1) -> Tensor:
    """Return the gates' outputs for the latents of C projections.

    Args:
        kind: One of `gates.GATES`.
        parameters: By the names of `gate_shapes`, those of the C gates joined along dimension 0.
        latent: ``[..., C S]``.
        members: C.

    Returns:
        ``[..., C R]``.
    """
    if kind == "identity":
        return latent
    split = latent.unflatten(-1, (members, -1))
    if kind == "scalar":
        return (split * parameters["weight"].unsqueeze(-1)).flatten(-2)
    for weight in parameters.values():  # one matrix, or down and then up
        split = torch.einsum("...cs,crs->...cr", split, weight.unflatten(0, (members, -1)))
    return split.flatten(-2)


class LatentGate(nn.Module):
    """What a latent passes on its way into the next layer's.

    Args:
        kind: One of `gates.GATES`.
        previous: S.
        rank: R.
        generator: Of a low-rank gate's first factor; None is torch's global one.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        weight: (1,) for "scalar", (R, S) for "linear".
        down: (G, S) for "low_rank".
        up: (R, G) for "low_rank".

    Raises:
        ConfigError: There is no such gate.
        ModelError: See `gate_shapes`.
    """

    def __init__(
        self,
        kind: str,
        previous: int,
        rank: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        for name, shape in gate_shapes(kind, previous, rank).items():
            values = torch.zeros(shape)
            if name == "down":  # with both factors at zero neither would ever move
                values.normal_(std=previous**-0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(values.to(device=device, dtype=dtype)))

    def forward(self, latent: Tensor) -> Tensor:
        """Return ``[..., R]`` from ``[..., S]``."""
        return gated(self.kind, dict(self.named_parameters(recurse=False)), latent)

    def extra_repr(self) -> str:
        """Return the kind for `repr`."""
        return self.kind


class Latents:
    """The latents of one call of a model, on their way to the next decoder layer."""

    def __init__(self) -> None:
        self._waiting: dict[Any, tuple[Tensor, ...]] = {}
        self._kept: dict[Any, tuple[Tensor, ...]] = {}

    def put(self, key: Any, latents: Sequence[Tensor], *, is_repeated: bool = True) -> None:
        """Leave latents for the layer after; ignored in a second run.

        Args:
            key: Where from.
            latents: ``[..., R]`` each.
            is_repeated: Whether the layer after may run twice.
        """
        if key in self._kept:
            return
        self._waiting[key] = tuple(latents)
        if is_repeated and torch.is_grad_enabled():
            # For a second run, which needs values alone. With their history they would hold the
            # graph that holds this object.
            self._kept[key] = tuple(
                each.detach().requires_grad_(each.requires_grad) for each in latents
            )

    def take(self, key: Any) -> tuple[Tensor, ...]:
        """Return what the layer before left.

        Raises:
            ModelError: It left nothing, or left it without gradients in the first run of a
                reentrant checkpoint, which would cut the gradient off.
        """
        found = self._waiting.pop(key, None) or self._kept.get(key)
        if found is None:
            raise ModelError(
                f"crossing: {key} has no latents in this call of the model. Either its decoder "
                f"layers were not called in their order, or they run under reentrant activation "
                f"checkpointing, which cuts the gradient of what crosses; use "
                f'gradient_checkpointing_kwargs={{"use_reentrant": False}}, or '
                f"lowtide.tensor_parallel.activation_checkpointing"
            )
        return found


def cross(place: Place, gate: LatentGate | None, latent: Tensor) -> Tensor:
    """Exchange latents in the running call of an unsharded model.

    Args:
        place: Of the projection.
        gate: Its gate; None in the first decoder layer.
        latent: ``[..., R]``, its own.

    Returns:
        ``[..., R]``, with what crossed into it.

    Raises:
        ModelError: The projection was called outside of its model.
    """
    reference = getattr(_in_use, "latents", None)
    latents: Latents | None = None if reference is None else reference()
    if latents is None:
        raise ModelError(
            f"{place.path} of decoder layer {place.layer}: reads the latent of the layer before, "
            f"and is called outside of its model; call the model"
        )
    own = latent
    if gate is not None:
        (previous,) = latents.take((place.path, place.layer - 1))
        latent = latent + gate(previous)
    if not place.is_last:
        latents.put((place.path, place.layer), (own,))
    return latent


def begin_call(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Start a call: forward pre-hook of the module that calls the decoder layers."""
    return args, {ARGUMENT: Latents(), **kwargs}


def enter_layer(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a call's latents the current ones: forward pre-hook inside each decoder layer.

    Inside, because a checkpointed layer runs again without its own hooks.
    """
    latents = kwargs.get(ARGUMENT)
    # Weak: after a second run nobody comes to reset it.
    _in_use.latents = None if latents is None else weakref.ref(latents)
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}


def hook_model(model: nn.Module, layers: str, entrance: str) -> None:
    """Make `model` hand a `Latents` to its decoder layers in each call.

    Args:
        model: Unsharded.
        layers: Path of the list of decoder layers.
        entrance: Path, relative to a layer, of the module in it that is called with the layer's
            keyword arguments and holds its first projections; "" is the layer.

    Raises:
        ModelError: The module that calls the layers takes no further keyword arguments.
    """
    parent = model.get_submodule(layers.rpartition(".")[0])
    kinds = {each.kind for each in inspect.signature(parent.forward).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ModelError(
            f"{type(parent).__name__}: its forward takes no **kwargs, with which latents could "
            f'reach its decoder layers; give it **kwargs for them, or leave "crossing" out'
        )
    parent.register_forward_pre_hook(begin_call, with_kwargs=True)
    for layer in model.get_submodule(layers).children():
        module = layer.get_submodule(entrance)
        module.register_forward_pre_hook(enter_layer, with_kwargs=True)
