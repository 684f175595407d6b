"""How much of a tensor is in memory of its own, page by page, as the kernel says."""

from __future__ import annotations

import ctypes
import mmap
from array import array
from pathlib import Path

from torch import Tensor

_PRESENT, _SHARED = 1 << 63, 1 << 61  # of an entry of /proc/self/pagemap; shared: a file's page


def resident_bytes(tensor: Tensor) -> int:
    """Return the bytes of pages below `tensor` that are in memory and belong to no file."""
    first = tensor.data_ptr() // mmap.PAGESIZE
    end = -(-(tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = array("Q", file.read(8 * (end - first)))
    assert len(entries) == end - first
    own = sum(bool(entry & _PRESENT) and not entry & _SHARED for entry in entries)
    return own * mmap.PAGESIZE


def cached_bytes(tensor: Tensor) -> int:
    """Return the bytes of whole pages of `tensor` that are in memory, a file's cached ones too."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    library = ctypes.CDLL(None, use_errno=True)
    nbytes = ctypes.c_size_t(pages * mmap.PAGESIZE)
    assert library.mincore(ctypes.c_void_p(begin), nbytes, found) == 0
    return mmap.PAGESIZE * sum(each & 1 for each in found)
