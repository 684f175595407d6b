"""Reading files on several threads and comparing what is read with checksums.

The work is cut into runs: chunks of one file that one thread reads in turn. Reading and summing
hold no lock of the interpreter.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lowtide.checkpoint.store.manifest import FileSums
from lowtide.core.native import crc32
from lowtide.core.restart import find_zip_damage

if TYPE_CHECKING:
    from lowtide.checkpoint.files.image import Image

OnProgress: TypeAlias = Callable[[int, int], None]

BLOCK_BYTES = 512 * 2**10  # read at once; stays in the processor's cache until it is summed
RUN_BYTES = 32 * 2**20  # what a thread takes at a time
SAMPLED_CHUNKS = 4  # of each file in a sample, the first and the last among them
_MOST_THREADS = 8
_FEWEST_DIRECT_THREADS = 4  # where nobody reads ahead, the disk is busy only with several
_PAGE_BYTES = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        file: Name below the checkpoint's folder; empty where it is the checkpoint as a whole.
        byte_range: First byte and the byte behind the last, or None where it is not about bytes.
        text: What is wrong.
    """

    file: str
    byte_range: tuple[int, int] | None
    text: str

    def __str__(self) -> str:
        place = "" if self.byte_range is None else " bytes {} to {}".format(*self.byte_range)
        return f"{self.file}{place} {self.text}".strip()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Chunks of one file that are read in turn; none where only its size is looked at."""

    path: Path
    name: str
    sums: FileSums
    chunks: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that are read."""
        return sum(end - begin for begin, end in map(self._range, self.chunks))

    def _range(self, chunk: int) -> tuple[int, int]:
        begin = chunk * self.sums.chunk_bytes
        return begin, min(begin + self.sums.chunk_bytes, self.sums.size_bytes)

    def scan(self) -> list[Damage]:
        """Read the chunks and return those that are damaged."""
        damage: list[Damage] = []
        try:
            with opened(self.path) as descriptor:
                text = find_wrong_size(descriptor, self.sums.size_bytes)
                if text is not None:
                    return [self._damage(None, text)]
                for chunk in self.chunks:
                    byte_range = self._range(chunk)
                    if self._crc32(descriptor, byte_range) != self.sums.crc32[chunk]:
                        damage.append(self._damage(byte_range, "are not what was written"))
        except OSError as error:
            damage.append(self._damage(None, f"cannot be read ({error.strerror})"))
        return damage

    def _crc32(self, descriptor: int, byte_range: tuple[int, int]) -> int | None:
        return _crc32_of(descriptor, byte_range)

    def _damage(self, byte_range: tuple[int, int] | None, text: str) -> Damage:
        return Damage(file=self.name, byte_range=byte_range, text=text)


@dataclass(frozen=True, kw_only=True)
class HeldRun(Run):
    """As `Run`; what is read stays in memory, and its checksums are those of that memory."""

    image: Image

    def _crc32(self, descriptor: int, byte_range: tuple[int, int]) -> int | None:
        with self.image.view(*byte_range) as part:
            done = _read_directly(descriptor, part, byte_range[0])
            while done < len(part):
                got = os.preadv(descriptor, [part[done:]], byte_range[0] + done)
                if got == 0:
                    return None
                done += got
            return crc32(part)


def _read_directly(descriptor: int, part: memoryview, offset: int) -> int:
    """Read whole pages past the page cache, as many as come at once; return their bytes."""
    size = len(part) // _PAGE_BYTES * _PAGE_BYTES
    if not size or offset % _PAGE_BYTES or not _O_DIRECT:
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT)
        return os.preadv(descriptor, [part[:size]], offset)
    except OSError as error:
        if error.errno != errno.EINVAL:  # else the file system knows no direct I/O
            raise
        return 0
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


@dataclass(frozen=True, kw_only=True)
class ZipRun:
    """A zip file of torch, checked by the checksums in it, or only by its table of contents."""

    path: Path
    name: str
    is_sample: bool
    size_bytes: int

    def scan(self) -> list[Damage]:
        """Read the file and return what is wrong with it."""
        if self.is_sample:
            text = None if zipfile.is_zipfile(self.path) else "is no torch file"
        else:
            text = find_zip_damage(self.path)
        return [] if text is None else [Damage(file=self.name, byte_range=None, text=text)]


def make_runs(
    folder: Path,
    files: Sequence[tuple[str, FileSums]],
    *,
    is_sample: bool,
    part: tuple[int, int],
    held: Mapping[str, Image] | None = None,
) -> list[Run]:
    """Cut the chunks of `files` into runs and return those of one part.

    Args:
        folder: Where the files are.
        files: Name and checksums, in the same order for every part.
        is_sample: Whether a few chunks of each file are enough.
        part: Index and count of the parts.
        held: The files that stay in memory, and where.
    """
    todo = [
        (number, chunk)
        for number, (_, sums) in enumerate(files)
        for chunk in (_sample(len(sums.crc32)) if is_sample else range(len(sums.crc32)))
    ]
    index, count = part
    mine = todo[len(todo) * index // count : len(todo) * (index + 1) // count]
    runs: list[Run] = []
    for number, group in groupby(mine, key=lambda item: item[0]):
        name, sums = files[number]
        image = None if held is None else held.get(name)
        chunks = [chunk for _, chunk in group]
        step = max(1, RUN_BYTES // sums.chunk_bytes)
        for i in range(0, len(chunks), step):
            some = tuple(chunks[i : i + step])
            if image is None:
                runs.append(Run(path=folder / name, name=name, sums=sums, chunks=some))
            else:
                runs.append(
                    HeldRun(path=folder / name, name=name, sums=sums, chunks=some, image=image)
                )
    if index == 0:
        empty = [(name, sums) for name, sums in files if not sums.crc32]
        runs += [Run(path=folder / name, name=name, sums=sums, chunks=()) for name, sums in empty]
    return runs


def scan_all(
    runs: Sequence[Run | ZipRun], *, threads: int | None, on_progress: OnProgress | None
) -> tuple[list[Damage], int]:
    """Scan `runs` on several threads; return the damage and the bytes read.

    Args:
        runs: What to read.
        threads: How many read at once. By default as many as processors, at most 8.
        on_progress: Called on this thread with the bytes read so far and in total.
    """
    fewest = _FEWEST_DIRECT_THREADS if any(isinstance(run, HeldRun) for run in runs) else 1
    most = threads or max(min(len(os.sched_getaffinity(0)), _MOST_THREADS), fewest)
    total_bytes = sum(run.size_bytes for run in runs)
    done_bytes = 0
    damage: list[Damage] = []
    pool = ThreadPoolExecutor(max_workers=most, thread_name_prefix="lowtide-verify")
    try:
        futures = {pool.submit(run.scan): run for run in runs}
        for future in as_completed(futures):
            damage += future.result()
            done_bytes += futures[future].size_bytes
            if on_progress is not None:
                on_progress(done_bytes, total_bytes)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for terabytes
    return damage, done_bytes


def merged(damage: Iterable[Damage]) -> tuple[Damage, ...]:
    """Return each damage once, by file, with neighbouring ranges of bytes as one."""
    result: list[Damage] = []
    for found in sorted(set(damage), key=lambda d: (d.file, d.byte_range or (-1, -1), d.text)):
        before = result[-1] if result else None
        if before is not None and before.byte_range and found.byte_range:
            is_same = (before.file, before.text) == (found.file, found.text)
            if is_same and before.byte_range[1] >= found.byte_range[0]:
                joined = (before.byte_range[0], max(before.byte_range[1], found.byte_range[1]))
                result[-1] = Damage(file=found.file, byte_range=joined, text=found.text)
                continue
        result.append(found)
    return tuple(result)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for reading. Opened, not only looked at: NFS answers with old attributes."""
    # Without O_NONBLOCK a pipe in place of a file would wait for a writer, for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def find_wrong_size(descriptor: int, size_bytes: int) -> str | None:
    """Say how an open file differs from one of `size_bytes`, or return None."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        return "is not a file"
    if found.st_size != size_bytes:
        return f"has {found.st_size} bytes, {size_bytes} were written"
    return None


def _sample(count: int) -> list[int]:
    """Return which of `count` chunks are read in a sample, evenly spread."""
    if count <= SAMPLED_CHUNKS:
        return list(range(count))
    return [(count - 1) * i // (SAMPLED_CHUNKS - 1) for i in range(SAMPLED_CHUNKS)]


_blocks = threading.local()


def _crc32_of(descriptor: int, byte_range: tuple[int, int]) -> int | None:
    """Return the CRC-32 of a range of bytes, or None where the file ends before."""
    block: memoryview | None = getattr(_blocks, "block", None)
    if block is None:
        block = _blocks.block = memoryview(bytearray(BLOCK_BYTES))
    offset, end = byte_range
    crc = 0
    while offset < end:
        wanted = block[: min(BLOCK_BYTES, end - offset)]
        got = os.preadv(descriptor, [wanted], offset)
        if got == 0:
            return None
        crc = crc32(wanted[:got], crc)
        offset += got
    return crc
