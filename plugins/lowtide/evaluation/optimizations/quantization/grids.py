"""Grids of few values: from a group of weights to codes and back. All hold 0 exactly.

Because 0 is a value of every grid, a pruned weight stays 0.

Letters: R groups (rows), G weights of a group.

Sources: integer grid with an integer zero point, Jacob et al. (1712.05877), Eq. 1; NF4, Dettmers
et al., QLoRA (2305.14314), Sec. 3 and App. E.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from typing_extensions import override

SCALE_DTYPE = torch.float32


class Grid(ABC):
    """How codes of `bits` bits stand for weights."""

    bits: int

    @abstractmethod
    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale, (R, 1), a float32 number, and zero point, (R, 1) uint8 or (0,)."""

    @abstractmethod
    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the code of the nearest value for each weight, (R, G) uint8."""

    @abstractmethod
    def values(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return what codes stand for, (R, G), in the dtype of `scale`."""

    def nearest(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest value of the grid for each weight, (R, G)."""
        return self.values(self.codes(weight, scale, zero), scale, zero)


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """``scale * (code - zero)`` with codes 0 .. 2^bits - 1."""

    bits: int

    @override
    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        levels = 2**self.bits - 1
        low = weight.amin(1, keepdim=True).clamp_max(0)
        high = weight.amax(1, keepdim=True).clamp_min(0)
        scale = rounded_scale((high - low) / levels)
        return scale, (-low / scale).round().clamp(0, levels).to(torch.uint8)

    @override
    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        return ((weight / scale).round() + zero).clamp_(0, levels).to(torch.uint8)

    @override
    def values(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (codes.to(scale.dtype) - zero.to(scale.dtype)) * scale


@dataclass(frozen=True)
class NormalFloat(Grid):
    """Sixteen quantiles of the normal distribution, scaled to the largest weight (NF4)."""

    bits: int = 4

    @override
    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_scale(weight.abs().amax(1, keepdim=True)), torch.empty(0, dtype=torch.uint8)

    @override
    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        table = normal_quantiles().to(weight)
        between = (table[1:] + table[:-1]) / 2
        return torch.bucketize(weight / scale, between).to(torch.uint8)

    @override
    def values(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return normal_quantiles().to(scale)[codes.long()] * scale


@lru_cache(maxsize=1)
def normal_quantiles() -> Tensor:
    """Return the 16 values of NF4, ascending, from -1 to 1; (16,) float64, float32 numbers.

    8 values lie above 0 and 7 below, at equal distances in probability; the outermost probability
    is the mean of 1 - 1/32 and 1 - 1/30 (QLoRA, App. E).
    """
    outermost = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64), below])
    return (values / values.max()).sort().values.float().double()


def rounded_scale(scale: Tensor) -> Tensor:
    """Return `scale` as `SCALE_DTYPE` holds it, in its own dtype; 1 where it would be 0."""
    rounded = scale.to(SCALE_DTYPE).to(scale.dtype)
    return torch.where(rounded > 0, rounded, torch.ones_like(scale))
