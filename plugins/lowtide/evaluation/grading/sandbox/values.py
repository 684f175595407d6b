"""Plain values between processes that do not trust each other: JSON, and arrays in it.

Standard library alone (numpy where arrays come): the child loads this file by its path. No object
crosses, so nothing that a value does when it is compared or printed comes with it.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
from typing import Any

FRAME_BYTES = 64 << 20
"""Longest message."""


class ValueRefusedError(Exception):
    """A value that cannot cross, or a message that is none."""


def send(channel: int, message: Any) -> None:
    """Write one message to a pipe."""
    data = json.dumps(message).encode()
    if len(data) > FRAME_BYTES:
        raise ValueRefusedError(f"a value of {len(data)} bytes; allowed are {FRAME_BYTES}")
    view = memoryview(struct.pack("<I", len(data)) + data)
    while view:
        view = view[os.write(channel, view) :]


def receive(channel: int) -> Any:
    """Read one message from a pipe.

    Raises:
        ValueRefusedError: what comes is no message.
        EOFError: the other end is gone.
    """
    (length,) = struct.unpack("<I", _exactly(channel, 4))
    if length > FRAME_BYTES:
        raise ValueRefusedError(f"a message of {length} bytes; allowed are {FRAME_BYTES}")
    try:
        return json.loads(_exactly(channel, length))
    except (ValueError, RecursionError) as error:
        raise ValueRefusedError(f"a message that is not JSON: {error}") from None


def _exactly(channel: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(channel, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def pack(value: Any) -> Any:
    """Return `value` as JSON can hold it.

    Raises:
        ValueRefusedError: not a number, text, bytes, None, list, tuple, set, dict or array.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    for name, kind in (("list", list), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, kind):
            return {name: [pack(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(each)] for key, each in value.items()]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        array = numpy.asarray(value)
        if array.dtype.kind in "biufc":
            data = base64.b64encode(array.tobytes()).decode()
            return {"array": [array.dtype.str, list(array.shape), data]}
    raise ValueRefusedError(
        f"a value of type {type(value).__name__}; allowed are numbers, text, bytes, None, lists, "
        "tuples, sets, dicts and numeric arrays"
    )


def unpack(packed: Any) -> Any:
    """Return what `pack` was given.

    Raises:
        ValueRefusedError: not something that `pack` returns.
    """
    if packed is None or isinstance(packed, (bool, int, float, str)):
        return packed
    try:
        ((name, body),) = packed.items()
        if name == "complex":
            return complex(*body)
        if name == "bytes":
            return base64.b64decode(body, validate=True)
        if name == "dict":
            return {unpack(key): unpack(value) for key, value in body}
        if name == "array":
            return _array(*body)
        return {"list": list, "tuple": tuple, "set": set}[name](unpack(each) for each in body)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueRefusedError(f"a message that holds no value: {error}") from None


def _array(kind: str, shape: list[int], data: str) -> Any:
    import numpy as np

    element = np.dtype(kind)
    if element.kind not in "biufc" or element.hasobject or element.itemsize > 32:
        raise ValueRefusedError(f"an array of {kind}")
    raw = np.frombuffer(base64.b64decode(data, validate=True), element)
    return raw.reshape([int(n) for n in shape]).copy()
