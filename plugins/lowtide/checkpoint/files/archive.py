"""The zip archive inside a torch file: which bytes stand where.

Tensors come first: they can be on their way to the disk while the pickle that describes them is
still being made.
"""

from __future__ import annotations

import functools
import struct
import sys
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowtide.checkpoint.writer.plan import LITERAL, FilePlan
from lowtide.core.errors import NativeUnavailableError
from lowtide.core.native import native

PAGE_BYTES = 4096
_ALIGN_BYTES = 64  # of tensors in the file, as torch aligns them
_DIRECT_BYTES = 1 << 20  # from this size on offsets follow addresses
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = struct.Struct("<4sIII")
_DESCRIPTOR_64 = struct.Struct("<4sIQQ")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_VERSION_64 = 45
_HAS_DESCRIPTOR = 1 << 3
_MAX_32 = 0xFFFFFFFF
_CRC_IN_CENTRAL = 16
_PREFIX = b"archive/"
_PADDING_ID = 0x4246  # torch's own id for padding
_DATE = 0x21  # 1 January 1980: files of equal states are equal


class Record(NamedTuple):
    """Bytes of one storage: where they are, and the object that keeps them there."""

    owner: Any
    address: int
    size_bytes: int


class Archive:
    """Builds the plan of a zip archive with stored members: `add_records`, then `close`.

    Args:
        path: The file that the plan names.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._literals = bytearray()
        self._run_begin = 0  # of the literals that no piece covers yet
        self._offset = 0
        self._members = 0
        self._pieces = array("q")  # offset, length, address or literal position, entry
        self._patches = array("q")  # position in the literals, entry
        self._central = bytearray()
        self._central_patches = array("q")  # position in the central directory, entry
        self._owners: list[Any] = []

    def add_records(self, records: Sequence[Record]) -> None:
        """Append the members ``data/0``, ``data/1`` and so on."""
        self._end_run()
        first = len(self._owners)
        self._owners += [record.owner for record in records]
        try:
            lay_out = native().checkpoint.lay_out_records
        except (NativeUnavailableError, AttributeError):  # or built before this was
            for number, record in enumerate(records, first):
                self._put_record(number, record)
        else:
            self._put_natively(lay_out, first, records)
        self._members += len(records)
        self._end_run()

    def close(self, pickled: bytes) -> None:
        """Append everything else; `pickled` refers to the records."""
        self._put_text("data.pkl", pickled)
        self._put_text("byteorder", sys.byteorder.encode())
        self._put_text("version", b"3\n")
        digest = f"{zlib.crc32(pickled):020d}{len(self._owners):020d}"
        self._put_text(".data/serialization_id", digest.encode())
        self._put_end()

    def plan(self) -> FilePlan:
        """Return the plan of what has been added so far."""
        literals = np.frombuffer(bytearray(self._literals), np.uint8)
        pieces = np.frombuffer(bytes(self._pieces), np.int64).reshape(-1, 4)
        entries = pieces[:, 3].astype(np.int32)
        addresses = pieces[:, 2].astype(np.uint64)
        addresses[entries == LITERAL] += np.uint64(literals.ctypes.data)
        return FilePlan(
            path=self._path,
            size_bytes=self._offset,
            offsets=pieces[:, 0].astype(np.uint64),
            lengths=pieces[:, 1].astype(np.uint64),
            addresses=addresses,
            entries=entries,
            literals=literals,
            patches=np.frombuffer(bytes(self._patches), np.uint64).reshape(-1, 2),
            owners=list(self._owners),
        )

    def _write(self, data: bytes | bytearray) -> None:
        self._literals += data
        self._offset += len(data)

    def _end_run(self) -> None:
        """Make one piece of all literals written since the last one."""
        length = len(self._literals) - self._run_begin
        if length:
            self._pieces.extend((self._offset - length, length, self._run_begin, LITERAL))
            self._run_begin = len(self._literals)

    def _put_text(self, name: str, data: bytes) -> None:
        self._put_header(_PREFIX + name.encode(), 0, zlib.crc32(data), len(data), _ALIGN_BYTES, 0)
        self._write(data)
        self._members += 1

    def _put_natively(self, lay_out: Any, first: int, records: Sequence[Record]) -> None:
        """Do what `_put_record` does to each of `records`."""
        literals, central, pieces, patches, central_patches, self._offset = lay_out(
            np.array([record.address for record in records], np.uint64),
            np.array([record.size_bytes for record in records], np.uint64),
            number=first,
            offset=self._offset,
            literals=len(self._literals),
            central=len(self._central),
        )
        self._literals += literals
        self._central += central
        self._pieces.frombytes(pieces)
        self._patches.frombytes(patches)
        self._central_patches.frombytes(central_patches)
        self._run_begin = len(self._literals)

    def _put_record(self, number: int, record: Record) -> None:
        size, address = record.size_bytes, record.address
        follows = size >= _DIRECT_BYTES and address % _ALIGN_BYTES == 0
        step, rest = (PAGE_BYTES, address % PAGE_BYTES) if follows else (_ALIGN_BYTES, 0)
        entry = len(self._central)
        self._put_header(b"archive/data/%d" % number, _HAS_DESCRIPTOR, 0, size, step, rest)
        self._end_run()
        if size:  # an empty one's CRC is 0
            self._pieces.extend((self._offset, size, address, number))
            self._offset += size
            self._patches.extend((len(self._literals) + 4, number))
            self._central_patches.extend((entry + _CRC_IN_CENTRAL, number))
        descriptor = _DESCRIPTOR_64 if size >= _MAX_32 else _DESCRIPTOR
        self._write(descriptor.pack(b"PK\7\x08", 0, size, size))

    def _put_header(
        self, member: bytes, flags: int, crc: int, size: int, step: int, rest: int
    ) -> None:
        """Write a local header, so long that the data begins at `rest` modulo `step`.

        Also notes the member's entry of the central directory.
        """
        begin, is_large = self._offset, size >= _MAX_32
        known = 0 if flags else size  # with a descriptor the sizes stand there
        extra = struct.pack("<2H2Q", 1, 16, known, known) if is_large else b""
        padding = (rest - begin - _LOCAL.size - len(member) - len(extra)) % step
        if padding:
            padding += 0 if padding >= 4 else step
            extra += _padding(padding)
        sizes, version = ((_MAX_32, _MAX_32), _VERSION_64) if is_large else ((known, known), 20)
        self._write(
            _LOCAL.pack(
                b"PK\3\4", version, flags, 0, 0, _DATE, crc, *sizes, len(member), len(extra)
            )
            + member
            + extra
        )
        wide = [size, size] if is_large else []
        if begin >= _MAX_32:
            wide.append(begin)
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        version, small = (_VERSION_64, _MAX_32) if is_large else (45 if wide else 20, size)
        self._central += (
            _CENTRAL.pack(
                *(b"PK\1\2", _VERSION_64, version, flags, 0, 0, _DATE, crc, small, small),
                *(len(member), len(extra), 0, 0, 0, 0, min(begin, _MAX_32)),
            )
            + member
            + extra
        )

    def _put_end(self) -> None:
        begin, shift = self._offset, len(self._literals)
        patches = np.frombuffer(bytes(self._central_patches), np.int64).reshape(-1, 2)
        self._patches.frombytes((patches + np.array([shift, 0])).tobytes())
        self._write(self._central)
        size, members, end = self._offset - begin, self._members, self._offset
        if members >= 0xFFFF or end >= _MAX_32:
            self._write(
                _END_64.pack(b"PK\6\6", 44, 45, 45, 0, 0, members, members, size, begin)
                + _LOCATOR_64.pack(b"PK\6\7", 0, end, 1)
            )
        few = min(members, 0xFFFF)
        self._write(
            _END.pack(b"PK\5\6", 0, 0, few, few, min(size, _MAX_32), min(begin, _MAX_32), 0)
        )
        self._end_run()


@functools.cache
def _padding(length: int) -> bytes:
    return struct.pack("<2H", _PADDING_ID, length - 4) + bytes(length - 4)
