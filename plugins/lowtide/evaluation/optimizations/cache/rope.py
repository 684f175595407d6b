"""Rotary position embedding, so that keys can be turned to other positions.

Letters: T positions, D size of a head.

Source: Su et al., RoFormer (2104.09864), Eq. 34, in the half-split layout of Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowtide.core.errors import ModelError

STATIC_TYPES = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose frequencies depend on neither length nor position."""


@dataclass(frozen=True)
class Rope:
    """A rotation for each position.

    Attributes:
        frequencies: Radians per position, (D / 2,).
    """

    frequencies: Tensor

    @classmethod
    def of(cls, model: nn.Module, *, asked_by: str) -> Rope:
        """Return the rotation that `model` uses.

        Raises:
            ModelError: It has none, or one that changes with the length of the text.
        """
        for module in model.modules():
            frequencies = getattr(module, "inv_freq", None)
            if isinstance(frequencies, Tensor):
                kind = getattr(module, "rope_type", "default")
                if kind in STATIC_TYPES and getattr(module, "attention_scaling", 1.0) == 1.0:
                    return cls(frequencies)
                raise ModelError(
                    f"{asked_by} turns keys, and this model's rotary embedding is of kind "
                    f"{kind!r}; allowed are {STATIC_TYPES} without scaling of attention"
                )
        raise ModelError(
            f"{asked_by} needs a rotary embedding with a buffer 'inv_freq'; "
            f"{type(model).__name__} has none"
        )

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, (..., T, D / 2) float32, for positions (..., T)."""
        angles = positions.unsqueeze(-1).float() * self.frequencies.float()
        return angles.cos(), angles.sin()

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn `x`, (..., T, D), by `positions`, (..., T); negative ones turn back."""
        cos, sin = self.angles(positions)
        first, second = x.float().chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned.to(x.dtype)
