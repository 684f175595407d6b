"""How much of a tensor is in memory of its own, page by page, as the kernel says."""

from __future__ import annotations

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
