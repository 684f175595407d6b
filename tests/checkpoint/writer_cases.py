"""Plans with known contents, and every way to write them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.checkpoint.writer import Ticket, Writer, open_writer
from lowtide.checkpoint.writer.plan import LITERAL, FilePlan
from lowtide.checkpoint.writer.python_writer import PythonWriter
from lowtide.core.native import status

EVER_S = 60.0  # a wait that only a bug makes so long
PAGE = 4096


@dataclass(frozen=True)
class Way:
    implementation: str
    io: str
    direct: bool

    def __str__(self) -> str:
        return f"{self.implementation}-{self.io}-{'direct' if self.direct else 'buffered'}"

    def open(self, *, slabs: int = 8, chunk_bytes: int = PAGE, **options: Any) -> Writer:
        arguments = {
            "buffer_bytes": slabs * chunk_bytes,
            "chunk_bytes": chunk_bytes,
            "io": self.io,
            "direct": self.direct,
            **options,
        }
        if self.implementation == "native":
            return open_writer(**arguments)
        return PythonWriter(**{"bytes_per_s": 0.0, "queue_depth": 8, **arguments})


WAYS = [Way("python", "threads", True), Way("python", "threads", False)]
if status().available:
    WAYS += [
        Way("native", "io_uring", True),
        Way("native", "io_uring", False),
        Way("native", "threads", True),
        Way("native", "threads", False),
    ]
ONE_OF_EACH = [way for way in WAYS if way.direct]


@dataclass
class Draft:
    """A file put together piece by piece; knows what it must look like on the disk."""

    path: Path
    expected: bytearray = field(default_factory=bytearray)
    literals: bytearray = field(default_factory=bytearray)
    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)
    patches: list[tuple[int, int]] = field(default_factory=list)
    entries: dict[int, bytearray] = field(default_factory=dict)
    arrays: list[NDArray[Any]] = field(default_factory=list)

    def literal(self, data: bytes) -> Draft:
        if data:
            self.pieces.append((len(self.expected), len(data), len(self.literals), LITERAL))
            self.literals += data
            self.expected += data
        return self

    def entry(self, number: int, data: NDArray[Any] | bytes) -> Draft:
        array = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
        if array.nbytes:
            place = (len(self.expected), array.nbytes, array.ctypes.data, number)
            self.pieces.append(place)
            self.arrays.append(array)
            self.entries.setdefault(number, bytearray()).extend(array.tobytes())
            self.expected += array.tobytes()
        return self

    def patch(self, number: int, before: bytes = b"", after: bytes = b"") -> Draft:
        self.patches.append((len(self.literals) + len(before), number))
        crc = zlib.crc32(self.entries.get(number, b"")).to_bytes(4, "little")
        begin = len(self.expected) + len(before)
        self.literal(before + b"????" + after)
        self.expected[begin : begin + 4] = crc
        return self

    def plan(self) -> FilePlan:
        literals = np.frombuffer(self.literals or bytearray(), np.uint8)
        pieces = np.array(self.pieces, np.int64).reshape(-1, 4)
        entries = pieces[:, 3].astype(np.int32)
        addresses = pieces[:, 2].astype(np.uint64)
        addresses[entries == LITERAL] += np.uint64(literals.ctypes.data)
        return FilePlan(
            path=self.path,
            size_bytes=len(self.expected),
            offsets=pieces[:, 0].astype(np.uint64),
            lengths=pieces[:, 1].astype(np.uint64),
            addresses=addresses,
            entries=entries,
            literals=literals,
            patches=np.array(self.patches, np.uint64).reshape(-1, 2),
            owners=list(self.arrays),
        )

    def check(self, crc32: list[int] | None = None, chunk_bytes: int = PAGE) -> None:
        """Fail unless the file, and what the writer says about it, is as drafted."""
        written = self.path.read_bytes()
        assert len(written) == len(self.expected)
        assert written == bytes(self.expected)
        if crc32 is not None:
            begins = range(0, len(written), chunk_bytes)
            assert crc32 == [zlib.crc32(written[i : i + chunk_bytes]) for i in begins]


def simple(path: Path, size: int, seed: int = 0) -> Draft:
    """A file that is one entry."""
    return Draft(path).entry(0, np.random.default_rng(seed).bytes(size))


def random_draft(path: Path, seed: int) -> Draft:
    """Entries of one or more parts, of sizes of all kinds, with patches wherever they may be."""
    random = np.random.default_rng(seed)
    draft = Draft(path)
    # Many tiny ones, or few large ones, or sizes around the ends of pages and chunks.
    scale = [40, 3000, 50_000][seed % 3]
    edges = [1, 2, 3, 4, 5, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE - 2]
    count = int(random.integers(1, 80 if scale < 1000 else 12))
    for number in range(count):
        draft.literal(random.bytes(int(random.integers(0, 70))))
        for _ in range(int(random.integers(1, 4))):
            is_edge = random.random() < 0.3
            size = int(random.choice(edges) if is_edge else random.integers(0, scale))
            draft.entry(number, random.bytes(size))
            if random.random() < 0.2:
                draft.literal(random.bytes(int(random.integers(1, 9))))
        if random.random() < 0.8:
            draft.patch(number, random.bytes(4), random.bytes(8))
    for number in random.permutation(count + 1).tolist():  # the last one is an empty entry
        draft.patch(number, random.bytes(int(random.integers(0, 20))))
    return draft.literal(b"end")


def aligned_array(size: int, skip: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes that begin `skip` bytes behind the beginning of a page."""
    memory = np.empty(size + 2 * PAGE, np.uint8)
    begin = (skip - memory.ctypes.data) % PAGE
    array = memory[begin : begin + size]
    array[:] = np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8)
    return array


def finish(ticket: Ticket) -> list[list[int]]:
    """Wait for a job that must succeed; return its checksums."""
    is_captured = ticket.wait_captured(EVER_S)
    is_durable = ticket.wait_durable(EVER_S)
    assert (ticket.error, is_captured, is_durable) == (None, True, True)
    return [result.crc32 for result in ticket.results()]
