"""The passes of the interpolation and what both predictors share: FORMAT.md, sections 4 and 5.

On each level the points at even multiples of s are known, and there is a pass for each set S of
axes: its points stand at s, 3s, 5s, ... on the axes in S, so that on each of these axes they lie
halfway between points that earlier passes made known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODE_LIMIT = float(2**30)
"""Multipliers are below this in magnitude, so that sums of two fit int32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Points of one pass in a chunk.

    Attributes:
        points: Slices that select the points.
        shares: Axes that predict, rising, with what each adds to the prediction: above 0, with the
            sum 1 but for rounding. Empty for pass 0 and for the scan of differences.
        main: The axis of S whose neighbours decide the context; None where nothing predicts.
        level: The level, 1 the finest; decides the step.
        group: The group of contexts.
    """

    points: tuple[slice, ...]
    shares: tuple[tuple[int, float], ...] = ()
    main: int | None = None
    level: int = 1
    group: int = 0

    def lines(self, array: NDArray[Any], axis: int) -> NDArray[Any]:
        """Return a view of the points known on `axis`, an axis of S, with this axis first.

        Point i of the pass stands between entries i and i + 1; the latter may not be there.
        """
        known = list(self.points)
        known[axis] = slice(0, None, self.points[axis].step)
        return np.moveaxis(array[tuple(known)], axis, 0)


def scan(shape: tuple[int, ...], weights: Sequence[int] | None) -> list[Pass]:
    """Return the passes over a chunk of `shape` in their order.

    Args:
        shape: 1 to 4 extents.
        weights: The axes' weights in the interpolation, or None: one pass over all points.
    """
    if weights is None:
        return [Pass(points=tuple(slice(None) for _ in shape))]
    levels = (max(shape) - 1).bit_length()
    passes = [Pass(points=tuple(slice(0, 1) for _ in shape), level=max(levels, 1))]
    for level in range(levels, 0, -1):
        s = 2 ** (level - 1)
        for axes in _subsets(len(shape)):
            if min(shape[axis] for axis in axes) <= s:
                continue  # without points
            starts = [s if axis in axes else 0 for axis in range(len(shape))]
            passes.append(
                Pass(
                    points=tuple(slice(start, None, 2 * s) for start in starts),
                    shares=_shares(axes, weights),
                    main=max(axes, key=lambda axis: weights[axis]),  # the first of equals
                    level=level,
                    group={1: 1 + len(axes), 2: 1}.get(level, 0),
                )
            )
    return passes


def _subsets(n_axes: int) -> Iterator[tuple[int, ...]]:
    """Yield the sets of axes: by size, then by the number that has bit d set for axis d."""
    for size in range(1, n_axes + 1):
        sets = itertools.combinations(range(n_axes), size)
        yield from sorted(sets, key=lambda axes: sum(1 << axis for axis in axes))


def _shares(axes: tuple[int, ...], weights: Sequence[int]) -> tuple[tuple[int, float], ...]:
    total = sum(weights[axis] for axis in axes)
    if total == 0:
        return tuple((axis, 1 / len(axes)) for axis in axes)
    return tuple((axis, weights[axis] / total) for axis in axes if weights[axis])
