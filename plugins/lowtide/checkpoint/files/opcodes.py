"""Pickle opcodes for tensors, as torch writes them, put together without a pickler.

A pickler that asks Python about every object needs about 25 microseconds for a tensor, most of it
for the nineteen small objects that describe it. Their opcodes are nearly the same for all tensors,
so here they are joined from ready pieces.
"""

from __future__ import annotations

import functools
import pickle
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

# What torch's own pickles call, so that torch.load takes the file, also with weights_only.
_REBUILD = torch._utils._rebuild_tensor_v2
_REBUILD_PARAMETER = torch._utils._rebuild_parameter

# The storage classes that torch names in its files. Other dtypes take torch's own way to pickle.
STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_GLOBALS = (_REBUILD, _REBUILD_PARAMETER, OrderedDict, *STORAGES.values())
_TEXTS = ("storage", "cpu")


def _put_global(value: Any, number: int) -> bytes:
    return b"c%s\n%s\nq%c" % (value.__module__.encode(), value.__qualname__.encode(), number)


def text(value: str) -> bytes:
    """Return the opcode that pushes `value`."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


# Everything that tensors share stands at the head of the stream, under the first memo numbers, and
# stays on the unpickler's stack, which nobody looks at after the end. (POP would remove it, but
# torch's weights-only unpickler does not know that opcode.)
HEAD = b"\x80\x02" + b"".join(
    [_put_global(value, number) for number, value in enumerate(_GLOBALS)]
    + [text(value) + b"q%c" % (len(_GLOBALS) + i) for i, value in enumerate(_TEXTS)]
)
_GET = {id(value): b"h%c" % number for number, value in enumerate((*_GLOBALS, *_TEXTS))}
_GET_STORAGE = {dtype: _GET[id(kind)] for dtype, kind in STORAGES.items()}
_STORAGE, _CPU = (b"h%c" % (len(_GLOBALS) + i) for i in range(2))
_NO_HOOKS = _GET[id(OrderedDict)] + b")R"
_PUSH_REBUILD = _GET[id(_REBUILD)]
_PUSH_REBUILD_PARAMETER = _GET[id(_REBUILD_PARAMETER)]
_IS = {True: b"\x88", False: b"\x89"}


def learn(pickler: pickle.Pickler) -> list[Any]:
    """Let `pickler` use the head's memo numbers for the same objects; returns what to keep alive.

    What it writes meanwhile is to be thrown away: `HEAD` does the same.
    """
    shared = [*_GLOBALS, *_TEXTS]
    for value in shared:
        pickler.dump(value)
    return shared


def integer(value: int) -> bytes:
    """Return the opcode that pushes `value`."""
    if 0 <= value < 1 << 8:
        return b"K%c" % value
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a%c" % len(raw) + raw


def integers(values: Sequence[int]) -> bytes:
    """Return the opcodes that push a tuple of integers."""
    body = b"".join(map(integer, values))
    ends = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}
    return body + ends[len(values)] if len(values) in ends else b"(" + body + b"t"


def _storage(kind: bytes, location: str, elements: int) -> tuple[bytes, bytes]:
    """Return what pushes a storage, before and after the number of its record."""
    place = _CPU if location == "cpu" else text(location)
    return b"(" + _STORAGE + kind, place + integer(elements) + b"tQ"


def numbered(head: bytes, number: int, tail: bytes) -> bytes:
    """Return `head` and `tail` with the number of a record, as torch writes it, between them."""
    name = b"%d" % number
    return b"%sX%c\0\0\0%s%s" % (head, len(name), name, tail)


def whole_storage(kind: type, number: int, location: str, elements: int) -> bytes:
    """Return the opcodes that push a storage of class `kind`: torch's persistent id of a record."""
    name = b"c%s\n%s\n" % (kind.__module__.encode(), kind.__qualname__.encode())
    head, tail = _storage(name, location, elements)
    return numbered(head, number, tail)


@functools.lru_cache(8192)
def around_number(
    dtype: torch.dtype,
    location: str,
    elements: int,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
    grad: bool,
    is_parameter: bool,
) -> tuple[bytes, bytes]:
    """Return the opcodes that push a tensor, before and after the number of its record.

    Args:
        dtype: Of the storage and the tensor.
        location: Of the storage, as torch calls it.
        elements: Of the storage.
        offset: Where in it the tensor begins, in elements.
        shape: Of the tensor.
        stride: Of the tensor, in elements.
        grad: Whether it requires a gradient.
        is_parameter: Whether it is a parameter.
    """
    head, tail = _storage(_GET_STORAGE[dtype], location, elements)
    head = _PUSH_REBUILD + b"(" + head
    view = integer(offset) + integers(shape) + integers(stride)
    tail += view + _IS[grad and not is_parameter] + _NO_HOOKS + b"tR"
    if is_parameter:
        head = _PUSH_REBUILD_PARAMETER + b"(" + head
        tail += _IS[grad] + _NO_HOOKS + b"tR"
    return head, tail
