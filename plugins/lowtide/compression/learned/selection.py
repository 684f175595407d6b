"""How finely the latents of a chunk are quantized, and whether any of its blocks are learned.

Nothing here changes what a decoder does, and the same values always get the same choice.
"""

from __future__ import annotations

import numpy as np

from lowtide.compression.elements import Array
from lowtide.compression.learned.blocks import BlockGrid, takes
from lowtide.compression.learned.model import Model
from lowtide.compression.learned.predictor import LearnedBlocks, bits_of_mean, latent_bits
from lowtide.compression.predictors import Differences, Shape

# Of the bound relative to the range that the model was trained on, times the range of the prior:
# the paper's is 0.1.
_FRACTIONS = tuple(0.1 * 2.0**k for k in range(0, 9))
_SAMPLE_BLOCKS = 256
_PRIOR_RANGE = 2.0


def choose_learned(
    work: Array, shape: Shape, step: float, model: Model, orders: Shape
) -> LearnedBlocks | None:
    """Return the predictor for a chunk, or None if the model helps no block of a sample.

    Args:
        work: Working values, flat, float32 or float64.
        shape: Of the chunk.
        step: Of the quantizer.
        model: The autoencoder.
        orders: Of the differences for the other blocks.
    """
    if not takes(shape, model.architecture.block):
        return None
    grid = BlockGrid(shape, model.architecture.block)
    count = min(_SAMPLE_BLOCKS, grid.count)
    chosen = (np.arange(count) * grid.count) // count
    multiples, _ = Differences((0,) * len(shape)).encode(work, shape, step)
    codes, _ = Differences(orders).encode(work, shape, step)
    plain = _bits(grid.cut(codes)[chosen])
    wanted = grid.cut(multiples)[chosen]
    latents = model.latents(grid.cut(work)[chosen])
    best: tuple[float, LearnedBlocks] | None = None
    for fraction in _FRACTIONS:
        latent_step = fraction * _PRIOR_RANGE * step / (model.high - model.low)
        if not 0 < latent_step < np.inf:
            continue
        tried = LearnedBlocks(orders, latent_step, model)
        steps = tried.quantized(latents)
        predicted = model.multiples(tried.dequantized(steps), step)
        learned = _bits(wanted - predicted) + latent_bits(steps)
        total = float(np.minimum(plain, learned).sum())
        if total < plain.sum() and (best is None or total < best[0]):
            best = total, tried
    return None if best is None else best[1]


def _bits(blocks: Array) -> Array:
    sizes = np.abs(blocks.astype(np.int64)).mean(axis=1)
    return blocks.shape[1] * bits_of_mean(sizes)
