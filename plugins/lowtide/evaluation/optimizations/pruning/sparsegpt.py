"""SparseGPT: what remains of each row makes up for what goes.

Source: Frantar and Alistarh (2301.00774), Algorithm 1. The mask is chosen for `BLOCK` columns at
a time over all rows of the matrix, and for a pattern N:M at each M columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lowtide.evaluation.optimizations.blocks import Place
from lowtide.evaluation.optimizations.calibration import InputStatistics
from lowtide.evaluation.optimizations.hessian import inverse_factor, sweep
from lowtide.evaluation.optimizations.pruning.masks import (
    MaskPruning,
    drop_least,
    keep_n_of_m,
    measured,
)

BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class SparseGpt(MaskPruning):
    """Prune by the error a weight causes after compensation, and compensate."""

    name: ClassVar[str] = "prune.sparsegpt"
    needs_calibration = True

    @override
    def pruned(
        self, place: Place, statistics: InputStatistics | None, generator: torch.Generator
    ) -> Tensor:
        weight = place.linear.weight.detach()
        factor = inverse_factor(measured(statistics).gram)
        diagonal = factor.diagonal()
        step = self.pattern[1] if self.pattern is not None else BLOCK
        keep = torch.ones_like(weight, dtype=torch.bool)

        def column_of(column: int, left: Tensor) -> Tensor:
            if column % step == 0:
                span = slice(column, column + step)
                keep[:, span] = self.kept((left[:, span] / diagonal[span]).square())
            return left[:, column] * keep[:, column]

        return sweep(weight.double(), factor, column_of)

    @override
    def kept(self, score: Tensor) -> Tensor:
        if self.pattern is not None:
            return keep_n_of_m(score, *self.pattern)
        count = int(score.numel() * float(self.amount))
        return drop_least(score.reshape(1, -1), count).view_as(score)
