"""The layers of an autoencoder as torch modules, for training only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.compression.elements import Array
from lowtide.compression.learned.layers import NORMS, WIDTH, Architecture, Layer

_LEAST_BIAS = 1e-4  # of a norm: nothing is divided by zero
_CONVOLUTIONS = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
_TRANSPOSED = (
    nn.functional.conv_transpose1d,
    nn.functional.conv_transpose2d,
    nn.functional.conv_transpose3d,
)


class _Trained(nn.Module):
    """One layer, with weights of the shape that they have in a model's file."""

    def __init__(self, layer: Layer, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        if layer.kind in NORMS:  # squared before use, so that they stay positive
            weight = torch.eye(layer.channels_in).mul(0.1).add(1e-3).sqrt().unsqueeze(0)
            bias = torch.ones(layer.channels_out)
        else:
            sums = layer.sums[0]
            fan_in = layer.channels_in * (int(sums[-1]) / (len(sums) - 1))
            weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(fan_in)
            bias = torch.zeros(layer.channels_out)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def effective(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias as the network uses them."""
        if self.layer.kind in NORMS:
            return self.weight.square(), self.bias.square() + _LEAST_BIAS
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """Run (n, channels in, *extents), or (n, channels in) for "spread"."""
        kind, rank = self.layer.kind, len(self.layer.extents)
        weight, bias = self.effective()
        n = len(x)
        if kind == "gather":
            return torch.einsum("ncp,pcl->nl", x.flatten(2), weight) + bias
        if kind == "spread":
            spread = torch.einsum("nl,plc->ncp", x, weight) + bias[:, None]
            return spread.reshape(n, -1, *self.layer.extents)
        if kind in NORMS:
            kernel = weight[0].T.reshape(*weight.shape[:0:-1], *(1,) * rank)
            root = _CONVOLUTIONS[rank - 1](x.square(), kernel, bias).sqrt()
            return x / root if kind == "divide" else x * root
        axes = (WIDTH,) * rank
        if kind == "up":
            kernel = weight.permute(1, 2, 0).reshape(*weight.shape[1:], *axes)
            return _TRANSPOSED[rank - 1](x, kernel, bias, stride=2, padding=1, output_padding=1)
        kernel = weight.permute(2, 1, 0).reshape(*weight.shape[:0:-1], *axes)
        stride = 2 if kind == "down" else 1
        return _CONVOLUTIONS[rank - 1](x, kernel, bias, stride=stride, padding=1)


class Autoencoder(nn.Module):
    """An autoencoder that can be trained.

    Args:
        architecture: Its shape.
        generator: Of the first weights.
    """

    def __init__(self, architecture: Architecture, generator: torch.Generator) -> None:
        super().__init__()
        self._layers = {
            part: [_Trained(layer, generator) for layer in layers]
            for part, layers in architecture.parts.items()
        }
        for part, layers in self._layers.items():
            self.add_module(part, nn.ModuleList(layers))
        for part in ("encoder", "decoder"):
            with torch.no_grad():  # at first the linear ways are all there is
                self._layers[part][-1].weight.zero_()
            # They stay as they are: Adam's steps have one size, and these weights another.
            self._layers[f"linear_{part}"][0].requires_grad_(False)

    def set_linear(self, basis: Tensor) -> None:
        """Let the linear ways be the projection on some directions, and back.

        Args:
            basis: (latent, elements), orthogonal, all rows of one length.
        """
        with torch.no_grad():
            self._layers["linear_decoder"][0].weight.copy_(basis.T[:, :, None])
            inverse = basis.T / basis[0].square().sum()
            self._layers["linear_encoder"][0].weight.copy_(inverse[:, None, :])

    def encode(self, blocks: Tensor) -> Tensor:
        """Return latents (n, latent) of blocks (n, 1, *block)."""
        return self._sum("encoder", blocks)

    def decode(self, latents: Tensor) -> Tensor:
        """Return blocks (n, 1, *block) of latents (n, latent)."""
        return self._sum("decoder", latents)

    def _sum(self, part: str, samples: Tensor) -> Tensor:
        deep = samples
        for layer in self._layers[part]:
            deep = layer(deep)
        linear: Tensor = self._layers[f"linear_{part}"][0](samples)
        return deep + linear

    def exported(self) -> dict[str, Array]:
        """Return a copy of all weights as a model's file holds them: float16 in float32."""
        found = {}
        for part, layers in self._layers.items():
            for number, layer in enumerate(layers):
                for which, tensor in zip(("weight", "bias"), layer.effective(), strict=True):
                    numbers = tensor.detach().numpy().astype(np.float16).astype(np.float32)
                    found[f"{part}.{number}.{which}"] = numbers
        return found
