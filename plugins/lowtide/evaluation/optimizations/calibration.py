"""Statistics of what linear layers are given, measured on calibration tokens.

Letters: N sequences, T tokens, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 8
"""Sequences per forward pass."""


class InputStatistics:
    """Sums over all tokens a linear layer has seen.

    Attributes:
        count: Tokens.
        gram: Sum of x x^T, (I, I) float64: half the Hessian of the layer's squared error.
        absolute: Sum of |x|, (I,) float64.
        largest: Largest |x|, (I,) float64.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.count = 0
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.largest = torch.zeros(inputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add activations, (..., I)."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        self.count += rows.shape[0]
        self.gram += rows.T @ rows
        self.absolute += rows.abs().sum(0)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each input over all tokens, (I,) float64."""
        return self.gram.diagonal().clamp_min(0).sqrt()

    def error(self, weight: Tensor, other: Tensor) -> float:
        """Return the mean squared difference of the outputs of two weights, (O, I) each."""
        change = (weight - other).double()
        return float(((change @ self.gram) * change).sum()) / max(1, self.count)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients, and put the modes of all modules back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


def forward_all(model: nn.Module, tokens_NT: Tensor) -> None:
    """Run `model` over calibration tokens for the sake of hooks."""
    with evaluation_mode(model):
        for part in tokens_NT.split(BATCH):
            model(input_ids=part, use_cache=False)


def input_statistics(
    model: nn.Module, linears: Sequence[nn.Module], tokens_NT: Tensor
) -> list[InputStatistics]:
    """Return what each of `linears` is given while `model`, as it is now, reads `tokens_NT`."""
    found = [InputStatistics(x.in_features, x.weight.device) for x in linears]  # type: ignore[arg-type]

    def listener(statistics: InputStatistics) -> Any:
        return lambda _, args: statistics.add(args[0])

    hooks = [
        linear.register_forward_pre_hook(listener(statistics))
        for linear, statistics in zip(linears, found, strict=True)
    ]
    try:
        forward_all(model, tokens_NT)
    finally:
        for hook in hooks:
            hook.remove()
    return found
