"""The two lanes of a pass, which are coded by turns: FORMAT.md, section 5."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

CodingOrder: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


def lanes_of(points: NDArray[Any]) -> list[NDArray[Any]]:
    """Return views of a pass's lanes: halves along the first axis that has more than one point.

    Args:
        points: Something for each point of the pass, in the pass's shape.

    Returns:
        Lane 0, and lane 1 unless there is one point only. In C order all of lane 0 comes first.
    """
    if points.size == 1:
        return [points]
    axis = next(axis for axis, extent in enumerate(points.shape) if extent > 1)
    return np.split(points, [(points.shape[axis] + 1) // 2], axis=axis)


def coding_order(shape: tuple[int, ...]) -> CodingOrder:
    """Return in which order the points of a pass of `shape` are coded.

    Returns:
        int64, shape (n,), twice: each point's number in C order, and its lane, 0 or 1.
    """
    n = int(np.prod(shape))
    rows, *others = (lane.reshape(-1, lane.shape[-1]) for lane in lanes_of(_numbers(shape)))
    if not others:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    (partners,) = others
    n_pairs, n_shared = partners.shape
    turns = np.stack((rows[:n_pairs, :n_shared], partners), axis=-1).reshape(n_pairs, -1)
    with_rest = np.concatenate((turns, rows[:n_pairs, n_shared:]), axis=1)
    order = np.concatenate((with_rest.ravel(), rows[n_pairs:].ravel()))
    return order, (order >= n - partners.size).astype(np.int64)


def _numbers(shape: tuple[int, ...]) -> NDArray[np.int64]:
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


def padded_places(shape: tuple[int, ...]) -> tuple[NDArray[np.int64], int, int, int]:
    """Lay the lanes of a pass into flat memory with zeros before each row, plane and block.

    So the point before on an axis, where there is none, is a place that stays 0.

    Args:
        shape: Extents of the pass, 1 to 4.

    Returns:
        Each point's place, in C order; how many places there are; how far back the previous points
        on the last axis but one and on the one before lie (on the last axis: 1).
    """
    lanes = lanes_of(np.empty((1,) * (4 - len(shape)) + shape, np.bool_))
    padded = tuple(extent + 1 for extent in lanes[0].shape)  # lane 1 is no larger
    places = np.arange(len(lanes) * np.prod(padded), dtype=np.int64).reshape(-1, *padded)
    used = [
        block[tuple(slice(1, 1 + extent) for extent in lane.shape)].ravel()
        for block, lane in zip(places, lanes, strict=True)
    ]
    return np.concatenate(used), places.size, padded[3], padded[2] * padded[3]
