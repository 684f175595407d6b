"""How an array is cut into chunks (FORMAT section 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

MAX_AXES = 4
# A record of a few bytes may stand for a whole chunk of one value, so a reader has to limit what
# it allocates for one; 2^26 elements take up to 2.6 GiB while they are decoded, by each thread.
MAX_CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Chunk:
    """A contiguous range of the elements of an array in C order.

    Attributes:
        begin: Its first element.
        shape: 1 to 4 axes.
    """

    begin: int
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def elements(self) -> slice:
        """Where they are in the flat array."""
        return slice(self.begin, self.begin + self.count)


class Grid:
    """The chunks of an array.

    Args:
        shape: Of the array, any number of axes.
        chunk_elements: At most so many elements are in a chunk.
    """

    def __init__(self, shape: tuple[int, ...], chunk_elements: int) -> None:
        axes = collapsed(shape)
        at = next(a for a in range(len(axes)) if math.prod(axes[a + 1 :]) <= chunk_elements)
        self._inner = axes[at + 1 :]
        self._length = axes[at]
        rest = math.prod(self._inner)
        parts = -(-self._length // max(1, chunk_elements // max(1, rest)))
        self._rows = -(-self._length // max(1, parts))
        outer = math.prod(axes[:at])
        # Without the empty parts that rounding up the rows may leave at the end.
        self._parts = -(-self._length // self._rows) if self._rows else 0
        self._row_elements = rest
        self.count = outer * self._parts if rest else 0
        """Number of chunks."""

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks in C order."""
        for number in range(self.count):
            outer, part = divmod(number, self._parts)
            row = part * self._rows
            rows = min(self._rows, self._length - row)
            begin = (outer * self._length + row) * self._row_elements
            yield Chunk(begin, (rows, *self._inner))


def collapsed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return `shape` without axes of length 1, leading axes merged until 4 are left."""
    axes = tuple(length for length in shape if length != 1) or (1,)
    extra = max(0, len(axes) - MAX_AXES)
    return (math.prod(axes[: extra + 1]), *axes[extra + 1 :])
