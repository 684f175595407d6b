"""The bottleneck layer: a linear map of low rank, with an optional activation on its latent.

Shape letters, used as suffixes of tensor names: I input width, R rank, O output width.

Source: BOOST (arXiv 2512.12131), Sec. 2; CoLA (arXiv 2502.10940) for the activation on the latent
and for the initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lowtide.core.errors import ConfigError, ModelError, listed, near
from lowtide.tensor_parallel.crossing import LatentGate, Place, cross

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}
"""Elementwise functions that may stand between the two factors; None is the identity."""


def activation_function(name: str | None) -> Callable[[Tensor], Tensor]:
    """Return the elementwise function called `name`; None gives the identity.

    Raises:
        ConfigError: there is no such function.
    """
    if name is None:
        return _identity
    if name not in ACTIVATIONS:
        raise ConfigError(
            f'activation: got "{name}", allowed are {listed(ACTIVATIONS)} and null for none.'
            f"{near(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def initial_std(in_features: int, rank: int, out_features: int) -> float:
    """Return CoLA's standard deviation of both factors.

    The product of two such factors has entries of standard deviation
    ``(in_features + out_features) ** -0.5``. The widths are those of the whole layer, never of a
    shard of it.

    Source: CoLA (arXiv 2502.10940), its public code.
    """
    return float(rank**-0.25 * (in_features + out_features) ** -0.25)


class BottleneckLinear(nn.Module):
    """``y = B act(A x + a) + c`` in place of ``y = W x + c``.

    An ordinary module: nothing in it is sharded, and its state-dict names are those of its two
    linear children.

    Args:
        in_features: Input width I.
        rank: Width R of the latent, at most I. It may exceed the output width: keys and values
            of grouped-query attention share a rank with the wider queries.
        out_features: Output width O.
        activation: A name from `ACTIVATIONS`, applied to the latent, or None.
        bias: Whether there is a bias c, shape (O,).
        latent_bias: Whether there is a bias a, shape (R,).
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        down: A and a: ``down.weight`` (R, I), ``down.bias`` (R,).
        up: B and c: ``up.weight`` (O, R), ``up.bias`` (O,).
        crossing: Gate of the latent that comes from the decoder layer before, or None.
        place: In the chain of crossings, or None: its latent neither comes nor goes.

    Raises:
        ModelError: A width is below 1, or the rank exceeds the input width.
        ConfigError: There is no such activation.
    """

    def __init__(
        self,
        in_features: int,
        rank: int,
        out_features: int,
        activation: str | None = None,
        bias: bool = False,
        *,
        latent_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "rank": rank, "out_features": out_features}
        for name, size in sizes.items():
            if size < 1:
                raise ModelError(
                    f"BottleneckLinear: {name} is {size}, allowed is a whole number from 1"
                )
        if rank > in_features:
            raise ModelError(
                f"BottleneckLinear: rank {rank} exceeds the input width {in_features}, so a full "
                f"matrix would be smaller; choose a rank of at most {in_features}"
            )
        activation_function(activation)  # an unknown name fails here
        self.activation = activation
        self.crossing: LatentGate | None = None
        self.place: Place | None = None
        place = {"device": device or torch.get_default_device(), "dtype": dtype}
        # Without nn.Linear's own initialisation, which would draw from the global generator.
        self.down: nn.Linear = skip_init(nn.Linear, in_features, rank, bias=latent_bias, **place)
        self.up: nn.Linear = skip_init(nn.Linear, rank, out_features, bias=bias, **place)
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """Input width."""
        return self.down.in_features

    @property
    def rank(self) -> int:
        """Width of the latent."""
        return self.down.out_features

    @property
    def out_features(self) -> int:
        """Output width."""
        return self.up.out_features

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both factors from the normal distribution of `initial_std`; biases become 0.

        Args:
            generator: Source of the draws; None is torch's global one.
        """
        std = initial_std(self.in_features, self.rank, self.out_features)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=std, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer along the last dimension: (..., I) becomes (..., O)."""
        latent = activation_function(self.activation)(self.down(x))
        if self.place is not None:
            latent = cross(self.place, self.crossing, latent)
        return self.up(latent)

    def extra_repr(self) -> str:
        """Return sizes and activation for `repr`."""
        return (
            f"in_features={self.in_features}, rank={self.rank}, "
            f"out_features={self.out_features}, activation={self.activation}"
        )


def _identity(x: Tensor) -> Tensor:
    return x
