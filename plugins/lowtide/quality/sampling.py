"""Which tensors of a run are looked at: the same for the same seed and step, on every rank."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def chosen(
    named: Iterable[tuple[str, T]], count: int, *, seed: int, step: int, kind: str
) -> list[tuple[str, T]]:
    """Return `count` of some named things, all equally likely; no generator is drawn from."""

    def ticket(pair: tuple[str, T]) -> bytes:
        text = f"{seed} {step} {kind} {pair[0]}".encode()
        return hashlib.blake2b(text, digest_size=8).digest()

    return sorted(named, key=ticket)[:count]


def quotas(kinds: Sequence[str], count: int, turn: int) -> dict[str, int]:
    """Return how many of each kind are looked at; what does not divide evenly goes round."""
    shares = dict.fromkeys(kinds, count // len(kinds))
    for number in range(count % len(kinds)):
        shares[kinds[(turn + number) % len(kinds)]] += 1
    return shares


def role_of(name: str) -> str:
    """Return a name without the numbers that tell layers and groups apart."""
    return re.sub(r"\d+", "#", name)


def is_suitable(tensor: Any, min_bytes: int) -> bool:
    """Whether a tensor is a floating-point one of this size at least, with its values here."""
    return (
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel() * tensor.element_size() >= min_bytes
    )


def host_part(tensor: Tensor, max_bytes: int) -> Tensor:
    """Return a copy in host memory of a tensor, or of rows from its middle.

    Rows are along the first axis; of a single row that is too large, elements from its middle.
    """
    tensor = tensor.detach()
    while tensor.ndim > 1 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim > 1 and tensor[0].nbytes > max_bytes:
        return host_part(tensor[len(tensor) // 2], max_bytes)
    if tensor.nbytes > max_bytes:
        rows = max_bytes // (tensor.nbytes // len(tensor))
        begin = (len(tensor) - rows) // 2
        tensor = tensor[begin : begin + rows]
    return tensor.to("cpu", copy=True)


def parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters by name; where ZeRO 3 has divided them, they are empty."""
    yield from model.named_parameters()


def gradients(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients that lie at their parameters."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad


def moments(model: torch.nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the optimizer's state, named after their parameter where there is one.

    Hosts wrap torch's optimizer: under ZeRO its parameters are flat parts, which have no names.
    """
    for _ in range(4):
        if isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Not by param_groups: ZeRO 3 empties them between updates.
    for place, (parameter, entries) in enumerate(getattr(optimizer, "state", {}).items()):
        name = names.get(id(parameter), f"part{place}")
        for key, value in entries.items():
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value


def leaf_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules without modules inside that have parameters: layers and norms."""
    for name, module in model.named_modules():
        if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
            yield name, module


def first_tensor(output: Any) -> Any:
    """Return a module's output, or the first of several."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output
