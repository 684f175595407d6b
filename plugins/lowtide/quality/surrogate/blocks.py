"""Blocks of an array: what is looked at, however large the array is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError

Singles = NDArray[np.float32]

MOST = 16
EDGES = {1: 4096, 2: 64, 3: 16}  # by rank: a block has at most 4096 elements
_SHORTEST = 8  # an axis that is shorter is merged with its neighbour


@dataclass(frozen=True)
class Blocks:
    """Blocks spread evenly over an array.

    Attributes:
        values: float32, shape (blocks, *block), 1 to 3 axes behind the first; in units of the
            array's range, from its least value on.
        low: Least value of the whole array.
        value_range: Greatest less least value of the whole array.
        elements: Of the whole array.
        item_bits: Of one element.
        shape: Of the whole array as it was cut, 1 to 3 axes.
    """

    values: Singles
    low: float
    value_range: float
    elements: int
    item_bits: int
    shape: tuple[int, ...]


def sample(tensor: Any) -> Blocks:
    """Return at most `MOST` blocks of an array; the same for the same array.

    Reads all of the array once, for its range, and copies only blocks; from a device it copies
    those and two numbers.

    Args:
        tensor: Floating-point, not empty, of any layout; torch tensor or numpy array.

    Raises:
        DataError: it is not floating-point, empty, constant, or not finite.
    """
    given = tensor if isinstance(tensor, torch.Tensor) else _as_tensor(tensor)
    if not given.is_floating_point() or not given.numel():
        raise DataError(
            f"a {given.dtype} array of shape {tuple(given.shape)}: allowed are floating-point "
            "arrays with elements; measure this one"
        )
    given = given.detach()
    low, high = (float(each) for each in given.aminmax())
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(
            f"values from {low} to {high}: allowed are finite values that differ; measure this one"
        )
    shape = cut_shape(tuple(given.shape))
    view = given.reshape(shape)
    edges = [min(length, EDGES[len(shape)]) for length in shape]
    places = [
        tuple(slice(begin, begin + edge) for begin, edge in zip(corner, edges, strict=True))
        for corner in _corners(shape, edges)
    ]
    cuts = torch.stack([view[place] for place in places]).to("cpu", torch.float64)
    # Halves first: the range of float64 values may not be one.
    scaled = (cuts / 2 - low / 2) / (high / 2 - low / 2)
    return Blocks(
        values=scaled.to(torch.float32).numpy(),
        low=low,
        value_range=high - low,
        elements=given.numel(),
        item_bits=8 * given.element_size(),
        shape=shape,
    )


def cut_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape of 1 to 3 axes, none of several short, with as many elements in the order."""
    lengths = [length for length in shape if length > 1] or [1]
    while len(lengths) > 3:
        lengths[:2] = [lengths[0] * lengths[1]]
    while len(lengths) > 1 and min(lengths) < _SHORTEST:
        at = max(0, lengths.index(min(lengths)) - 1)
        lengths[at : at + 2] = [lengths[at] * lengths[at + 1]]
    return tuple(lengths)


def _corners(shape: tuple[int, ...], edges: list[int]) -> list[tuple[int, ...]]:
    """Return first elements of blocks: all that cover the array, or `MOST` spread over them."""
    starts = [
        np.linspace(0, length - edge, math.ceil(length / edge)).round().astype(int)
        for length, edge in zip(shape, edges, strict=True)
    ]
    counts = [len(each) for each in starts]
    total = math.prod(counts)
    if total <= MOST:
        numbers = np.arange(total)
        return [
            tuple(int(s[i]) for s, i in zip(starts, np.unravel_index(n, counts), strict=True))
            for n in numbers
        ]
    # Evenly along the first axis, along the others in steps that never line up.
    shares = [((np.arange(MOST) + 0.5) / MOST + axis * 0.618 * np.arange(MOST)) % 1.0
              for axis in range(len(counts))]  # fmt: skip
    picked = [
        s[np.minimum((share * len(s)).astype(int), len(s) - 1)]
        for s, share in zip(starts, shares, strict=True)
    ]
    return [tuple(int(axis[n]) for axis in picked) for n in range(MOST)]


def _as_tensor(array: Any) -> torch.Tensor:
    from lowtide.quality.measurement import as_object, host_array

    found = as_object(host_array(array))
    return found if isinstance(found, torch.Tensor) else torch.from_numpy(found)
