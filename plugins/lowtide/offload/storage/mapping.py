"""Tensors whose pages can be in memory or in a file, piece by piece, at addresses that stay.

Whoever reads such a tensor reads what is newest in the file, through the page cache, with no memory
of its own. ``mmap`` with MAP_FIXED swaps what is behind a part of an address range; Python's own
`mmap` module cannot do that, so the C library is called.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import StorageError

PAGE_BYTES = max(4096, mmap.PAGESIZE)
PAGE_ELEMENTS = PAGE_BYTES // 4

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
_MADV_DONTNEED = 4
_KEEP_SIZE_AND_PUNCH_HOLE = 0x1 | 0x2
_FAILED = ctypes.c_void_p(-1).value


def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    ]  # fmt: skip
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


def allocate(descriptor: int, offset: int, nbytes: int) -> None:
    """Take space for a file's bytes, which read as zeros then.

    Not `os.posix_fallocate`: where a file system (NFS before 4.2, many in user space) cannot
    reserve, that writes into every block, for hours where there are terabytes. Here the file
    becomes longer, if there is room at the moment.

    Raises:
        OSError: there is no room.
    """
    if _library().fallocate(descriptor, 0, offset, nbytes) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS):
        free = os.statvfs(descriptor)
        number = 0 if nbytes <= free.f_bavail * free.f_frsize else errno.ENOSPC
    if number:
        raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, max(offset + nbytes, os.fstat(descriptor).st_size))


def give_back(descriptor: int, offset: int, nbytes: int) -> None:
    """Return space of a file to the file system, where that can be; the file keeps its length."""
    _library().fallocate(descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, offset, nbytes)


class Range:
    """Addresses of one flat float32 tensor.

    Freed when the last tensor that shares its storage is gone.

    Args:
        numel: Elements.

    Attributes:
        tensor: Float32, shape (numel,); zeros in memory at first.

    Raises:
        StorageError: the system gives no more addresses.
    """

    def __init__(self, numel: int) -> None:
        self._c = _library()
        self._nbytes = -(-max(4 * numel, 1) // PAGE_BYTES) * PAGE_BYTES
        self._address = self._map(None, self._nbytes, 0, -1, 0)
        # A subclass, because plain ctypes arrays take no weak references.
        kind: Any = type("_Block", (ctypes.c_char * self._nbytes,), {})
        block = kind.from_address(self._address)
        weakref.finalize(block, self._c.munmap, self._address, self._nbytes).atexit = False
        self.tensor: Tensor = torch.frombuffer(block, dtype=torch.float32)[:numel]

    def show_file(self, first: int, numel: int, descriptor: int, offset: int) -> None:
        """Let elements from `first` on be those of a file from byte `offset` on.

        All of them multiples of a page. What was there before is let go.

        Raises:
            StorageError: the file system refuses to map the file.
        """
        self._map(self._address + 4 * first, 4 * numel, mmap.MAP_SHARED, descriptor, offset)

    def show_memory(self, first: int, numel: int) -> None:
        """Let elements from `first` on be zeros in memory."""
        self._map(self._address + 4 * first, 4 * numel, 0, -1, 0)

    def let_go(self, first: int, numel: int) -> None:
        """Stop holding pages of a mapped file; the next reader finds them again."""
        self._c.madvise(self._address + 4 * first, 4 * numel, _MADV_DONTNEED)

    def _map(self, address: int | None, nbytes: int, flags: int, fd: int, offset: int) -> int:
        if fd < 0:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        fixed = 0 if address is None else _MAP_FIXED
        found = self._c.mmap(address, nbytes, _PROTECTION, flags | fixed, fd, offset)
        if found == _FAILED:
            number = ctypes.get_errno()
            raise StorageError(
                f"offload.storage: cannot map {nbytes} bytes"
                f"{' of a scratch file' if fd >= 0 else ''}: {os.strerror(number)}; choose a path "
                f"on a file system with shared memory maps, or raise the limit of addresses"
            )
        return int(found)
