"""How finely the latents of a chunk are quantized, and whether any of its blocks are learned.

Nothing here changes what a decoder does, and the same values always get the same choice.
"""

from __future__ import annotations

import math

import numpy as np

from lowtide.compression.elements import Array
from lowtide.compression.learned.blocks import BlockGrid, takes
from lowtide.compression.learned.model import Model
from lowtide.compression.learned.predictor import (
    LearnedBlocks,
    Predicted,
    bits_of_mean,
    latent_bits,
)
from lowtide.compression.predictors import Differences, Shape

# Latent steps as parts of the bound, relative to the model's range, times the range of the prior;
# the paper's is 0.1. The search begins at one in the middle and goes where it gets better.
_FRACTIONS = tuple(0.1 * 2.0**k for k in range(-5, 6))
_START = 4
_SAMPLE_BLOCKS = 256
_PRIOR_RANGE = 2.0


def choose_learned(
    work: Array, shape: Shape, step: float, model: Model, orders: Shape, *, insists: bool = False
) -> LearnedBlocks | None:
    """Return the predictor for a chunk, or None if the model helps no block of a sample.

    Args:
        work: Working values, flat, float32 or float64.
        shape: Of the chunk.
        step: Of the quantizer.
        model: The autoencoder.
        orders: Of the differences for the other blocks.
        insists: Return it also where it does not help, as long as the chunk can be cut into blocks.
    """
    if not takes(shape, model.architecture.block):
        return None
    sample = _Sample(work, shape, step, model, orders)
    costs: dict[int, float] = {}

    def cost(number: int) -> float:
        if number not in costs:
            costs[number] = sample.cost(sample.predictor(_FRACTIONS[number]))
        return costs[number]

    best, last = _START, -1
    while best != last:
        last = best
        around = (last - 1, last + 1)
        best = min((last, *(n for n in around if 0 <= n < len(_FRACTIONS))), key=cost)
    pays = insists or cost(best) < sample.plain_cost
    return sample.predictor(_FRACTIONS[best]) if pays else None


class _Sample:
    """Some blocks of a chunk, evenly spread."""

    def __init__(self, work: Array, shape: Shape, step: float, model: Model, orders: Shape) -> None:
        grid = BlockGrid(shape, model.architecture.block)
        count = min(_SAMPLE_BLOCKS, grid.count)
        chosen = (np.arange(count) * grid.count) // count
        codes, _ = Differences(orders).encode(work, shape, step)
        self._plain = _bits(grid.cut(codes)[chosen])
        self._wanted = grid.cut(work)[chosen]
        self._latents = model.latents(self._wanted)
        self._model, self._orders, self._step = model, orders, step
        self.plain_cost = float(self._plain.sum())

    def predictor(self, fraction: float) -> LearnedBlocks:
        """Return the predictor with a latent step of such a part of the bound."""
        relative = self._step / (self._model.high - self._model.low)
        return LearnedBlocks(self._orders, fraction * _PRIOR_RANGE * relative, self._model)

    def cost(self, tried: LearnedBlocks) -> float:
        """Return about how many bits the blocks take, each predicted in the better way."""
        if not 0 < tried.latent_step < math.inf or math.isinf(1 / tried.latent_step):
            return math.inf
        steps = tried.quantized(self._latents)
        outputs = self._model.outputs(tried.dequantized(steps))
        predicted = Predicted(self._model.values(outputs), self._step)
        learned = _bits(predicted.errors(self._wanted)) + latent_bits(steps)
        return float(np.minimum(self._plain, learned).sum())


def _bits(blocks: Array) -> Array:
    sizes = np.abs(blocks.astype(np.int64)).mean(axis=1)
    return blocks.shape[1] * bits_of_mean(sizes)
