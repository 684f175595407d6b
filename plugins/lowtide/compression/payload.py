"""The bytes of ``lowtide.sz``: payload header, records and their sections (FORMAT section 2).

Nothing is allocated by a length that was not checked against the bytes that are there and the
number of elements. Functions that read raise CorruptStreamError for everything that is wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowtide.compression.chunks import MAX_CHUNK_ELEMENTS, Chunk, Grid
from lowtide.compression.elements import Array, ElementType
from lowtide.compression.predictors import KINDS, ChunkPredictor, Kind
from lowtide.core.codec import (
    compress_bytes,
    compress_planes,
    decompress_bytes,
    decompress_planes,
)
from lowtide.core.errors import CorruptStreamError

VERSION = 1
LINEAR, LOGARITHMIC = 0, 1  # domains
LOSSLESS = 0  # kind of record; the others are those of the predictors

_HEADER = struct.Struct("<BBHIdQ")
_COMMON = struct.Struct("<IIIIII")  # exceptions, four lengths, raw length of positions
_MAX_LEB_BYTES = 5  # positions are below 2^35


@dataclass(frozen=True)
class PayloadHeader:
    """What all chunks share.

    Attributes:
        domain: LINEAR or LOGARITHMIC.
        step: Of the quantizer, in working values.
        chunk_elements: See `Grid`.
    """

    domain: int
    step: float
    chunk_elements: int


@dataclass(frozen=True)
class Record:
    """A chunk as it is stored. All sections but `codes` are zstd frames, or empty.

    Attributes:
        predictor: None: `values` holds all elements, as they were.
        codes: What the predictor gave.
        signs: One bit for each element, domain LOGARITHMIC.
        exceptions: How many elements are stored as they were.
        positions: Which ones.
        positions_bytes: Size of `positions` without zstd.
        values: Their byte planes.
    """

    predictor: ChunkPredictor | None
    codes: bytes | memoryview = b""
    signs: bytes | memoryview = b""
    exceptions: int = 0
    positions: bytes | memoryview = b""
    positions_bytes: int = 0
    values: bytes | memoryview = b""

    def pack(self) -> bytes:
        """Return the record's bytes."""
        if self.predictor is None:
            return b"".join((bytes((LOSSLESS,)), self.values))
        sections = (self.codes, self.signs, self.positions, self.values)
        lengths = (self.exceptions, *map(len, sections), self.positions_bytes)
        start = bytes((self.predictor.kind,)) + self.predictor.pack()
        return b"".join((start, _COMMON.pack(*lengths), *sections))


def pack_payload(header: PayloadHeader, records: Sequence[bytes]) -> bytes:
    """Return a payload of packed records."""
    start = _HEADER.pack(
        VERSION, header.domain, 0, len(records), header.step, header.chunk_elements
    )
    return b"".join((start, struct.pack(f"<{len(records)}Q", *map(len, records)), *records))


def parse_payload(
    payload: memoryview, shape: tuple[int, ...]
) -> tuple[PayloadHeader, list[tuple[Chunk, memoryview]]]:
    """Return the header, and each chunk of an array of `shape` with its record."""
    if len(payload) < _HEADER.size:
        raise CorruptStreamError(f"payload has {len(payload)} bytes, allowed are {_HEADER.size} up")
    version, domain, reserved, count, step, chunk_elements = _HEADER.unpack_from(payload)
    if version != VERSION or domain not in (LINEAR, LOGARITHMIC) or reserved:
        raise CorruptStreamError(
            f"payload has version {version}, domain {domain} and {reserved}, this release reads "
            f"version {VERSION}; it is damaged or was written by a newer Lowtide"
        )
    if not 1 <= chunk_elements <= MAX_CHUNK_ELEMENTS:
        raise CorruptStreamError(
            f"chunks of {chunk_elements} elements, allowed are 1 to {MAX_CHUNK_ELEMENTS}"
        )
    grid = Grid(shape, chunk_elements)
    begin = _HEADER.size + 8 * count
    if count != grid.count or begin > len(payload):
        raise CorruptStreamError(
            f"payload has {count} chunks in {len(payload)} bytes, shape {shape} in chunks of "
            f"{chunk_elements} elements makes {grid.count}"
        )
    lengths = struct.unpack_from(f"<{count}Q", payload, _HEADER.size)
    if sum(lengths) != len(payload) - begin:
        raise CorruptStreamError(
            f"chunks claim {sum(lengths)} bytes, {len(payload) - begin} are there"
        )
    found = []
    for chunk, length in zip(grid, lengths, strict=True):
        found.append((chunk, payload[begin : begin + length]))
        begin += length
    return PayloadHeader(domain, step, chunk_elements), found


def parse_record(
    raw: memoryview, header: PayloadHeader, chunk: Chunk, kinds: Mapping[int, Kind] = KINDS
) -> Record:
    """Return the parts of a packed record, which may be of `kinds`; none of them decoded."""
    number = raw[0] if len(raw) else -1
    if number == LOSSLESS:
        return Record(None, values=raw[1:])
    kind = kinds.get(number)
    if kind is None or len(raw) < 1 + kind.packed_bytes + _COMMON.size:
        raise CorruptStreamError(f"a record of kind {number} and {len(raw)} bytes")
    if not (header.step > 0 and math.isfinite(header.step) and math.isfinite(1 / header.step)):
        raise CorruptStreamError(f"a step of {header.step}")
    begin = 1 + kind.packed_bytes
    predictor = kind.parse(bytes(raw[1:begin]), len(chunk.shape))
    exceptions, *lengths, positions_bytes = _COMMON.unpack_from(raw, begin)
    begin += _COMMON.size
    if sum(lengths) != len(raw) - begin:
        raise CorruptStreamError(f"sections claim {lengths} bytes, {len(raw) - begin} are there")
    sections = []
    for length in lengths:
        sections.append(raw[begin : begin + length])
        begin += length
    codes, signs, positions, values = sections
    is_plausible = (
        exceptions <= chunk.count
        and exceptions <= positions_bytes <= _MAX_LEB_BYTES * exceptions
        and bool(exceptions) == bool(len(positions)) == bool(len(values))
        and (header.domain == LOGARITHMIC or not len(signs))
    )
    if not is_plausible:
        raise CorruptStreamError(
            f"{exceptions} exceptions of {chunk.count} elements, in sections of {lengths} bytes "
            f"and {positions_bytes} bytes of positions"
        )
    return Record(predictor, codes, signs, exceptions, positions, positions_bytes, values)


# ---- sections


def lossless_record(elements: Array, level: int) -> Record:
    """Return a record that holds all elements as they are."""
    return Record(None, values=compress_planes(elements, level))


def lossless_elements(record: Record, element: ElementType, count: int) -> Array:
    """Return the elements of a record without a predictor."""
    return decompress_planes(record.values, element.dtype, count)


def pack_signs(is_negative: Array, level: int) -> bytes:
    """Return the section of signs."""
    if not is_negative.any():
        return b""
    return compress_bytes(np.packbits(is_negative, bitorder="little").data, level)


def parse_signs(signs: bytes | memoryview, count: int) -> Array | None:
    """Return which of `count` elements are negative; None if none is."""
    if not len(signs):
        return None
    raw = np.frombuffer(decompress_bytes(signs, -(-count // 8)), np.uint8)
    return np.unpackbits(raw, count=count, bitorder="little").astype(bool)


def pack_positions(positions: Array, level: int) -> tuple[bytes, int]:
    """Return the section of rising positions, and its size without zstd."""
    if not len(positions):
        return b"", 0
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.max() < 0x80:
        raw = gaps.astype(np.uint8)
    else:
        sizes = np.ones(len(gaps), np.int64)
        for k in range(1, _MAX_LEB_BYTES):
            sizes += gaps >= 1 << 7 * k
        ends = np.cumsum(sizes)
        raw = np.empty(ends[-1], np.uint8)
        for k in range(_MAX_LEB_BYTES):
            has = sizes > k
            is_not_last = (sizes[has] > k + 1).astype(np.uint8) << 7
            raw[(ends - sizes)[has] + k] = (gaps[has] >> 7 * k & 0x7F).astype(
                np.uint8
            ) | is_not_last
    return compress_bytes(raw.data, level), len(raw)


def parse_positions(record: Record, count: int) -> Array:
    """Return the positions of a record's exceptions among `count` elements, int64."""
    if not record.exceptions:
        return np.empty(0, np.int64)
    raw = np.frombuffer(decompress_bytes(record.positions, record.positions_bytes), np.uint8)
    ends = np.flatnonzero(raw < 0x80)
    begins = np.concatenate(([0], ends[:-1] + 1))
    if len(ends) != record.exceptions or ends[-1] != len(raw) - 1:
        raise CorruptStreamError(f"{len(ends)} positions of {record.exceptions} exceptions")
    if (ends - begins).max() >= _MAX_LEB_BYTES:
        raise CorruptStreamError("a position of more than 5 bytes")
    places = np.arange(len(raw)) - np.repeat(begins, ends - begins + 1)
    gaps = np.add.reduceat((raw & 0x7F).astype(np.int64) << 7 * places, begins)
    positions: Array = np.cumsum(gaps + 1) - 1
    if positions[-1] >= count:
        raise CorruptStreamError(f"an exception at {positions[-1]} of {count} elements")
    return positions


def exception_values(record: Record, element: ElementType) -> Array:
    """Return the elements of a record that are stored as they were."""
    return decompress_planes(record.values, element.dtype, record.exceptions)
