"""Linear layers that hold codes instead of weights.

Letters: B rows of activations, O outputs, I inputs, K groups of inputs, G inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lowtide.evaluation.optimizations.quantization.grids import SCALE_DTYPE, Grid
from lowtide.evaluation.optimizations.quantization.packing import pack, unpack


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A quantised weight.

    Attributes:
        grid: What the codes stand for.
        codes: (O, K, G) uint8; the last group of a row is filled up.
        scale: (O, K, 1) float64, float32 numbers.
        zero: Zero points, (O, K, 1) uint8, or empty where the grid has none.
        input_scale: (I,) float64, what inputs are divided by first; None for 1.
        inputs: I.
    """

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor
    inputs: int
    input_scale: Tensor | None = None

    def values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the weight that the codes stand for, for unscaled inputs, (O, I)."""
        weight = self.grid.values(self.codes, self.scale, self.zero).flatten(1)[:, : self.inputs]
        return (weight if self.input_scale is None else weight / self.input_scale).to(dtype)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """Return `weight`, (O, I), in groups of inputs, (O, K, G), filled up with zeros.

    A `group_size` of 0 means one group for each output.
    """
    size = group_size or weight.shape[1]
    return F.pad(weight, (0, -weight.shape[1] % size)).unflatten(1, (-1, size))


def encode(weight: Tensor, grid: Grid, group_size: int, input_scale: Tensor | None = None) -> Codes:
    """Round `weight`, (O, I), to the nearest values of `grid`, fitted to each group."""
    scaled = weight.double() if input_scale is None else weight.double() * input_scale
    groups = grouped(scaled, group_size)
    flat = groups.flatten(0, 1)
    scale, zero = grid.fit(flat)
    return Codes(
        grid=grid,
        codes=grid.codes(flat, scale, zero).view_as(groups),
        scale=scale.unflatten(0, groups.shape[:2]),
        zero=zero.unflatten(0, groups.shape[:2]) if zero.numel() else zero,
        inputs=weight.shape[1],
        input_scale=input_scale,
    )


class PackedLinear(nn.Module):
    """A linear layer whose weight is held in 2, 4 or 8 bits and decoded whenever it is used.

    The decoded weight lives only during the layer's forward pass, which so needs more time than
    that of a dense layer. It cannot be trained.

    Attributes:
        packed: (O, bytes of a row) uint8.
        scale: (O, K) float32.
        zero: (O, K) uint8, or empty.
        input_scale: (I,) float32, or None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    input_scale: Tensor | None

    def __init__(self, codes: Codes, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.grid = codes.grid
        self.in_features, self.out_features = codes.inputs, codes.codes.shape[0]
        self.group_size = codes.codes.shape[2]
        self.bias = bias
        self.register_buffer("packed", pack(codes.codes.flatten(1), codes.grid.bits))
        self.register_buffer("scale", codes.scale.squeeze(-1).to(SCALE_DTYPE))
        self.register_buffer("zero", codes.zero.squeeze(-1) if codes.zero.numel() else codes.zero)
        scale = codes.input_scale
        self.register_buffer("input_scale", None if scale is None else scale.float())

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight for scaled inputs, (O, I)."""
        columns = self.scale.shape[1] * self.group_size
        codes = unpack(self.packed, self.grid.bits, columns).unflatten(1, (-1, self.group_size))
        zero = self.zero.unsqueeze(-1) if self.zero.numel() else self.zero
        values = self.grid.values(codes, self.scale.unsqueeze(-1).to(dtype), zero)
        return values.flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``, (..., O), for `x` of (..., I)."""
        if self.input_scale is not None:
            x = x / self.input_scale.to(x.dtype)
        return F.linear(x, self.decoded(x.dtype), self.bias)

    @override
    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.grid.bits}, group_size={self.group_size}"
        )


class Int8Linear(nn.Module):
    """Weights and activations in 8 bits, multiplied as integers.

    Weights have one symmetric scale for each output, activations one for each row, found when
    they arrive. Products of 8-bit integers are summed exactly (in float64), so this shows the
    error of the method; it is no fast kernel.

    Attributes:
        codes: (O, I) int8.
        scale: (O,) float32.
        input_scale: (I,) float32, or None.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, input_scale: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        weight = linear.weight.detach()
        if input_scale is not None:
            weight = weight * input_scale.to(weight.dtype)
        codes, scale = int8_rows(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.squeeze(-1))
        self.register_buffer("input_scale", None if input_scale is None else input_scale.float())

    def forward(self, x: Tensor) -> Tensor:
        """Return an approximation of ``x @ weight.T + bias``, (..., O), for `x` of (..., I)."""
        if self.input_scale is not None:
            x = x / self.input_scale.to(x.dtype)
        codes, scale = int8_rows(x)
        sums = codes.double() @ self.codes.double().T
        result = (sums * scale.double() * self.scale.double()).to(x.dtype)
        return result if self.bias is None else result + self.bias


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes -127 .. 127, (..., n) int8, and one scale a row, (..., 1) float32."""
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (x.float() / scale).round().clamp_(-127, 127).to(torch.int8), scale
