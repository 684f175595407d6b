"""What a writer is told about one file: where each of its bytes comes from."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.device import Device

PAGE_BYTES = 4096  # alignment that direct I/O asks for
LITERAL = -1  # in `FilePlan.entries`: the piece is fixed text, not part of a checksummed entry


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes of an entry that are not in host memory: `memory` is uint8, on `device`."""

    device: Device
    memory: torch.Tensor


@dataclass(kw_only=True)
class FilePlan:
    """One file as a list of pieces of host memory, in file order, without gaps.

    Pieces are either literals (headers, padding, the pickle; they lie in `literals`) or parts of
    an entry (a tensor's bytes, live memory). The CRC-32 of an entry is known only when all of its
    bytes have been read; `patches` says where in `literals` it is then written, and such literals
    stand behind their entry in the file.

    Attributes:
        path: The file to write.
        size_bytes: Its size.
        offsets: uint64, shape (pieces,); where each piece begins in the file. Ascending.
        lengths: uint64, shape (pieces,); bytes of each piece, never 0.
        addresses: uint64, shape (pieces,); where each piece lies in memory.
        entries: int32, shape (pieces,); number of the entry, from 0, or `LITERAL`.
        literals: uint8; the memory of all literals.
        patches: uint64, shape (patches, 2); position in `literals` of four bytes that take the
            little-endian CRC-32 of an entry, and the number of that entry.
        expected_bytes: What the size may become, where this is the beginning of a file. A writer
            may reserve so much, and gives back in the end what was not needed.
        owners: What keeps the live memory alive; dropped once the file is captured.
        elsewhere: Entries that are not in host memory. Their addresses mean nothing, and no writer
            takes such a plan: it goes through `lowtide.checkpoint.staging`.
    """

    path: Path
    size_bytes: int
    offsets: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    addresses: NDArray[np.uint64]
    entries: NDArray[np.int32]
    literals: NDArray[np.uint8]
    patches: NDArray[np.uint64]
    expected_bytes: int = 0
    owners: list[Any] = field(default_factory=list, repr=False)
    elsewhere: dict[int, DeviceBytes] = field(default_factory=dict, repr=False)


class Source:
    """Where a file's bytes come from; a copy under way goes on with the one it began with."""

    def __init__(self, plan: FilePlan) -> None:
        self.plan = plan  # its literals and owners are the live memory
        self.patches = plan.patches[np.argsort(plan.patches[:, 0])]
        self.places: list[int] = []  # of each piece: where it begins in its entry
        self.entry_bytes: dict[int, int] = {}
        for entry, length in zip(plan.entries.tolist(), plan.lengths.tolist(), strict=True):
            self.places.append(self.entry_bytes.get(entry, 0))
            self.entry_bytes[entry] = self.places[-1] + length

    def piece_at(self, offset: int) -> int:
        """Return the number of the piece with this byte of the file."""
        return bisect.bisect_right(self.plan.offsets, offset) - 1

    def chunks_of(self, begin: int, end: int, chunk_bytes: int) -> list[int]:
        """Return which chunks hold bytes of entries that lie in this memory, ascending."""
        plan = self.plan
        found: dict[int, None] = {}
        addresses = plan.addresses
        is_touched = (plan.entries != LITERAL) & (addresses < end)
        for piece in np.flatnonzero(is_touched & (addresses + plan.lengths > begin)).tolist():
            address, offset = int(addresses[piece]), int(plan.offsets[piece])
            first = offset + max(begin - address, 0)
            last = offset + min(end - address, int(plan.lengths[piece])) - 1
            found |= dict.fromkeys(range(first // chunk_bytes, last // chunk_bytes + 1))
        return list(found)


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """What a writer says about a file that is on its disk.

    Attributes:
        path: The file.
        size_bytes: Its size.
        chunk_bytes: Distance between two checksums; the last chunk may be shorter.
        crc32: One CRC-32 (zip's and zlib's) per chunk.
    """

    path: Path
    size_bytes: int
    chunk_bytes: int
    crc32: list[int]
