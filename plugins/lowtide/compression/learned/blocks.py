"""How a chunk is cut into the blocks that an autoencoder takes (FORMAT section 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowtide.compression.elements import Array
from lowtide.compression.predictors import Shape

# Blocks that stick out of a chunk cost time and memory; a record of a few bytes could ask for much.
MOST_PADDING = 4


def takes(shape: Shape, block: Shape) -> bool:
    """Return whether chunks of `shape` can be cut into such blocks: else they are too narrow."""
    if len(shape) < len(block):
        return False
    return BlockGrid(shape, block).padded <= MOST_PADDING * math.prod(shape)


@dataclass(frozen=True)
class BlockGrid:
    """The blocks of a chunk, in C order, along its last axes; the last ones may stick out.

    Attributes:
        shape: Of the chunk, at least as many axes as a block.
        block: Of a block.
    """

    shape: Shape
    block: Shape

    @property
    def edges(self) -> Shape:
        """Extents of a block on each axis of the chunk."""
        return (1,) * (len(self.shape) - len(self.block)) + self.block

    @property
    def counts(self) -> Shape:
        """Blocks on each axis."""
        return tuple(-(-n // edge) for n, edge in zip(self.shape, self.edges, strict=True))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return math.prod(self.counts)

    @property
    def padded(self) -> int:
        """Elements of all blocks, with what sticks out."""
        return self.count * math.prod(self.block)

    def cut(self, values: Array) -> Array:
        """Return flat values as blocks, (count, elements); what sticks out repeats the edge."""
        chunk = values.reshape(self.shape)
        ends = zip(self.counts, self.edges, self.shape, strict=True)
        chunk = np.pad(chunk, [(0, n * edge - length) for n, edge, length in ends], mode="edge")
        pairs = [size for pair in zip(self.counts, self.edges, strict=True) for size in pair]
        order = (*range(0, len(pairs), 2), *range(1, len(pairs), 2))
        return chunk.reshape(pairs).transpose(order).reshape(self.count, -1)

    def join(self, blocks: Array) -> Array:
        """Undo `cut`: flat values."""
        ndim = len(self.shape)
        order = [
            axis for pair in zip(range(ndim), range(ndim, 2 * ndim), strict=True) for axis in pair
        ]
        chunk = blocks.reshape(*self.counts, *self.edges).transpose(order)
        chunk = chunk.reshape([n * edge for n, edge in zip(self.counts, self.edges, strict=True)])
        return np.ascontiguousarray(chunk[tuple(map(slice, self.shape))]).reshape(-1)

    def spread(self, flags: Array) -> Array:
        """Return each block's flag for each of its elements, flat uint8."""
        grid = flags.astype(np.uint8).reshape(self.counts)
        for axis, (edge, length) in enumerate(zip(self.edges, self.shape, strict=True)):
            if edge > 1:
                grid = np.repeat(grid, edge, axis=axis)
            grid = grid[(slice(None),) * axis + (slice(length),)]
        return np.ascontiguousarray(grid).reshape(-1)

    def sums(self, values: Array) -> Array:
        """Return the sum of each block's flat values, float64; nothing sticks out."""
        grid: Array = values.reshape(self.shape).astype(np.float64)
        for axis, (n, edge) in enumerate(zip(self.counts, self.edges, strict=True)):
            if edge > 1:
                grid = np.add.reduceat(grid, np.arange(n) * edge, axis=axis)
        return grid.reshape(-1)
