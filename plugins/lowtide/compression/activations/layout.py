"""Which memory a strided tensor reads: one description for a tensor and all that permute it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a storage in the order of its addresses; equal for equal elements.

    Attributes:
        offset: First element.
        sizes: Of each dimension, outermost first; neighbours that are one run are merged.
        strides: In elements, falling.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """How a tensor lies on the elements of its region, laid out without gaps.

    Attributes:
        shape: Of the tensor.
        strides: On the region's elements, in elements; dimensions keep their order in memory.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """Return the tensor over `flat`, the region's elements."""
        return flat.as_strided(self.shape, self.strides)


def describe(tensor: Tensor) -> tuple[Region, Form] | None:
    """Return where `tensor` (strided, not empty) lies; None if elements overlap in memory.

    Expanded dimensions (stride 0) count once. A tensor without gaps gets its own strides back.
    """
    shape, strides = tensor.shape, tensor.stride()
    real = [d for d in range(tensor.ndim) if shape[d] > 1 and strides[d] != 0]
    real.sort(key=lambda d: strides[d], reverse=True)
    sizes: list[int] = []
    steps: list[int] = []
    compact = [0 if shape[d] > 1 else strides[d] for d in range(tensor.ndim)]
    numel = 1
    for d in reversed(real):
        compact[d] = numel
        numel *= shape[d]
        if sizes and strides[d] < sizes[-1] * steps[-1]:
            return None
        if sizes and strides[d] == sizes[-1] * steps[-1]:
            sizes[-1] *= shape[d]
        else:
            sizes.append(shape[d])
            steps.append(strides[d])
    region = Region(int(tensor.storage_offset()), tuple(sizes[::-1]), tuple(steps[::-1]))
    return region, Form(tuple(shape), tuple(compact))


def elements(tensor: Tensor, region: Region) -> Tensor:
    """Return the region's elements as (N,), a view of `tensor`'s memory where there are no gaps."""
    return tensor.as_strided(region.sizes, region.strides, region.offset).reshape(-1)
