"""The file ``<name>.compact``: another file's bytes in blocks, each encoded by itself.

Little endian: magic ``LTCF``, u32 format version; the blocks' payloads; the table (JSON); u64
length of the table, u32 CRC-32 of magic, version, table and length, magic again. The table stands
at the end because lengths are known only when the payloads are written.

The table says of the original its name, size, checksums and attempt, and lists records: stretches
of it (a tensor), cut into blocks of 1 MiB. The "rest" is one more record: all bytes between the
others, end to end. A block is ``[encoding, payload length, CRC-32 of the bytes it gives]``, where
the encoding is "raw", "codec", "lossy" (both a stream of `lowtide.core.stream`) or "base" (no
payload: the block at the same place of the same record in the file of the checkpoint that "base"
names). Payloads follow each other in the order of the table.

No length is believed before it was checked against the bytes that are there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lowtide.checkpoint.compact.records import SECOND_MOMENT
from lowtide.checkpoint.compact.table import (
    BASE,
    LOSSY,
    RAW,
    SUFFIX,
    Record,
    Table,
    parse_table,
)
from lowtide.checkpoint.store.scan import find_wrong_size, opened
from lowtide.checkpoint.writer.plan import FileResult
from lowtide.core.codec import decode_stream
from lowtide.core.errors import CheckpointError, CorruptStreamError
from lowtide.core.native import Buffer, crc32
from lowtide.core.restart import sync_folder

MAGIC = b"LTCF"
FORMAT = 1
CHUNK_BYTES = 4 << 20  # between two checksums of a compact file in its manifest

_PREFIX = struct.pack("<4sI", MAGIC, FORMAT)
_TRAILER = struct.Struct("<QI4s")
_DAMAGED = "go on from another checkpoint"

FindBase: TypeAlias = Callable[[str, str], Path]
"""From the tag and the attempt of a checkpoint to its folder."""


class ChunkSums:
    """The CRC-32 of every chunk of bytes that come one after the other."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.size_bytes = 0
        self.crc32: list[int] = []

    def add(self, data: Buffer) -> None:
        """Go on with `data`."""
        view = memoryview(data).cast("B")
        while view:
            room = -self.size_bytes % self.chunk_bytes
            if not room:
                self.crc32.append(0)
                room = self.chunk_bytes
            part = view[:room]
            self.crc32[-1] = crc32(part, self.crc32[-1])
            self.size_bytes += len(part)
            view = view[len(part) :]


class SummedFile:
    """A new file that is written from begin to end and summed on the way."""

    def __init__(self, path: Path, *, chunk_bytes: int) -> None:
        self.path = path
        self.sums = ChunkSums(chunk_bytes)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        self._file.write(data)
        self.sums.add(data)

    def finish(self) -> FileResult:
        """Sync the file and its name to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        sync_folder(self.path.parent)
        return FileResult(
            path=self.path,
            size_bytes=self.sums.size_bytes,
            chunk_bytes=self.sums.chunk_bytes,
            crc32=self.sums.crc32,
        )


class CompactWriter(SummedFile):
    """A compact file in the making: payloads in the order of the table, then the table."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, chunk_bytes=CHUNK_BYTES)
        self.write(_PREFIX)

    def __enter__(self) -> CompactWriter:
        return self

    def write_table(self, table: Table) -> None:
        """Write what stands behind the payloads."""
        raw = table.as_json()
        length = struct.pack("<Q", len(raw))
        self.write(raw)
        self.write(_TRAILER.pack(len(raw), crc32(_PREFIX + raw + length), MAGIC))


class CompactFile:
    """A compact file to read from; keeps a descriptor open until `close`.

    Args:
        path: The file.
        find_base: Where the checkpoints are that it refers to.

    Raises:
        CheckpointError: it is missing, damaged or of an unknown format.
    """

    def __init__(self, path: Path, *, find_base: FindBase) -> None:
        self.path = path
        self.table = read_table(path)
        self._find_base = find_base
        self._descriptor = -1
        self._base: CompactFile | None = None
        self._by_path = {r.path: r for r in reversed((*self.table.records, self.table.rest))}

    def __enter__(self) -> CompactFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it and its bases."""
        base, self._base = self._base, None
        descriptor, self._descriptor = self._descriptor, -1
        if base is not None:
            base.close()
        if descriptor >= 0:
            os.close(descriptor)

    def find(self, path: str, size_bytes: int) -> Record | None:
        """Return the record at a place in the state if it has this size."""
        record = self._by_path.get(path)
        return record if record is not None and record.size_bytes == size_bytes else None

    def read(self, record: Record, number: int) -> bytes:
        """Return the bytes of a block, checked.

        Raises:
            CheckpointError: they are damaged here or in a base, or a base is missing.
        """
        block, size_bytes = record.blocks[number], record.block_bytes(number)
        where = f"{self.path}: block {number} of {record.path or 'the rest'}"
        if block.encoding == BASE:
            base = self._open_base()
            source = base.find(record.path, record.size_bytes)
            if source is None:
                raise CheckpointError(f"{where}: {base.path} does not have it; {_DAMAGED}")
            raw = base.read(source, number)
        else:
            payload = self._payload(record, number)
            if block.encoding == RAW:
                raw = payload
            else:
                is_lossy = block.encoding == LOSSY
                try:
                    raw = decode_block(payload, record, size_bytes, is_lossy=is_lossy)
                except Exception as error:  # a codec is anybody's code
                    raise CheckpointError(f"{where}: cannot be decoded: {error}") from error
        if len(raw) != size_bytes or crc32(raw) != block.crc32:
            raise CheckpointError(f"{where}: is not what was written; {_DAMAGED}")
        return raw

    def _payload(self, record: Record, number: int) -> bytes:
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        length = record.blocks[number].length
        return os.pread(self._descriptor, length, record.ends[number] - length)

    def _open_base(self) -> CompactFile:
        if self._base is not None:
            return self._base
        if self.table.base is None:
            raise CheckpointError(f"{self.path}: refers to a checkpoint but names none; {_DAMAGED}")
        tag, attempt = self.table.base
        path = self._find_base(tag, attempt) / f"{self.table.name}{SUFFIX}"
        why = f"which {self.path} needs; {_DAMAGED}"
        try:
            base = CompactFile(path, find_base=self._find_base)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (checkpoint {tag} is one {why})") from error
        if (base.table.name, base.table.attempt) != (self.table.name, attempt):
            raise CheckpointError(
                f"{path}: is {base.table.name} of attempt {base.table.attempt}, not "
                f"{self.table.name} of attempt {attempt} of checkpoint {tag}, {why}"
            )
        if base.table.depth >= self.table.depth:  # else two could refer to each other
            raise CheckpointError(f"{path}: refers to as many others as the one {why}")
        self._base = base
        return base


def decode_block(stream: Buffer, record: Record, size_bytes: int, *, is_lossy: bool) -> bytes:
    """Return the bytes that an encoded block gives; a second moment has no negative ones.

    Raises:
        CorruptStreamError: the stream is damaged or has another size.
    """
    values = decode_stream(stream, max_bytes=size_bytes)
    if values.nbytes != size_bytes:
        raise CorruptStreamError(f"it decodes to {values.nbytes} bytes, wanted are {size_bytes}")
    if is_lossy and record.role == SECOND_MOMENT:
        bits = values.reshape(-1).view(f"uint{8 * values.itemsize}")
        bits[bits >> (8 * values.itemsize - 1) == 1] = 0  # -0 too: its root would be -0
    return bytes(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def read_table(path: Path) -> Table:
    """Read and check the table of a compact file.

    Raises:
        CheckpointError: it is missing, damaged or of an unknown format.
    """
    with _errors_named(path), opened(path) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        wrong = find_wrong_size(descriptor, size_bytes)
        if wrong is not None or size_bytes < len(_PREFIX) + _TRAILER.size:
            raise ValueError(wrong or f"it has {size_bytes} bytes")
        prefix = os.pread(descriptor, len(_PREFIX), 0)
        if prefix[:4] != MAGIC:
            raise ValueError(f"it begins with {prefix[:4]!r}")
        version = int.from_bytes(prefix[4:], "little")
        if version != FORMAT:
            raise ValueError(f"its format is {version}, known is {FORMAT}: is Lowtide too old?")
        trailer = os.pread(descriptor, _TRAILER.size, size_bytes - _TRAILER.size)
        length, crc, magic = _TRAILER.unpack(trailer)
        begin = size_bytes - _TRAILER.size - length
        if magic != MAGIC or begin < len(_PREFIX):
            raise ValueError("it does not end with a table")
        raw = os.pread(descriptor, length, begin)
        if crc32(prefix + raw + trailer[:8]) != crc:
            raise ValueError("the checksum of its table does not fit")
        return parse_table(raw, begin=len(_PREFIX), end=begin)


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_DAMAGED}") from error
    # RecursionError: a table of nothing but brackets.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not a whole compact file ({type(error).__name__}: {error}); {_DAMAGED}"
        ) from error
