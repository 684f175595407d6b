"""The parts of a decoder-only transformer that optimizations change, found by their names.

Supported is the layout that Llama, Mistral and Qwen share in transformers: a list ``layers`` of
blocks with ``self_attn.{q,k,v,o}_proj`` and ``mlp.{gate,up,down}_proj``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lowtide.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer and where it hangs, so that it can be exchanged."""

    name: str
    parent: nn.Module
    attribute: str
    linear: nn.Linear


def decoder_of(model: nn.Module) -> Any:
    """Return the module of `model` that holds the list ``layers``.

    Raises:
        ModelError: There is none.
    """
    for module in model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    raise ModelError(
        f"{type(model).__name__} has no module list named 'layers'; the optimizations work on "
        f"decoder-only models laid out as transformers' Llama"
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks, in order."""
    return list(decoder_of(model).layers)


def linears_of(block: nn.Module) -> list[Place]:
    """Return the dense linear layers of a block, in the order they are defined."""
    found = []
    for name, parent in block.named_modules():
        for attribute, child in parent.named_children():
            if isinstance(child, nn.Linear):
                full = f"{name}.{attribute}" if name else attribute
                found.append(Place(full, parent, attribute, child))
    if not found:
        raise ModelError(
            f"{type(block).__name__} has no dense linear layer left; quantised weights can be "
            f"neither pruned nor quantised again"
        )
    return found


def part(block: nn.Module, group: str, names: tuple[str, ...]) -> tuple[Any, list[nn.Linear]]:
    """Return ``block.group`` and its linear layers `names`.

    Raises:
        ModelError: One of them is missing or is not a dense linear layer.
    """
    owner = getattr(block, group, None)
    linears = [getattr(owner, name, None) for name in names]
    for name, linear in zip(names, linears, strict=True):
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"{type(block).__name__}.{group}.{name}: found {type(linear).__name__}, needed is "
                f"torch.nn.Linear; structured pruning takes dense models laid out as Llama"
            )
    return owner, [linear for linear in linears if isinstance(linear, nn.Linear)]
