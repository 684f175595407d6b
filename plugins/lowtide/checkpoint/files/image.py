"""A torch file that has been read into memory: its tensors are used where they lie.

What `torch.load` does with such a file is one more copy of everything. Here storages are parts of
the memory itself. As a large one dies, its pages go back to the system, as if it had been alone.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import pickle
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lowtide.checkpoint.files import opcodes

_PAGE_BYTES = mmap.PAGESIZE
_LARGE_BYTES = 1 << 20  # storages from this size on give their pages back one by one
_DTYPES: dict[Any, torch.dtype] = {kind: dtype for dtype, kind in opcodes.STORAGES.items()}
_DTYPES[torch.UntypedStorage] = torch.uint8
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


class Image:
    """The bytes of a file, in memory of its own.

    Args:
        size_bytes: Size of the file.

    Raises:
        OSError: The system has not so much memory.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._is_loaded = False
        # None for an empty file, of which there is no mapping.
        self.memory: mmap.mmap | None = None
        if size_bytes:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self.memory = mmap.mmap(-1, size_bytes, flags=flags)
            if _HUGE_PAGES is not None:
                with contextlib.suppress(OSError):  # a kernel without them
                    self.memory.madvise(_HUGE_PAGES)

    def view(self, begin: int, end: int) -> memoryview:
        """Return a range of the bytes."""
        return memoryview(b"" if self.memory is None else self.memory)[begin:end]

    def storage(self, begin: int, size_bytes: int) -> torch.UntypedStorage:
        """Return a storage that is a part of this memory and keeps it."""
        if self.memory is None or not size_bytes:
            return torch.UntypedStorage(0)
        array = np.frombuffer(self.memory, np.uint8, size_bytes, begin)
        if size_bytes >= _LARGE_BYTES:
            weakref.finalize(array, _give_back, self.memory, begin, size_bytes).atexit = False
        return torch.from_numpy(array).untyped_storage()

    def load(self, map_location: Any = None) -> Any:
        """Return what ``torch.load(..., weights_only=False)`` returns for the file. Once.

        Raises:
            RuntimeError: A second time: the memory belongs to the tensors.
        """
        if self._is_loaded:
            raise RuntimeError("this file has been loaded, and its memory belongs to the tensors")
        self._is_loaded = True
        memory = self.memory
        if memory is None or memory[:4] != b"PK\3\4":
            return torch.load(io.BytesIO(memory or b""), map_location, weights_only=False)
        memory.seek(0)
        reader: Any = torch._C.PyTorchFileReader(cast("Any", memory))
        name = "byteorder"
        if reader.has_record(name) and reader.get_record(name).decode() != sys.byteorder:
            return torch.load(io.BytesIO(memory), map_location, weights_only=False)
        pickled = io.BytesIO(reader.get_record("data.pkl"))
        found = _Unpickler(pickled, self, reader, map_location).load()
        torch._utils._validate_loaded_sparse_tensors()
        return found


def load_file(path: Path, image: Image | None, map_location: Any) -> Any:
    """Load a file, from memory where it has been read already.

    DeepSpeed's own files hold more than tensors, and are as trusted as its own engine trusts them.
    """
    if image is not None:
        return image.load(map_location)
    return torch.load(path, map_location=map_location, weights_only=False)


def _give_back(memory: mmap.mmap, begin: int, size_bytes: int) -> None:
    """Return the pages to the system that hold nothing else."""
    first = -(-begin // _PAGE_BYTES) * _PAGE_BYTES
    length = (begin + size_bytes) // _PAGE_BYTES * _PAGE_BYTES - first
    if length > 0:
        memory.madvise(mmap.MADV_DONTNEED, first, length)


def _restored(storage: Any, location: str, map_location: Any) -> Any:
    """Bring a storage to where `torch.load` would bring it."""
    if callable(map_location):
        found = map_location(storage, location)
        if found is not None:
            return found
    elif isinstance(map_location, dict):
        location = map_location.get(location, location)
    elif map_location is not None:
        location = str(map_location)
    return torch.serialization.default_restore_location(storage, location)


class _Unpickler(pickle.Unpickler):
    """Unpickles torch's ``data.pkl``."""

    def __init__(self, file: Any, image: Image, reader: Any, map_location: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self._image, self._reader, self._map_location = image, reader, map_location
        self._loaded: dict[str, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that `pid` names."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"got {pid!r} in place of a storage")
        _, kind, key, location, elements = pid
        if key not in self._loaded:
            dtype = _dtype_of(kind)
            begin = self._reader.get_record_offset(f"data/{key}")
            storage = self._image.storage(begin, elements * dtype.itemsize)
            self._loaded[key] = torch.storage.TypedStorage(
                wrap_storage=_restored(storage, location, self._map_location),
                dtype=dtype,
                _internal=True,
            )
        return self._loaded[key]


def _dtype_of(kind: Any) -> torch.dtype:
    if kind not in _DTYPES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that such classes will go one day
            _DTYPES[kind] = kind.dtype
    return _DTYPES[kind]
