"""Which pieces stay in host memory, which go to which path, and in which order they are updated.

With N stored pieces and paths that take t_j seconds per byte there and back, path j gets
n_j = N (1 / t_j) / sum(1 / t), and neighbours in the order lie on different paths, so that all of
them work all the time.

Source: the proportional split and the alternating order are those of MLP-Offload (SC 2025, arXiv
2509.02480), as its abstract tells them; the apportionment is by largest remainder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.core.errors import ConfigError
from lowtide.offload.rates import STATE_BYTES, PathRates
from lowtide.offload.storage.mapping import PAGE_ELEMENTS


@dataclass(frozen=True)
class Extent:
    """A part of a master that is moved as a whole.

    Attributes:
        flat: Number of the master.
        begin: First element, a multiple of a page's.
        numel: Elements; a multiple of a page's where `is_stored`.
        is_stored: Whether it lives in a file.
    """

    flat: int
    begin: int
    numel: int
    is_stored: bool


@dataclass(frozen=True)
class Layout:
    """All extents of one rank.

    Attributes:
        extents: In order; those of a master together cover its whole vectors.
        buffers: Staging buffers.
        buffer_bytes: Size of each.
        kept_bytes: State that stays in memory.
    """

    extents: tuple[Extent, ...]
    buffers: int
    buffer_bytes: int
    kept_bytes: int

    @property
    def stored(self) -> tuple[Extent, ...]:
        """Extents that live in files."""
        return tuple(each for each in self.extents if each.is_stored)


def lay_out(
    numels: Sequence[int], *, memory_bytes: float, piece: int, buffers: int, vector: int
) -> Layout:
    """Divide masters into what stays in memory and what is stored.

    Whole masters stay as long as they fit, in order; one may be divided.

    Args:
        numels: Elements of each master.
        memory_bytes: Host memory for state and staging buffers together.
        piece: Extents have about this many elements at most.
        buffers: Staging buffers, should anything be stored.
        vector: Elements of a master behind the last multiple of this belong to no extent.

    Raises:
        ConfigError: the memory does not even hold the buffers.
    """
    whole = [numel // vector * vector for numel in numels]
    total = STATE_BYTES * sum(numels)
    if total <= memory_bytes:
        extents = [Extent(i, 0, numel, False) for i, numel in enumerate(whole)]
        return Layout(tuple(extents), 0, 0, total)
    cut = [_pages(numel, piece) for numel in whole]
    largest = max((count for pieces in cut for _, count in pieces), default=0)
    buffer_bytes = STATE_BYTES * largest
    # What fills no page stays, whatever the memory.
    rest = [STATE_BYTES * (n - sum(c for _, c in p)) for n, p in zip(numels, cut, strict=True)]
    needed = buffers * buffer_bytes + sum(rest)
    if needed > memory_bytes:
        raise ConfigError(
            f"lowtide.offload.storage.host_memory_bytes: got {memory_bytes:.0f}, and {buffers} "
            f"staging buffers of {buffer_bytes} bytes with what fills no page need {needed}; raise "
            f"it, or lower lowtide.offload.subgroup_params or lowtide.offload.storage.buffers"
        )
    left = memory_bytes - needed
    extents, kept = [], sum(rest)
    for flat, (numel, pieces) in enumerate(zip(whole, cut, strict=True)):
        for begin, count in pieces:
            is_stored = STATE_BYTES * count > left
            left = 0 if is_stored else left - STATE_BYTES * count  # first ones stay: no gaps
            kept += 0 if is_stored else STATE_BYTES * count
            extents.append(Extent(flat, begin, count, is_stored))
        end = sum(count for _, count in pieces)
        if end < numel:
            extents.append(Extent(flat, end, numel - end, False))
    return Layout(tuple(extents), buffers, buffer_bytes, kept)


def fewest_buffers(paths: int) -> int:
    """Return enough buffers for all lanes: one being read and one written per path, one updated."""
    return 2 * paths + 1


def _pages(numel: int, piece: int) -> list[tuple[int, int]]:
    """Return (begin, count) of nearly equal pieces of whole pages."""
    pages = numel // PAGE_ELEMENTS
    most = max(1, piece // PAGE_ELEMENTS)
    if not pages:
        return []
    size = -(-pages // -(-pages // most))
    return [
        (begin * PAGE_ELEMENTS, min(size, pages - begin) * PAGE_ELEMENTS)
        for begin in range(0, pages, size)
    ]


def shares(count: int, paths: Sequence[PathRates]) -> list[int]:
    """Return how many of `count` equal pieces each path gets, by largest remainder."""
    weights = [min(each.read_bytes_per_s, each.write_bytes_per_s) for each in paths]
    weights = [each / max(weights) for each in weights]  # no sum of them is infinite
    exact = [count * weight / sum(weights) for weight in weights]
    found = [int(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda j: (found[j] - exact[j], j))
    for j in by_rest[: count - sum(found)]:
        found[j] += 1
    return found


def assign(count: int, paths: Sequence[PathRates], *, first: int = 0) -> list[int]:
    """Return the path of each of `count` pieces in order, neighbours on different ones.

    Args:
        count: Pieces.
        paths: Their rates.
        first: Which path comes first among equals; ranks of one node begin with different ones.
    """
    wanted = shares(count, paths)
    found: list[int] = []
    given = [0] * len(wanted)
    for turn in range(1, count + 1):
        # The one that is furthest behind its share of the pieces so far.
        behind = [
            (wanted[j] * turn / count - given[j], -((j - first) % len(wanted)), j)
            for j in range(len(wanted))
            if given[j] < wanted[j]
        ]
        j = max(behind)[2]
        given[j] += 1
        found.append(j)
    return found
