"""One scratch file on one path: reserved beforehand, unlinked at once, checked when read."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lowtide.core.errors import ConfigError, StorageError
from lowtide.core.native import crc32, crc32_combine
from lowtide.offload.storage.lanes import Crew
from lowtide.offload.storage.mapping import (
    PAGE_BYTES,
    PAGE_ELEMENTS,
    Range,
    allocate,
    give_back,
)

CHUNK_BYTES = 4 << 20
STRETCH_BYTES = 64 << 20  # written through the page cache before that is waited for
DEPTH = 4  # parts of a piece that are under way at once
_DIRECT = getattr(os, "O_DIRECT", 0)
_PREFIX = ".lowtide-offload-"


def aligned(nbytes: int) -> Tensor:
    """Return memory that direct I/O takes: uint8, shape (nbytes,), at a page's begin, zeros."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not for children: a fork beside direct I/O could send them a read's bytes (older kernels).
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(OSError, AttributeError):  # a system without it
            memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


class ScratchFile:
    """A file that nobody else sees, and that goes with the process, however that ends.

    Direct I/O where the file system has it and keeps it coherent with memory maps; otherwise
    through the page cache, from which each piece is dropped once it is on the medium.

    Args:
        folder: Must exist.
        direct: False: through the page cache, whatever the file system can do.

    Raises:
        ConfigError: no file can be made there.
        StorageError: the file does not read back what was written.
    """

    def __init__(self, folder: str | Path, *, direct: bool = True) -> None:
        self.folder = Path(folder)
        self.size_bytes = 0
        self._left: list[tuple[int, int]] = []  # (offset, bytes) that hold nothing any more
        self._direct = -1
        # One each: the parts of a read would keep those of a write waiting.
        self._readers, self._writers = (
            Crew("lowtide-offload-read", DEPTH),
            Crew("lowtide-offload-write", DEPTH),
        )
        try:
            self.descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=self.folder)
        except (OSError, ValueError) as error:  # a path may hold a zero byte
            raise ConfigError(
                f"lowtide.offload.storage.paths: cannot make a file in {str(self.folder)!r}: "
                f"{getattr(error, 'strerror', error)}; allowed is an existing folder that this "
                f"process may write to"
            ) from error
        try:
            if direct and _DIRECT:
                with contextlib.suppress(OSError):  # a file system that has none
                    self._direct = os.open(name, os.O_RDWR | os.O_CLOEXEC | _DIRECT)
        finally:
            os.unlink(name)  # space comes back even after kill -9
        self._finalizer = weakref.finalize(self, _close, self.descriptor, self._direct)
        # A piece is asked for whole; reading ahead would bring in the next one.
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._check()

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is left out."""
        return self._direct >= 0

    def close(self) -> None:
        """Close the file. Memory maps of it stay."""
        self._readers.close()
        self._writers.close()
        self._finalizer()

    def reserve(self, nbytes: int) -> int:
        """Return the offset of space that is certain to be there. By one thread at a time.

        What is behind everything that was ever reserved comes as zeros.

        Raises:
            StorageError: there is not that much left.
        """
        known = next((each for each in self._left if each[1] >= nbytes), None)
        offset = self.size_bytes if known is None else known[0]
        try:
            allocate(self.descriptor, offset, nbytes)
        except OSError as error:
            free = os.statvfs(self.descriptor)
            raise StorageError(
                f"offload.storage: {str(self.folder)!r}: no room for {nbytes} bytes of optimizer "
                f"state, {free.f_bavail * free.f_frsize} are free ({error.strerror}); free some, "
                f"add another path, or raise lowtide.offload.storage.host_memory_bytes"
            ) from error
        if known is None:
            self.size_bytes += nbytes
            return offset
        self._left.remove(known)
        if known[1] > nbytes:
            self._left.append((offset + nbytes, known[1] - nbytes))
        return offset

    def vacate(self, offset: int, nbytes: int) -> None:
        """Give up space that nobody maps any more; as `reserve`, by one thread at a time.

        The file system gets it back, or, where it cannot take it, the next `reserve` does.
        """
        self._drop(offset, nbytes)
        give_back(self.descriptor, offset, nbytes)
        self._left.append((offset, nbytes))

    def write(self, source: Tensor, offset: int, progress: Callable[[], None]) -> int:
        """Write all bytes of `source` and return their CRC-32.

        Args:
            source: uint8, shape (nbytes,), of `aligned` memory, a multiple of `PAGE_BYTES`.
            offset: A multiple of `PAGE_BYTES`.
            progress: Called after each part, from several threads.

        Raises:
            OSError: as the system says.
        """
        view = memoryview(source.numpy().data)

        def move(begin: int) -> int:
            part, written = view[begin : begin + CHUNK_BYTES], 0
            crc = crc32(part)
            while written < len(part):
                step = os.pwrite(self._at(written), part[written:], offset + begin + written)
                if step == 0:
                    raise OSError(errno.EIO, "wrote nothing")
                written += step
                progress()
            return crc

        stretch = len(view) if self.is_direct else STRETCH_BYTES
        crc = 0
        for begin in range(0, len(view), stretch):
            end = min(begin + stretch, len(view))
            found = _in_parts(self._writers, move, range(begin, end, CHUNK_BYTES), end)
            crc = crc32_combine(crc, found, end - begin)
            if not self.is_direct:
                os.fdatasync(self.descriptor)
                progress()
        self._drop(offset, len(view))
        return crc

    def read(self, target: Tensor, offset: int, progress: Callable[[], None]) -> int:
        """Fill `target` and return the CRC-32 of its bytes; arguments as for `write`.

        Raises:
            OSError: as the system says, or the file ends too early.
        """
        view = memoryview(target.numpy().data)

        def move(begin: int) -> int:
            part, filled = view[begin : begin + CHUNK_BYTES], 0
            while filled < len(part):
                step = os.preadv(self._at(filled), [part[filled:]], offset + begin + filled)
                if step == 0:
                    raise OSError(errno.EIO, "the scratch file has become shorter")
                filled += step
                progress()
            return crc32(part)

        crc = _in_parts(self._readers, move, range(0, len(view), CHUNK_BYTES), len(view))
        self._drop(offset, len(view))
        return crc

    def _at(self, position: int) -> int:
        """Return the descriptor for what begins there: direct I/O takes whole pages only."""
        return self._direct if self.is_direct and position % PAGE_BYTES == 0 else self.descriptor

    def _drop(self, offset: int, nbytes: int) -> None:
        if not self.is_direct:
            os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    # -- does it keep its word? ---------------------------------------------------------------

    def _check(self) -> None:
        """Write, read and map a page both ways; leave direct I/O out where that goes wrong."""
        offset = self.reserve(PAGE_BYTES)
        if self.is_direct and not self._is_coherent(offset):
            os.close(self._direct)
            self._finalizer.detach()
            self._direct = -1
            self._finalizer = weakref.finalize(self, _close, self.descriptor, -1)
        if not self.is_direct and not self._is_coherent(offset):
            raise StorageError(
                f"offload.storage: {str(self.folder)!r}: a scratch file does not read back what "
                f"was written to it; choose a path on another file system"
            )

    def _is_coherent(self, offset: int) -> bool:
        page = aligned(PAGE_BYTES)
        mapped = Range(PAGE_ELEMENTS)
        mapped.show_file(0, PAGE_ELEMENTS, self.descriptor, offset)
        try:
            for turn in (1, 2):  # the map holds the page when it is written the second time
                page.fill_(turn)
                self.write(page, offset, _nothing)
                if not bool((mapped.tensor.view(torch.uint8) == turn).all()):
                    return False
                mapped.tensor.view(torch.uint8).fill_(turn + 64)
                self.read(page, offset, _nothing)
                if not bool((page == turn + 64).all()):
                    return False
        except OSError:
            return False
        return True


def _in_parts(crew: Crew, move: Callable[[int], int], begins: range, end: int) -> int:
    """Move parts, several at once, as devices like it; return the CRC-32 of the whole."""
    crc = 0
    for begin, found in zip(begins, crew.map(move, begins), strict=True):
        crc = crc32_combine(crc, found, min(CHUNK_BYTES, end - begin))
    return crc


def _nothing() -> None:
    pass


def _close(*descriptors: int) -> None:
    for each in descriptors:
        if each >= 0:
            os.close(each)
