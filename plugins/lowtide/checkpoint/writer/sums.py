"""Checksums of a file whose chunks are captured in any order, for the writer in Python.

The CRC-32 of an entry is put together from its parts. A chunk may hold the place of a checksum (a
patch) whose entry is not complete yet: then its bytes are written without, and the patch late.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from lowtide.checkpoint.writer.plan_check import PATCH_BYTES
from lowtide.core.native import crc32_combine


@dataclass(frozen=True)
class Patch:
    """The part of a patch that lies in one chunk.

    Attributes:
        begin: Where it begins in the chunk.
        count: How many bytes it has.
        entry: Whose checksum goes there.
        skip: How many of the four bytes stand before it.
        wanted_bytes: Size of the entry.
    """

    begin: int
    count: int
    entry: int
    skip: int
    wanted_bytes: int


@dataclass(frozen=True)
class _Open:
    """A chunk with patches that are not known yet."""

    index: int
    begin: int  # in the file
    patches: list[Patch]
    between: list[tuple[int, int]]  # CRC and size of what stands before each patch, and behind all


class Sums:
    """What is known of a file's checksums. Used by one thread.

    Attributes:
        chunk_crcs: CRC-32 of chunks by number, as far as they are known.
        late: Offsets in the file and bytes of patches that were not written with their chunk.
    """

    def __init__(self) -> None:
        self.chunk_crcs: dict[int, int] = {}
        self.late: list[tuple[int, bytes]] = []
        self._known: dict[int, tuple[int, int]] = {}  # CRC and bytes, from an entry's beginning on
        self._behind: dict[tuple[int, int], tuple[int, int]] = {}  # by entry and place in it
        self._open: list[_Open] = []

    def add(self, entry: int, place: int, data: memoryview) -> None:
        """Take the bytes of an entry that begin at `place` in it."""
        crc, size = self._known.get(entry, (0, 0))
        if place != size:
            self._behind[entry, place] = (zlib.crc32(data), len(data))
            return
        crc, size = zlib.crc32(data, crc), size + len(data)
        while (found := self._behind.pop((entry, size), None)) is not None:
            crc, size = crc32_combine(crc, *found), size + found[1]
        self._known[entry] = (crc, size)

    def known(self, patch: Patch) -> bytes | None:
        """Return what belongs where `patch` is, or None."""
        crc, size = self._known.get(patch.entry, (0, 0))
        if size != patch.wanted_bytes:
            return None
        return crc.to_bytes(PATCH_BYTES, "little")[patch.skip : patch.skip + patch.count]

    def end_chunk(self, index: int, begin: int, data: memoryview, patches: list[Patch]) -> None:
        """Note the checksum of a chunk, of which `patches` were not known when it was captured."""
        if not patches:
            self.chunk_crcs[index] = zlib.crc32(data)
        else:
            between, end = [], 0
            for patch in patches:
                between.append((zlib.crc32(data[end : patch.begin]), patch.begin - end))
                end = patch.begin + patch.count
            between.append((zlib.crc32(data[end:]), len(data) - end))
            self._open.append(_Open(index, begin, patches, between))
        self._open = [each for each in self._open if not self._close(each)]

    def _close(self, chunk: _Open) -> bool:
        found = [self.known(patch) for patch in chunk.patches]
        if None in found:
            return False
        crc = 0
        for part, size in _alternating(chunk.between, [each or b"" for each in found]):
            crc = crc32_combine(crc, part, size)
        self.chunk_crcs[chunk.index] = crc
        for patch, data in zip(chunk.patches, found, strict=True):
            self.late.append((chunk.begin + patch.begin, data or b""))
        return True


def _alternating(between: list[tuple[int, int]], patches: list[bytes]) -> Iterator[tuple[int, int]]:
    for part, patch in zip(between, patches, strict=False):
        yield part
        yield zlib.crc32(patch), len(patch)
    yield between[-1]
