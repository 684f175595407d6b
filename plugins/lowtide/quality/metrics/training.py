"""What a training run notices of lossy values: its gradients, its loss, its score.

A PSNR stands in for these; where they can be measured, they decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowtide.core.codec import Codec, decode_tensor
from lowtide.core.errors import DataError

# Scores this close to 0 have no relative loss.
NEAR_ZERO = 0.05


@dataclass(frozen=True)
class GradientAgreement:
    """How far gradients are from their reference, all tensors as one vector.

    Attributes:
        relative_error: Norm of the difference over the norm of the reference; None if that is 0.
        cosine: Of the angle between both; None if one of them is 0.
    """

    relative_error: float | None
    cosine: float | None


def gradient_agreement(reference: Iterable[Any], found: Iterable[Any]) -> GradientAgreement:
    """Compare gradients, tensor by tensor in the same order; None entries count as zeros.

    Raises:
        DataError: the numbers of tensors, or two shapes, differ.
    """
    before, after = list(reference), list(found)
    if len(before) != len(after):
        raise DataError(f"{len(before)} gradients cannot be compared with {len(after)}")
    dots = [0.0, 0.0, 0.0, 0.0]  # x.x, y.y, x.y, e.e
    for x, y in zip(before, after, strict=True):
        if x is None and y is None:
            continue
        x, y = (each if each is not None else torch.zeros_like(other) for each, other in
                ((x, y), (y, x)))  # fmt: skip
        for place, value in enumerate(_dots(torch.as_tensor(x), torch.as_tensor(y))):
            dots[place] += value
    xx, yy, xy, ee = dots
    return GradientAgreement(
        relative_error=math.sqrt(ee / xx) if xx else None,
        cosine=xy / math.sqrt(xx * yy) if xx and yy else None,
    )


def _dots(x: torch.Tensor, y: torch.Tensor) -> Sequence[float]:
    if x.shape != y.shape:
        raise DataError(f"gradients of shapes {tuple(x.shape)} and {tuple(y.shape)} do not fit")
    x, y = x.detach().double().flatten(), y.detach().double().flatten()
    e = y - x
    return [float(a @ b) for a, b in ((x, x), (y, y), (x, y), (e, e))]


def loss_change(loss: Callable[[], float], tensors: Sequence[torch.Tensor], codec: Codec) -> float:
    """Return by how much the loss grows when tensors are what `codec` gives back.

    The tensors (parameters, moments) are changed in place for one call and are bit for bit what
    they were afterwards, also when `loss` raises.

    Args:
        loss: Computes the loss from the tensors as they are; must draw no random numbers.
        tensors: In host memory.
        codec: Applied to each of them by itself.
    """
    before = float(loss())
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(decode_tensor(codec.encode(tensor)))
        return float(loss()) - before
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def score_loss(reference: float, score: float, *, is_higher_better: bool = True) -> float:
    """Return how much worse `score` is, relative to abs(`reference`); negative if it is better.

    Absolute where the reference is within `NEAR_ZERO` of 0, such as an R^2 of nothing.
    """
    worse = reference - score if is_higher_better else score - reference
    return worse if abs(reference) < NEAR_ZERO else worse / abs(reference)
