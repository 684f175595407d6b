"""Norms over the model's width, and how a rank that has all of it computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class NormSetting:
    """A norm over a width that is spread over ranks.

    Attributes:
        width: The whole width, d.
        epsilon: Added to the mean square, or to the variance.
        kind: "rms" (RMSNorm) or "layer" (LayerNorm, which takes the mean away first).
    """

    width: int
    epsilon: float
    kind: NormKind = "rms"

    @property
    def is_centred(self) -> bool:
        """Whether the mean is taken away."""
        return self.kind == "layer"


def normalised(x: Tensor, gain: Tensor | None, bias: Tensor | None, norm: NormSetting) -> Tensor:
    """Normalise the last dimension, all of which is here.

    Gains and biases may be of a wider dtype than x; the result has that of x.

    Args:
        x: ``[..., d]``.
        gain: ``[d]``, or None: 1.
        bias: ``[d]`` of a LayerNorm, or None: 0.
        norm: Kind and epsilon.
    """
    if not norm.is_centred:
        return rms_norm(x, gain, norm.epsilon)
    wide = x.dtype if gain is None else torch.promote_types(x.dtype, gain.dtype)
    gain = None if gain is None else gain.to(wide)
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], gain, bias, norm.epsilon).to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor | None, epsilon: float) -> Tensor:
    """Normalise the last dimension, all of which is here; gains may be of a wider dtype than x."""
    if gain is None:
        return F.rms_norm(x, x.shape[-1:], None, epsilon)
    wide = torch.promote_types(x.dtype, gain.dtype)
    return F.rms_norm(x.to(wide), gain.shape, gain.to(wide), epsilon).to(x.dtype)
