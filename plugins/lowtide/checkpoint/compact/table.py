"""The table of a compact file: what it holds, and where. See `compact_file`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.compact.records import ROLES
from lowtide.core.errors import CheckpointError
from lowtide.core.stream import numpy_dtype

BLOCK_BYTES = 1 << 20
RAW, CODEC, LOSSY, BASE = "raw", "codec", "lossy", "base"


def refuse_compact(folder: Path) -> None:
    """Say what to do with a compact checkpoint where torch files are needed.

    Raises:
        CheckpointError: `folder` is one.
    """
    if next(folder.glob(f"*{SUFFIX}"), None) is not None:
        raise CheckpointError(
            f"{folder}: is a compact copy, not torch files; make them again with "
            f'"lowtide checkpoint expand {folder} FOLDER" and give that folder'
        )


class Block(NamedTuple):
    """One block: how it is stored, the bytes that takes, the CRC-32 of what it gives."""

    encoding: str
    length: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """A stretch of the original.

    Attributes:
        path: Its place in the state, keys joined with "/".
        offset: Where in the original it begins; of the rest 0.
        size_bytes: Its size in the original.
        dtype: Type of its elements.
        role: "master", "moment", "second moment", "weights" or "other".
        position: Where in this file its payloads begin.
        blocks: Its blocks.
        codec: Configuration of the lossy codec, where blocks are "lossy".
        bound: "kind" and "value" of the error bound of every such block by itself.
    """

    path: str
    offset: int
    size_bytes: int
    dtype: str
    role: str
    position: int
    blocks: tuple[Block, ...]
    codec: dict[str, Any] | None = None
    bound: dict[str, Any] | None = None

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where in this file each payload ends."""
        return tuple(accumulate((b.length for b in self.blocks), initial=self.position))[1:]

    def block_bytes(self, number: int) -> int:
        """Return how many bytes of the original a block holds."""
        return min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a compact file says about itself.

    Attributes:
        name: Name of the original below its checkpoint.
        attempt: Of the checkpoint.
        size_bytes: Of the original.
        chunk_bytes: Distance between two checksums of the original.
        crc32: Checksums of the original, as in its manifest.
        base: Tag and attempt of the checkpoint that "base" blocks refer to.
        depth: How many checkpoints are needed besides this one, at most.
        records: In the order of the original.
        rest: All bytes of the original that are in no record.
    """

    name: str
    attempt: str
    size_bytes: int
    chunk_bytes: int
    crc32: tuple[int, ...]
    base: tuple[str, str] | None
    depth: int
    records: tuple[Record, ...]
    rest: Record

    @property
    def is_lossy(self) -> bool:
        """Whether some blocks give other bytes than the original had."""
        return any(block.encoding == LOSSY for r in self.records for block in r.blocks)

    def as_json(self) -> bytes:
        """Return the table as it stands in the file."""
        value = {**vars(self), "block_bytes": BLOCK_BYTES, "is_lossy": self.is_lossy}
        names = [field.name for field in fields(Record)]
        records = [{name: getattr(r, name) for name in names} for r in (*self.records, self.rest)]
        value |= {"records": records[:-1], "rest": records[-1]}
        return json.dumps(value, separators=(",", ":")).encode()


def parse_table(raw: bytes, *, begin: int, end: int) -> Table:
    """Return the table in `raw`, whose payloads lie from `begin` to `end` of its file.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RecursionError: it makes no sense.
    """
    value: dict[str, Any] = json.loads(raw)
    size_bytes, chunk_bytes = _size(value["size_bytes"]), _size(value["chunk_bytes"])
    base = value["base"]
    if base is not None:
        tag, attempt = base
        if not (isinstance(attempt, str) and Path(tag).name == tag and tag != ".."):
            raise ValueError(f"base is {base}")
        base = (tag, attempt)
    if value["block_bytes"] != BLOCK_BYTES or not chunk_bytes:
        raise ValueError(f"blocks of {value['block_bytes']} bytes, chunks of {chunk_bytes}")
    table = Table(
        name=_text(value["name"]),
        attempt=_text(value["attempt"]),
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
        crc32=tuple(map(_size, value["crc32"])),
        base=base,
        depth=_size(value["depth"]),
        records=tuple(map(_parse_record, value["records"])),
        rest=_parse_record(value["rest"]),
    )
    position, offset = begin, 0
    for record in (*table.records, table.rest):
        if record.position != position:
            raise ValueError(f"{record.path}: is at {record.position}, expected {position}")
        position = record.ends[-1] if record.ends else position
    for record in table.records:
        if record.offset < offset:
            raise ValueError(f"{record.path}: begins within the one before")
        offset = record.offset + record.size_bytes
    known = sum(record.size_bytes for record in (*table.records, table.rest))
    if position != end or offset > size_bytes or known != size_bytes:
        raise ValueError(f"records of {known} bytes stored in {position} make no whole file")
    if len(table.crc32) != -(-size_bytes // chunk_bytes):
        raise ValueError(f"{len(table.crc32)} checksums, {size_bytes} bytes")
    return table


def _parse_record(value: dict[str, Any]) -> Record:
    blocks = tuple(
        Block(_text(encoding), _size(length), _size(crc))
        for encoding, length, crc in value["blocks"]
    )
    record = Record(**{**value, "blocks": blocks})
    for number in (record.offset, record.size_bytes, record.position):
        _size(number)
    names = {block.encoding for block in blocks}
    if len(blocks) != -(-record.size_bytes // BLOCK_BYTES) or names - {RAW, CODEC, LOSSY, BASE}:
        raise ValueError(f"{record.path}: {len(blocks)} blocks {names}, {record.size_bytes} bytes")
    for number, block in enumerate(blocks):
        most = 0 if block.encoding == BASE else record.block_bytes(number)
        if block.length > most or (block.encoding == RAW and block.length != most):
            raise ValueError(f"{record.path}: block {number} has {block.length} bytes")
    if record.role not in ROLES or not numpy_dtype(record.dtype):
        raise ValueError(f"{record.path}: role {record.role}, dtype {record.dtype}")
    return record


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no size")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
