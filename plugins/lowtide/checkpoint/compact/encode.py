"""One file to its compact file: read once from begin to end, in blocks."""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.checkpoint.compact.bound import exact_values, keeps_bound
from lowtide.checkpoint.compact.file import ChunkSums, CompactFile, CompactWriter, decode_block
from lowtide.checkpoint.compact.records import MOMENT, OTHER, SECOND_MOMENT, Found, find_records
from lowtide.checkpoint.compact.table import (
    BASE,
    BLOCK_BYTES,
    CODEC,
    LOSSY,
    RAW,
    Block,
    Record,
    Table,
)
from lowtide.checkpoint.store.manifest import FileSums
from lowtide.checkpoint.writer.plan import FileResult
from lowtide.core.codec import Codec
from lowtide.core.errors import CheckpointError
from lowtide.core.native import crc32
from lowtide.core.stream import BIT_TYPES, numpy_dtype

logger = logging.getLogger("lowtide")

_LOSSY_DTYPES = ("float64", "float32", "float16", "bfloat16")


class Encoder:
    """Turns blocks into payloads.

    Args:
        codec: For everything.
        moments: For what may change within its bound, or None.
        pace: Called after each block with the bytes written for it.

    Attributes:
        base: The same file in an earlier checkpoint, to refer to.
        base_tag: The name of that checkpoint.
    """

    def __init__(self, codec: Codec, moments: Codec | None, *, pace: Callable[[int], None]) -> None:
        self._codec = codec
        self._moments = moments
        self._pace = pace
        self._has_warned = False
        self.base: CompactFile | None = None
        self.base_tag = ""

    def store(
        self, record: Record, blocks: Iterator[bytes], out: CompactWriter, *, may_change: bool
    ) -> tuple[Record, int]:
        """Write the payloads of a record; return it with its blocks, and the CRC-32 of it all.

        Args:
            record: The record, without blocks.
            blocks: Its bytes.
            out: Where to write.
            may_change: Whether its bytes may become other ones.
        """
        lossy = self._moments if may_change and self._may_change(record) else None
        done, crc = [], 0
        for number, raw in enumerate(blocks):
            block, payload, decoded = self._encode(record, raw, number, lossy=lossy)
            done.append(block)
            crc = crc32(decoded, crc)
            out.write(payload)
            self._pace(block.length)
        record = replace(record, blocks=tuple(done))
        if lossy is not None and any(block.encoding == LOSSY for block in done):
            bound = {"kind": lossy.bound.kind, "value": lossy.bound.value}
            record = replace(record, codec=lossy.get_config(), bound=bound)
        return record, crc

    def _may_change(self, record: Record) -> bool:
        """Tell whether a record may have errors within the bound of the codec for moments."""
        if self._moments is None or record.dtype not in _LOSSY_DTYPES:
            return False
        bound = self._moments.bound
        is_safe = bound.kind == "lossless" or (bound.kind == "pw_rel" and bound.value < 1)
        if record.role == SECOND_MOMENT and not is_safe:
            # Adam divides by the root of it: next to a large one, zero for a small one is within
            # the bound, and the parameter then makes a giant step.
            _tell(
                self._moments,
                f"keeps no bound relative to each value ({bound}): small second moments would "
                "become zero and updates large",
            )
            return False
        return record.role in (MOMENT, SECOND_MOMENT)

    def _encode(
        self, record: Record, raw: bytes, number: int, *, lossy: Codec | None
    ) -> tuple[Block, bytes, bytes]:
        """Return a block, its payload, and the bytes that it will give."""
        if self._has_base(record, raw, number):
            return Block(BASE, 0, crc32(raw)), b"", raw
        for codec in filter(None, (lossy, self._codec)):
            is_lossy = codec is lossy and codec.bound.kind != "lossless"
            done = self._try(codec, record, raw, is_lossy=is_lossy)
            if done is not None and len(done[0]) < len(raw):
                encoding = LOSSY if is_lossy else CODEC
                return Block(encoding, len(done[0]), crc32(done[1])), *done
        return Block(RAW, len(raw), crc32(raw)), raw, raw

    def _try(
        self, codec: Codec, record: Record, raw: bytes, *, is_lossy: bool
    ) -> tuple[bytes, bytes] | None:
        """Return the stream and what it gives, or None if that is not what was promised."""
        values = _as_values(raw, record.dtype)
        if is_lossy and not np.isfinite(exact_values(raw, record.dtype)).all():
            return None
        try:
            stream = codec.encode(values)
            decoded = decode_block(stream, record, len(raw), is_lossy=is_lossy)
        except Exception as error:  # noqa: BLE001 - a codec is anybody's code
            _tell(codec, f"fails with {type(error).__name__}: {error}")
            return None
        if decoded == raw:
            return stream, decoded
        if is_lossy and keeps_bound(raw, decoded, record.dtype, codec.bound):
            return stream, decoded
        _tell(codec, f"does not keep what it promises ({codec.bound})")
        return None

    def _has_base(self, record: Record, raw: bytes, number: int) -> bool:
        """Compare with the base: by checksum first, as its bytes are far away, then by bytes."""
        found = None if self.base is None else self.base.find(record.path, record.size_bytes)
        if self.base is None or found is None or found.blocks[number].crc32 != crc32(raw):
            return False
        try:
            return self.base.read(found, number) == raw
        except (CheckpointError, OSError) as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("%s; it is not used as a base", error)
            return False


_told: set[tuple[Codec, str]] = set()  # what has been warned of: once, not for each checkpoint


def _tell(codec: Codec, text: str) -> None:
    key = (codec, text.partition(" ")[0])
    if key not in _told:
        _told.add(key)
        logger.warning('codec "%s" %s; such blocks are stored without it', codec.codec_id, text)


def _as_values(raw: bytes, dtype: str) -> NDArray[Any] | torch.Tensor:
    if len(raw) % numpy_dtype(dtype).itemsize:
        return np.frombuffer(raw, np.uint8)
    values = np.frombuffer(raw, numpy_dtype(dtype))
    return (
        torch.from_numpy(values.copy()).view(BIT_TYPES[dtype][1]) if dtype in BIT_TYPES else values
    )


class _Source:
    """A file that is read from begin to end and then compared with its checksums."""

    def __init__(self, path: Path, sums: FileSums) -> None:
        self._path = path
        self._written = sums
        self._sums = ChunkSums(sums.chunk_bytes)
        self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        size_bytes = os.fstat(self._file.fileno()).st_size
        if size_bytes != sums.size_bytes:
            self._file.close()
            raise CheckpointError(
                f"{path}: has {size_bytes} bytes, {sums.size_bytes} were written; check its disk"
            )

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, size_bytes: int) -> Iterator[bytes]:
        """Yield the next bytes in blocks."""
        for begin in range(0, size_bytes, BLOCK_BYTES):
            data = self._file.read(min(BLOCK_BYTES, size_bytes - begin))
            if len(data) < min(BLOCK_BYTES, size_bytes - begin):
                raise CheckpointError(f"{self._path}: was cut off while it was copied")
            self._sums.add(data)
            yield data

    def check(self) -> None:
        """Raise CheckpointError if what was read is not what was written."""
        for number, pair in enumerate(zip(self._sums.crc32, self._written.crc32, strict=True)):
            if pair[0] != pair[1]:
                begin = number * self._sums.chunk_bytes
                end = min(begin + self._sums.chunk_bytes, self._sums.size_bytes)
                raise CheckpointError(
                    f"{self._path}: bytes {begin} to {end} have changed on its disk since they "
                    "were written, so it is not copied; check that disk"
                )


class _Rest:
    """What is between the records of a file, end to end."""

    def __init__(self, found: list[Found]) -> None:
        self._found = found
        self._begins: list[tuple[int, int]] = []  # of each gap: in the file, in `data`
        self.data = bytearray()

    def add(self, begin: int, blocks: Iterator[bytes]) -> None:
        """Take the gap that begins at `begin`."""
        self._begins.append((begin, len(self.data)))
        for block in blocks:
            self.data += block

    def has(self, place: int) -> bool:
        """Tell whether the four bytes at `place` of the file lie between the records."""
        before = bisect_right(self._found, place + 3, key=lambda f: f.offset) - 1
        return before < 0 or self._found[before].offset + self._found[before].size_bytes <= place

    def patch(self, place: int, crc: int) -> None:
        """Write a CRC-32 to `place` of the file."""
        begin, here = self._begins[bisect_right(self._begins, place, key=lambda b: b[0]) - 1]
        at = here + place - begin
        self.data[at : at + 4] = crc.to_bytes(4, "little")

    def blocks(self) -> Iterator[bytes]:
        """Yield it all in blocks."""
        for begin in range(0, len(self.data), BLOCK_BYTES):
            yield bytes(self.data[begin : begin + BLOCK_BYTES])


def compact_file(
    source: Path, target: Path, encoder: Encoder, *, name: str, sums: FileSums, attempt: str
) -> FileResult:
    """Write the compact file `target` of `source`, synced to disk.

    Args:
        source: The file.
        target: The file to write.
        encoder: How, and which file to refer to.
        name: What the file is called below its checkpoint.
        sums: What its manifest says of it.
        attempt: Of its checkpoint.

    Raises:
        CheckpointError: `source` is not what its manifest says.
        OSError: it cannot be read or `target` not be written.
    """
    found = find_records(source, sums.size_bytes)
    rest, position, records = _Rest(found), 0, []
    patches: list[tuple[int, int]] = []
    with _Source(source, sums) as file, CompactWriter(target) as out:
        for each in found:
            rest.add(position, file.blocks(each.offset - position))
            position = each.offset + each.size_bytes
            empty = Record(
                path=each.path, offset=each.offset, size_bytes=each.size_bytes, dtype=each.dtype,
                role=each.role, position=out.sums.size_bytes, blocks=(),
            )  # fmt: skip
            # Other bytes have another CRC-32, which torch does not look at but zip tools do.
            may_change = bool(each.crc_at) and all(map(rest.has, each.crc_at))
            blocks = file.blocks(each.size_bytes)
            record, crc = encoder.store(empty, blocks, out, may_change=may_change)
            records.append(record)
            if record.codec is not None:
                patches += [(place, crc) for place in each.crc_at]
        rest.add(position, file.blocks(sums.size_bytes - position))
        file.check()
        for place, crc in patches:
            rest.patch(place, crc)
        empty = Record(
            path="", offset=0, size_bytes=len(rest.data), dtype="uint8", role=OTHER,
            position=out.sums.size_bytes, blocks=(),
        )  # fmt: skip
        last, _ = encoder.store(empty, rest.blocks(), out, may_change=False)
        base = encoder.base
        has_base = any(b.encoding == BASE for r in (*records, last) for b in r.blocks)
        table = Table(
            name=name, attempt=attempt, size_bytes=sums.size_bytes, chunk_bytes=sums.chunk_bytes,
            crc32=sums.crc32, records=tuple(records), rest=last,
            base=(encoder.base_tag, base.table.attempt) if base is not None and has_base else None,
            depth=base.table.depth + 1 if base is not None and has_base else 0,
        )  # fmt: skip
        out.write_table(table)
        return out.finish()
