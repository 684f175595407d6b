"""Which bytes of a torch file are which tensor, and what for; no tensor's bytes are read.

The pickle in the file is read with stand-ins in place of every class, so nothing of it is executed.
A file that is no torch file, or is laid out in a way that is not known here, is one record without
a role: everything then stays exact.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MASTER, MOMENT, SECOND_MOMENT, WEIGHTS, OTHER = (
    *("master", "moment", "second moment", "weights", "other"),
)
ROLES = (MASTER, MOMENT, SECOND_MOMENT, WEIGHTS, OTHER)
SMALL_BYTES = 4096  # what is smaller is not worth an entry and stays with the headers

_STATE = "state"  # within the optimizer's state per parameter: a context, not a role
_MASTERS = {
    *("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat", "fp32_groups"),
}
_STATES = {"state", "base_optimizer_state"}
_MOMENTS = {"exp_avg": MOMENT, "exp_avg_sq": SECOND_MOMENT}
_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
_LOCAL_BYTES = 30
_CENTRAL_BYTES = 46
_HAS_DESCRIPTOR = 1 << 3


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stretch of a file that belongs together.

    Attributes:
        path: Where in the state it is, keys joined with "/"; or the zip member's name.
        offset: Where in the file it begins.
        size_bytes: How long it is.
        dtype: Type of its elements; "uint8" where that is not known.
        role: One of `ROLES`.
        crc_at: Where in the file its CRC-32 stands; empty where that is not known.
    """

    path: str
    offset: int
    size_bytes: int
    dtype: str = "uint8"
    role: str = OTHER
    crc_at: tuple[int, ...] = ()


def find_records(path: Path, size_bytes: int) -> list[Found]:
    """Return the records of a file in file order; they do not overlap, there are gaps."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            found = sorted(_members(file, archive), key=lambda record: record.offset)
    except Exception:  # noqa: BLE001 - no zip file, or damaged: then its checksums will tell
        found = []
    end = 0
    for record in found:
        if record.offset < end:
            found = []
            break
        end = record.offset + record.size_bytes
    if (found and end <= size_bytes) or not size_bytes:
        return found
    return [Found(path="", offset=0, size_bytes=size_bytes)]


def _members(file: BinaryIO, archive: zipfile.ZipFile) -> Iterator[Found]:
    storages = _storages_of(archive)
    file.seek(archive.start_dir)
    directory, position = file.read(), 0
    for info in archive.infolist():
        if directory[position : position + 4] != b"PK\1\2":
            raise ValueError("the table of contents is not where it should be")
        entry = archive.start_dir + position
        position += _CENTRAL_BYTES + sum(struct.unpack_from("<3H", directory, position + 28))
        if info.compress_size < SMALL_BYTES:
            continue
        file.seek(info.header_offset)
        local = file.read(_LOCAL_BYTES)
        offset = info.header_offset + _LOCAL_BYTES + sum(struct.unpack_from("<2H", local, 26))
        folder, _, key = info.filename.rpartition("/")
        known = folder.endswith("/data") and info.compress_type == zipfile.ZIP_STORED
        storage = storages.get(key) if known else None
        yield Found(
            path=storage.path if storage else info.filename,
            offset=offset,
            size_bytes=info.compress_size,
            dtype=storage.dtype if storage else "uint8",
            role=storage.role if storage else OTHER,
            crc_at=_crc_places(file, info, entry, offset) if storage else (),
        )


def _crc_places(file: BinaryIO, info: zipfile.ZipInfo, entry: int, offset: int) -> tuple[int, ...]:
    """Return where a member's CRC-32 stands: in the table, and before or behind its bytes."""
    place = info.header_offset + 14
    if info.flag_bits & _HAS_DESCRIPTOR:
        place = offset + info.compress_size
        file.seek(place)
        place += 4 if file.read(4) == b"PK\7\x08" else 0
    places = (place, entry + 16)
    for each in places:
        file.seek(each)
        if file.read(4) != struct.pack("<I", info.CRC):
            return ()
    return places


# ---- the pickle


@dataclass
class _Storage:
    key: str
    dtype: str
    path: str = ""
    role: str = ""


class _Stub:
    """Stands for an object of any class: keeps what it would have been made of."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Stub:
        stub = object.__new__(cls)
        stub.parts = [*args, *kwargs.values()]
        stub.entries = {}
        return stub

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.parts: list[Any]
        self.entries: dict[Any, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> _Stub:
        return _Stub(self, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        self.parts.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.parts.extend(values)


class _Unpickler(pickle.Unpickler):
    """Reads a pickle without importing anything that it names."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._types: dict[tuple[str, str], type[_Stub]] = {}
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> type[_Stub]:
        key = (module, name)
        if key not in self._types:
            self._types[key] = type(name, (_Stub,), {})
        return self._types[key]

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        dtype = _DTYPES.get(kind.__name__, "uint8")
        return self.storages.setdefault(str(key), _Storage(str(key), dtype))


def _storages_of(archive: zipfile.ZipFile) -> dict[str, _Storage]:
    """Return the storages that the pickle names, by the names of their members."""
    name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
    if name is None:
        return {}
    unpickler = _Unpickler(archive.read(name))
    root = unpickler.load()
    seen: set[tuple[int, str]] = set()
    waiting: list[tuple[Any, tuple[str, ...], str]] = [(root, (), OTHER)]
    while waiting:
        value, path, context = waiting.pop()
        if isinstance(value, _Storage):
            role = OTHER if context == _STATE else context
            # Memory that has two roles has none: it stays exact.
            value.role = role if value.role in ("", role) else OTHER
            value.path = value.path or "/".join(path)
        elif (id(value), context) not in seen:
            seen.add((id(value), context))
            for key, child in _children(value):
                if key is None:
                    waiting.append((child, path, context))
                else:
                    below = _context(context, key, is_root=not path)
                    waiting.append((child, (*path, str(key)), below))
    return {key: storage for key, storage in unpickler.storages.items() if storage.role}


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (key, child); without a key what an object was made of."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from ((None, child) for child in value)
    elif isinstance(value, _Stub):
        yield from ((None, child) for child in value.parts)
        yield from value.entries.items()


def _context(context: str, key: Any, *, is_root: bool) -> str:
    """Return what lies under `key` of something in `context`."""
    if is_root and key == "module":
        return WEIGHTS
    if context not in (OTHER, _STATE) or not isinstance(key, str):
        return context
    if key in _MASTERS:
        return MASTER
    if key in _STATES:
        return _STATE
    return _MOMENTS.get(key, context) if context == _STATE else context
