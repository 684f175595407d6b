"""How weights get their codes: nearest value, GPTQ, AWQ, NF4, and 8 bits with activations.

Letters: O outputs, I inputs.

Sources: Frantar et al., GPTQ (2210.17323), Algorithm 1; Lin et al., AWQ (2306.00978), Eq. 4-5;
Xiao et al., SmoothQuant (2211.10438), Eq. 3-4; Dettmers et al., QLoRA (2305.14314).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.blocks import blocks_of, linears_of
from lowtide.evaluation.optimizations.calibration import InputStatistics, input_statistics
from lowtide.evaluation.optimizations.hessian import DAMPING, inverse_factor, sweep
from lowtide.evaluation.optimizations.pruning.masks import measured
from lowtide.evaluation.optimizations.quantization.grids import Grid, IntegerGrid, NormalFloat
from lowtide.evaluation.optimizations.quantization.linear import (
    Codes,
    Int8Linear,
    PackedLinear,
    encode,
    grouped,
)
from lowtide.evaluation.optimizations.quantization.packing import PACKED_BITS

AWQ_STEPS = 20
"""Powers that are tried for the scales of AWQ, from 0 up to 1 (AWQ, Sec. 3.2)."""


@dataclass(frozen=True, kw_only=True)
class LinearExchange(Optimization):
    """Change every linear layer of every block, block by block."""

    stage = "weights"

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        handle = Handle(self.spelled)
        tokens = context.calibration_for(self.spelled) if self.needs_calibration else None
        for block in blocks_of(model):
            places = linears_of(block)
            found: list[InputStatistics | None] = [None] * len(places)
            if tokens is not None:
                found = list(input_statistics(model, [p.linear for p in places], tokens))
            for place, statistics in zip(places, found, strict=True):
                is_masked = place.linear in context.masked
                mask = place.linear.weight.detach() != 0 if is_masked else None
                self.exchange(handle, place.parent, place.attribute, statistics, mask)
        return handle

    @abstractmethod
    def exchange(
        self,
        handle: Handle,
        parent: nn.Module,
        attribute: str,
        statistics: InputStatistics | None,
        mask: Tensor | None,
    ) -> None:
        """Exchange the layer ``parent.attribute``, or its weight, through `handle`."""


@dataclass(frozen=True, kw_only=True)
class WeightQuantization(LinearExchange):
    """Weights on a grid, held packed unless `simulated`.

    Attributes:
        group_size: Consecutive inputs that share a scale; 0 for all of an output.
        simulated: Leave the rounded weights in a dense matrix. It saves no byte, and it is the
            only way for bits that have no packed form.
    """

    letters = {"g": "group_size"}  # noqa: RUF012 - a ClassVar of the base class
    group_size: int = 128
    simulated: bool = False

    def __post_init__(self) -> None:
        self.check(self.group_size >= 0, "group_size", "0 or more")
        has_form = self.grid.bits in PACKED_BITS
        self.check(self.simulated or has_form, "simulated", f"true with bits beside {PACKED_BITS}")

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The grid that weights are put on."""

    @override
    def exchange(
        self,
        handle: Handle,
        parent: nn.Module,
        attribute: str,
        statistics: InputStatistics | None,
        mask: Tensor | None,
    ) -> None:
        linear: nn.Linear = getattr(parent, attribute)
        codes = self.encoded(linear.weight.detach(), statistics, mask)
        if self.simulated:
            handle.replace_weight(linear, codes.values(linear.weight.dtype))
        else:
            handle.replace(parent, attribute, PackedLinear(codes, linear.bias))

    def encoded(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,  # noqa: ARG002 - what a subclass needs
        mask: Tensor | None,  # noqa: ARG002
    ) -> Codes:
        """Return the codes of `weight`, (O, I); weights where `mask` is False stay 0."""
        return encode(weight, self.grid, self.group_size)


@dataclass(frozen=True, kw_only=True)
class IntegerQuantization(WeightQuantization):
    """Weights on an integer grid.

    Attributes:
        bits: Of each weight, 2 to 8.
    """

    positional = ("bits",)
    bits: int

    def __post_init__(self) -> None:
        self.check(2 <= self.bits <= 8, "bits", "2 to 8")
        super().__post_init__()

    @property
    @override
    def grid(self) -> Grid:
        return IntegerGrid(self.bits)


@dataclass(frozen=True, kw_only=True)
class Rtn(IntegerQuantization):
    """Round to nearest."""

    name: ClassVar[str] = "quant.rtn"


@dataclass(frozen=True, kw_only=True)
class Nf4(WeightQuantization):
    """Round to the nearest of 16 quantiles of the normal distribution."""

    name: ClassVar[str] = "quant.nf4"
    group_size: int = 64

    @property
    @override
    def grid(self) -> Grid:
        return NormalFloat()


@dataclass(frozen=True, kw_only=True)
class Gptq(IntegerQuantization):
    """Round column by column and let later columns make up for the error.

    Columns are taken in their order, and a group's scale is found when its first column is
    reached. Blocks see what the blocks already quantised give.

    Attributes:
        damping: Part of the mean of the Hessian's diagonal that is added to it.
    """

    name: ClassVar[str] = "quant.gptq"
    needs_calibration = True
    damping: float = DAMPING

    @override
    def encoded(
        self, weight: Tensor, statistics: InputStatistics | None, mask: Tensor | None
    ) -> Codes:
        factor = inverse_factor(measured(statistics).gram, damping=self.damping)
        grid, size = self.grid, self.group_size or weight.shape[1]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales: list[Tensor] = []
        zeros: list[Tensor] = []

        def column_of(column: int, left: Tensor) -> Tensor:
            if column % size == 0:
                scale, zero = grid.fit(left[:, column : column + size])
                scales.append(scale)
                zeros.append(zero)
            chosen = grid.codes(left[:, column : column + 1], scales[-1], zeros[-1])
            codes[:, column] = chosen[:, 0]
            return grid.values(chosen, scales[-1], zeros[-1])[:, 0]

        sweep(weight.double(), factor, column_of, mask=mask)
        return Codes(
            grid=grid,
            codes=grouped(codes, size),
            scale=torch.stack(scales, 1),
            zero=torch.stack(zeros, 1),
            inputs=weight.shape[1],
        )


@dataclass(frozen=True, kw_only=True)
class Awq(IntegerQuantization):
    """Scale inputs that carry large activations up before rounding (AWQ).

    The scale of an input is a power of its mean size; the power that gives the least squared
    error of the layer's output is searched for. The inverse is applied to the activations when
    they arrive, which costs one multiplication for each.
    """

    name: ClassVar[str] = "quant.awq"
    needs_calibration = True

    @override
    def encoded(
        self, weight: Tensor, statistics: InputStatistics | None, mask: Tensor | None
    ) -> Codes:
        found = measured(statistics)
        size = found.absolute / found.count
        size = size.clamp_min(float(size.mean()) * 1e-4 + torch.finfo(size.dtype).tiny)
        best, least = None, float("inf")
        for step in range(AWQ_STEPS):
            scale = size ** (step / AWQ_STEPS)
            # As float32, because that is how it is kept.
            scale = (scale / (scale.max() * scale.min()).sqrt()).float().double()
            codes = encode(weight, self.grid, self.group_size, scale if step else None)
            error = found.error(codes.values(), weight.double())
            if error < least:
                best, least = codes, error
        if best is None:  # every error is NaN, so is the weight
            return super().encoded(weight, statistics, mask)
        return best


@dataclass(frozen=True, kw_only=True)
class W8A8(LinearExchange):
    """Weights and activations in 8 bits, activations scaled for each token as it comes."""

    name: ClassVar[str] = "quant.w8a8"

    @override
    def exchange(
        self,
        handle: Handle,
        parent: nn.Module,
        attribute: str,
        statistics: InputStatistics | None,
        mask: Tensor | None,
    ) -> None:
        linear: nn.Linear = getattr(parent, attribute)
        scale = self.input_scale(linear.weight.detach(), statistics)
        handle.replace(parent, attribute, Int8Linear(linear, scale))

    def input_scale(
        self,
        weight: Tensor,  # noqa: ARG002 - what a subclass needs
        statistics: InputStatistics | None,  # noqa: ARG002
    ) -> Tensor | None:
        """Return what activations are divided by, (I,), or None for 1."""
        return None


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(W8A8):
    """As `W8A8`, with part of the activations' range moved into the weights.

    Attributes:
        strength: Power of the activations' largest value; 1 - strength is that of the weights'.
    """

    name: ClassVar[str] = "quant.smoothquant"
    needs_calibration = True
    positional = ("strength",)
    strength: float = 0.5

    def __post_init__(self) -> None:
        self.check(0 <= self.strength <= 1, "strength", "from 0 to 1")

    @override
    def input_scale(self, weight: Tensor, statistics: InputStatistics | None) -> Tensor | None:
        least = 1e-5
        activations = measured(statistics).largest.clamp_min(least)
        weights = weight.double().abs().amax(0).clamp_min(least)
        return activations**self.strength / weights ** (1 - self.strength)
