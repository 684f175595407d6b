"""Pruning of single weights: which are kept, decided by a score per weight.

Masked weights stay in a dense matrix, so they save no byte and no time by themselves.

Letters: O outputs, I inputs.

Sources: Sun et al., Wanda (2306.11695), Eq. 1 and Sec. 3; Zhang et al., RIA (ICLR 2024,
"Plug-and-Play"), Eq. 3-4; Mishra et al., 2:4 sparsity (2104.08378).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.blocks import Place, blocks_of, linears_of
from lowtide.evaluation.optimizations.calibration import InputStatistics, input_statistics

_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True, kw_only=True)
class MaskPruning(Optimization):
    """Set weights of every linear layer of every block to zero.

    Blocks are taken in order, so a method that looks at activations sees what the blocks already
    pruned give.

    Attributes:
        amount: The part of each row that goes, as "0.5", or a pattern, as "2:4": of 4 consecutive
            inputs 2 are kept.
    """

    stage = "weights"
    positional = ("amount",)
    amount: str

    def __post_init__(self) -> None:
        pattern = self.pattern
        allowed = 'a part from 0 to below 1, as "0.5", or "N:M" with 0 < N < M, as "2:4"'
        if pattern is not None:
            self.check(pattern[0] < pattern[1], "amount", allowed)
        else:
            self.check(re.fullmatch(r"0?\.\d+|0", self.amount) is not None, "amount", allowed)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of an N:M pattern, or None."""
        match = _PATTERN.fullmatch(self.amount)
        return (int(match[1]), int(match[2])) if match else None

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        handle = Handle(self.spelled)
        tokens = context.calibration_for(self.spelled) if self.needs_calibration else None
        generator = torch.Generator().manual_seed(context.seed)
        zeros = weights = 0
        for block in blocks_of(model):
            places = linears_of(block)
            if tokens is None:
                statistics: list[InputStatistics | None] = [None] * len(places)
            else:
                statistics = list(input_statistics(model, [p.linear for p in places], tokens))
            for place, found in zip(places, statistics, strict=True):
                pruned = self.pruned(place, found, generator)
                handle.replace_weight(place.linear, pruned)
                context.masked.add(place.linear)
                zeros += int((pruned == 0).sum())
                weights += pruned.numel()
        handle.facts["sparsity"] = zeros / weights
        return handle

    @abstractmethod
    def pruned(
        self, place: Place, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        """Return the weight with zeros in it, (O, I)."""

    def kept(self, score: Tensor) -> Tensor:
        """Return which weights stay, (O, I) bool, chosen within each row or each M inputs."""
        if self.pattern is not None:
            return keep_n_of_m(score, *self.pattern)
        return drop_least(score, int(score.shape[1] * float(self.amount)))


@dataclass(frozen=True, kw_only=True)
class ScoredMask(MaskPruning):
    """Weights of least score go; the others stay as they are."""

    @override
    def pruned(
        self, place: Place, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        weight = place.linear.weight.detach()
        return weight * self.kept(self.score(weight.double(), statistics, generator))

    @abstractmethod
    def score(
        self, weight: Tensor, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        """Return how much each weight matters, (O, I); the least go."""


def drop_least(score: Tensor, count: int) -> Tensor:
    """Return a mask that is False for the `count` least of each row; of equals the first go."""
    order = torch.sort(score, dim=1, stable=True).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :count], False)


def keep_n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Return a mask that keeps the `n` largest of each `m` consecutive inputs.

    Inputs behind the last whole group stay.
    """
    outputs, inputs = score.shape
    whole = inputs // m * m
    keep = torch.ones_like(score, dtype=torch.bool)
    groups = score[:, :whole].reshape(-1, m)
    keep[:, :whole] = drop_least(groups, m - n).view(outputs, whole)
    return keep


@dataclass(frozen=True, kw_only=True)
class Magnitude(ScoredMask):
    """The smallest weights of each row go."""

    name: ClassVar[str] = "prune.magnitude"

    @override
    def score(
        self, weight: Tensor, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        return weight.abs()


@dataclass(frozen=True, kw_only=True)
class RandomMask(ScoredMask):
    """Weights go at random: the control that every method must beat."""

    name: ClassVar[str] = "prune.random"

    @override
    def score(
        self, weight: Tensor, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        return torch.rand(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)


@dataclass(frozen=True, kw_only=True)
class Wanda(ScoredMask):
    """Weight times the norm of its input (Wanda, Eq. 1), compared within each row."""

    name: ClassVar[str] = "prune.wanda"
    needs_calibration = True

    @override
    def score(
        self, weight: Tensor, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        return weight.abs() * measured(statistics).norms


@dataclass(frozen=True, kw_only=True)
class Ria(ScoredMask):
    """Weight relative to its row and its column, times a power of the input's norm (RIA, Eq. 4).

    Attributes:
        power: Of the norm.
    """

    name: ClassVar[str] = "prune.ria"
    needs_calibration = True
    power: float = 0.5

    @override
    def score(
        self, weight: Tensor, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny  # a row or column of zeros
        relative = size / size.sum(1, keepdim=True).clamp_min(tiny)
        relative = relative + size / size.sum(0, keepdim=True).clamp_min(tiny)
        return relative * measured(statistics).norms ** self.power


def measured(statistics: InputStatistics | None) -> InputStatistics:
    """Return `statistics`, which a method that needs calibration always has."""
    if statistics is None:
        raise TypeError("needs_calibration is False, so no statistics were measured")
    return statistics
