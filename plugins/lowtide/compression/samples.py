"""Samples of a chunk, and what its elements will cost, judged by them.

The cost is the number of bits, or, where the error counts as well as the size, that plus the bits
that it would take to bring the error to a common size: at equal error, the lowest cost is the
smallest stream.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np

from lowtide.compression.elements import Array
from lowtide.compression.predictors import Differences, Interpolation, Predictor, Shape
from lowtide.compression.primitives import primitives

_WHOLE_ELEMENTS = 65_536  # chunks up to here are their own sample
# Elements in all blocks together: a 24th of the chunk, within limits.
_LEAST_ELEMENTS, _MOST_ELEMENTS, _SHARE = 24_000, 48_000, 24
_BLOCKS = 10
_PLACES, _STRIDES = 11, (3, 1, 4, 5)
# Points of coarse levels that are looked at all over the chunk: at most a 150th of it.
_COARSE_ELEMENTS, _COARSE_SHARE = 8_000, 150
_LEAST_ERROR = 2.0**-20  # steps; no error at all has no logarithm
_WEIGHT_POWER = 3  # of the inverse error; 2 to 4 differ by less than 1 %


class Samples:
    """Blocks of a chunk and a coarse grid over it, or all of it if it is small.

    Args:
        work: The chunk's working values, flat.
        shape: Its shape.
        step: Of the quantizer.
        counts_error: Whether the error is part of the cost.
    """

    def __init__(
        self, work: Array, shape: Shape, step: float, *, counts_error: bool = False
    ) -> None:
        self.ndim = len(shape)
        self._work = work
        self._counts_error = counts_error
        self._shape = shape
        self._count = math.prod(shape)
        self._step = step
        self._codes: dict[Predictor, Array] = {}
        self._bits: dict[Predictor, tuple[float, float]] = {}
        self._squares: dict[Predictor, float] = {}
        # The axis along which blocks are put together again. It is longer than a block.
        self._along = shape.index(max(shape))
        self._is_whole = self._count <= _WHOLE_ELEMENTS
        chunk = work.reshape(shape)
        if self._is_whole:
            self._blocks = [chunk]
            return
        self._levels = 1  # the finest ones, which blocks stand for; the grid has the others
        most = max(_COARSE_ELEMENTS, self._count // _COARSE_SHARE)
        while math.prod(_coarser(shape, self._levels)) > most:
            self._levels += 1
        every = slice(None, None, 1 << self._levels)
        self._grid = np.ascontiguousarray(chunk[(every,) * self.ndim])
        self._blocks = _blocks_of(chunk, self._along, unit=max(8, 1 << self._levels))

    @functools.cached_property
    def weights(self) -> Shape:
        """How much to trust each axis, 0 to 255: by the errors of cubic splines along it."""
        sums, counts = [0.0] * self.ndim, [0] * self.ndim
        for block in self._blocks:
            for axis in range(self.ndim):
                if block.shape[axis] > 6:
                    errors = _spline_errors(block, axis)
                    sums[axis] += float(np.abs(errors).sum(dtype=np.float64))
                    counts[axis] += errors.size
        noise = self._step / 4  # what quantizing the neighbours adds
        sizes = [
            math.hypot(total / count, noise) if count else math.inf
            for total, count in zip(sums, counts, strict=True)
        ]
        sizes = [size if math.isfinite(size) else math.inf for size in sizes]  # huge values
        least = min(sizes)
        if not 0 < least < math.inf:
            return (1,) * self.ndim
        found = tuple(round(255 * (least / size) ** _WEIGHT_POWER) for size in sizes)
        return found if min(found) < 255 else (1,) * self.ndim  # one way to say it

    def estimate(self, predictor: Predictor) -> float:
        """Return the cost of each element by the frequencies of tokens alone."""
        return self._entropy(predictor) + self._error_cost(predictor)

    def cost(self, predictor: Predictor) -> float:
        """Return the cost of each element by the entropy coder."""
        return self._size(predictor) + self._error_cost(predictor)

    def _error_cost(self, predictor: Predictor) -> float:
        return self._bits_per_octave * self._octaves(predictor) if self._counts_error else 0.0

    def _octaves(self, predictor: Predictor) -> float:
        """Return the base-2 logarithm of the error's root mean square, in steps."""
        self._codes_of(predictor)
        mean = self._squares[predictor] / sum(block.size for block in self._blocks)
        return math.log2(max(math.sqrt(mean), _LEAST_ERROR))

    @functools.cached_property
    def _bits_per_octave(self) -> float:
        """What it costs here to halve the error by a smaller step."""
        base = Interpolation((1,) * self.ndim, True, 0, 0)
        finer = Samples(self._work, self._shape, self._step / 2, counts_error=True)
        octaves = 1.0 + self._octaves(base) - finer._octaves(base)
        return max(0.0, finer._entropy(base) - self._entropy(base)) / max(octaves, 0.25)

    def _entropy(self, predictor: Predictor) -> float:
        if isinstance(predictor, Interpolation) and not self._is_whole:
            return self._by_level(predictor)[1]
        codes = self._codes_of(predictor)
        return _entropy(codes) / max(1, codes.size)

    def _size(self, predictor: Predictor) -> float:
        """Return the bits of each element, tables shared by all the chunk."""
        codes = self._codes_of(predictor)
        section = primitives().entropy_encode(codes.reshape(-1), codes.shape, predictor.scan)
        tables = table_bytes(section)
        bits = 8 * (len(section) - tables) / codes.size
        if isinstance(predictor, Interpolation) and not self._is_whole:
            here, fair = self._by_level(predictor)
            bits *= fair / here if here else 1.0
        return bits + 8 * tables / self._count

    def _codes_of(self, predictor: Predictor) -> Array:
        """Return the codes of all blocks, put together along one axis."""
        if predictor not in self._codes:
            if isinstance(predictor, Differences):
                parts = self._differences(predictor)
            else:
                parts = self._interpolated(predictor)
            self._codes[predictor] = np.ascontiguousarray(np.concatenate(parts, axis=self._along))
        return self._codes[predictor]

    def _encoded(self, predictor: Predictor) -> list[Array]:
        """Return the codes of each block in its shape; remember the errors, in steps."""
        parts, squares = [], 0.0
        for block in self._blocks:
            codes, restored = predictor.encode(block.reshape(-1), block.shape, self._step)
            parts.append(codes.reshape(block.shape))
            if self._counts_error:
                with np.errstate(all="ignore"):  # in steps: neither too large nor too small
                    errors = (restored.astype(np.float64) - block.reshape(-1)) / self._step
                    squares += float(np.square(errors).sum())
        self._squares[predictor] = squares
        return parts

    @functools.cached_property
    def _quantized(self) -> list[Array]:
        return self._encoded(Differences((0,) * self.ndim))

    def _differences(self, predictor: Differences) -> list[Array]:
        parts = []
        for codes in self._quantized:
            for axis, order in enumerate(predictor.orders):
                for _ in range(order):
                    # The borders of blocks are no borders of the chunk.
                    before = {"prepend": np.int32(0)} if self._is_whole else {}
                    codes = np.diff(codes, axis=axis, **before)
            parts.append(codes)
        self._squares[predictor] = self._squares[Differences((0,) * self.ndim)]
        return parts

    def _interpolated(self, predictor: Interpolation) -> list[Array]:
        parts = self._encoded(predictor)
        if self._is_whole:
            return parts
        # Blocks end one point after a multiple of 2^levels: without that point, all points of these
        # levels stay what they are when blocks are put together.
        return [codes[(slice(None),) * self._along + (slice(-1),)] for codes in parts]

    def _by_level(self, predictor: Interpolation) -> tuple[float, float]:
        """Return the bits of each element: in the blocks, and as they will be in the chunk.

        Points of coarse levels cost more, are a larger part of a block than of the chunk, and say
        little in a few blocks.
        """
        if predictor in self._bits:
            return self._bits[predictor]
        codes = self._codes_of(predictor).reshape(-1)
        here = fair = 0.0
        for level, points in enumerate(self._points_by_level):
            bits = _entropy(codes[points])
            here += bits / codes.size
            count = math.prod(_coarser(self._shape, level))
            if level < self._levels:
                count -= math.prod(_coarser(self._shape, level + 1))
                fair += bits / max(1, len(points)) * count / self._count
        alpha, beta = 1 + predictor.alpha / 8, 1 + predictor.beta / 4
        step = self._step / min(alpha**self._levels, beta)
        even = replace(predictor, alpha=0, beta=0)  # nearly: beta is reached soon
        coarse = even.encode(self._grid.reshape(-1), self._grid.shape, step)[0]
        self._bits[predictor] = here, fair + _entropy(coarse) / self._count
        return self._bits[predictor]

    @functools.cached_property
    def _points_by_level(self) -> list[Array]:
        """Where the points of each of the finest levels are among the blocks, and the others."""
        shape: list[int] = list(self._blocks[0].shape)
        shape[self._along] = (shape[self._along] - 1) * len(self._blocks)
        grid = np.arange(math.prod(shape)).reshape(shape)
        found = []
        for _ in range(self._levels):
            evens = (slice(None, None, 2),) * self.ndim
            is_level = np.full(grid.shape, True)
            is_level[evens] = False
            found.append(grid[is_level])
            grid = grid[evens]
        return [*found, grid.reshape(-1)]


def table_bytes(section: bytes) -> int:
    """Return how many bytes of a section of codes come before what grows with the elements."""
    raw = np.frombuffer(section, np.uint8)
    groups, buckets = 6 if raw[0] & 8 else 1, (21 >> (raw[0] & 7)) + 1
    ends = np.flatnonzero(raw < 0x80)
    done = np.cumsum(raw < 0x80)  # numbers that end at each byte or before
    at = 1
    for _ in range(groups * int(buckets)):
        tokens = int(raw[at])
        at += 1
        if tokens:
            at = int(ends[done[at - 1] + tokens - 1]) + 1
    return at


def _coarser(shape: Shape, levels: int) -> Shape:
    """Return the shape of the grid without the finest levels."""
    return tuple(-(-length >> levels) for length in shape)


def _entropy(codes: Array) -> float:
    return float(primitives().cost_bits(codes.reshape(-1)))


def _blocks_of(chunk: Array, along: int, *, unit: int) -> list[Array]:
    """Return contiguous blocks spread over a chunk that is larger than all of them together."""
    elements = min(max(_LEAST_ELEMENTS, chunk.size // _SHARE), _MOST_ELEMENTS) / _BLOCKS
    edges = _edges(chunk.shape, elements, along, unit)
    blocks = []
    for number in range(_BLOCKS):
        cut = []
        for axis, (length, edge) in enumerate(zip(chunk.shape, edges, strict=True)):
            # Along each axis all blocks lie at other places, but not in the same order.
            place = (number * _STRIDES[axis] % _PLACES + 0.5) / _PLACES
            begin = int(place * (length - edge))
            cut.append(slice(begin, begin + edge))
        blocks.append(np.ascontiguousarray(chunk[tuple(cut)]))
    return blocks


def _edges(shape: Shape, elements: float, along: int, unit: int) -> Shape:
    """Return the shape of a block: near a cube; one more than a multiple of 4 where it is cut.

    So the last points of a block on the finest levels have neighbours on both sides. On the axis
    `along` it is one more than a multiple of `unit`.
    """
    edges = [1] * len(shape)
    by_length = sorted((axis for axis in range(len(shape)) if axis != along), key=shape.__getitem__)
    for done, axis in enumerate((*by_length, along)):
        edge = elements ** (1 / (len(shape) - done))
        multiple = unit if axis == along else 4
        edges[axis] = min(shape[axis], multiple * max(1, round((edge - 1) / multiple)) + 1)
        elements = max(1.0, elements / edges[axis])
    return tuple(edges)


def _spline_errors(values: Array, axis: int) -> Array:
    """Return the errors of predicting each point by its four neighbours along an axis."""

    def shifted(begin: int) -> Array:
        return values[(slice(None),) * axis + (slice(begin, values.shape[axis] - 6 + begin),)]

    with np.errstate(all="ignore"):
        middle = 9 * (shifted(2) + shifted(4)) - (shifted(0) + shifted(6))
        errors: Array = shifted(3) - middle * 0.0625
    return errors
