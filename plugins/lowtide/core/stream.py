"""The container of encoded arrays, shared by all codecs: arrays in, checked bytes out, and back.

Little endian: magic ``LTC1``, u16 format version, u16 flags (0), u32 header length, u32 CRC32C of
all that and the header, the header (JSON: codec config, dtype, shape, payload length and CRC32C),
the payload. No length is believed, and nothing allocated by it, before it was checked against the
bytes that are there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import CodecError, CorruptStreamError, listed
from lowtide.core.native import crc32c

MAGIC = b"LTC1"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 16
MAX_NDIM = 32  # what every numpy can hold

_NUMPY_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
# Types that numpy lacks travel as the bits of an integer: name -> (numpy bits, torch type).
BIT_TYPES: dict[str, tuple[str, torch.dtype]] = {
    "bfloat16": ("uint16", torch.bfloat16),
    "float8_e4m3fn": ("uint8", torch.float8_e4m3fn),
    "float8_e5m2": ("uint8", torch.float8_e5m2),
}
_PREFIX = struct.Struct("<4sHHII")


@dataclass(frozen=True)
class ArrayData:
    """An array on its way through a codec.

    Attributes:
        values: C-contiguous, little endian; the bits as unsigned integers if numpy lacks `dtype`.
        dtype: Name of the element type, such as "float32" or "bfloat16".
    """

    values: NDArray[Any]
    dtype: str


@dataclass(frozen=True)
class StreamHeader:
    """What a stream says about itself, checked against the bytes that are there."""

    codec: dict[str, Any]
    dtype: str
    shape: tuple[int, ...]
    payload_bytes: int
    payload_crc32c: int
    payload_offset: int

    @property
    def nbytes(self) -> int:
        """Size of the decoded array, bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def as_array(buf: Any) -> ArrayData:
    """Return an array, tensor or bytes-like object in the form codecs work on.

    Copies only what is not contiguous and little endian already.

    Raises:
        CodecError: the element type or the kind of object is not supported.
    """
    name = None
    if isinstance(buf, torch.Tensor):
        if buf.device.type != "cpu" or buf.layout != torch.strided:
            raise CodecError(
                f"cannot encode a {buf.layout} tensor on {buf.device}; copy it to the host first"
            )
        tensor = buf.detach().resolve_conj().resolve_neg().contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        if name in BIT_TYPES:
            tensor = tensor.view(getattr(torch, BIT_TYPES[name][0]))
        elif name not in _NUMPY_NAMES:
            raise CodecError(f"cannot encode {tensor.dtype}; supported: {_supported()}")
        values: NDArray[Any] = tensor.numpy()
    else:
        try:
            values = buf if isinstance(buf, np.ndarray) else np.asarray(memoryview(buf))
        except (TypeError, ValueError) as error:
            raise CodecError(
                f"cannot encode a {type(buf).__name__}; pass an array, a tensor or bytes"
            ) from error
        if isinstance(values, np.ma.MaskedArray):
            raise CodecError("cannot encode a masked array, its mask would be lost; fill it first")
        name = values.dtype.name
    if name in BIT_TYPES:
        values = values.view(BIT_TYPES[name][0])  # ml_dtypes' numpy types come this way
    elif name not in _NUMPY_NAMES:
        raise CodecError(f"cannot encode elements of {values.dtype}; supported: {_supported()}")
    if values.ndim > MAX_NDIM:
        raise CodecError(f"cannot encode {values.ndim} dimensions, at most {MAX_NDIM}")
    little = values.dtype.newbyteorder("<")
    # ascontiguousarray would make a 0-d array 1-d.
    return ArrayData(np.asarray(values, dtype=little, order="C"), name)


def pack_stream(
    config: Mapping[str, Any], dtype: str, shape: tuple[int, ...], payload: bytes
) -> bytes:
    """Return `payload` in a container that `unpack_stream` and `decode_stream` can read.

    Raises:
        CodecError: the configuration is not JSON or too large.
    """
    fields = {
        "codec": dict(config),
        "dtype": dtype,
        "shape": list(shape),
        "payload_bytes": len(payload),
        "payload_crc32c": crc32c(payload),
    }
    try:
        header = json.dumps(fields, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise CodecError(f"codec configuration {dict(config)} is not JSON: {error}") from error
    if len(header) > MAX_HEADER_BYTES:
        raise CodecError(f"stream header has {len(header)} bytes, allowed are {MAX_HEADER_BYTES}")
    start = _PREFIX.pack(MAGIC, FORMAT_VERSION, 0, len(header), 0)[:-4]
    return b"".join((start, struct.pack("<I", crc32c(header, crc32c(start))), header, payload))


def read_header(buf: Any) -> StreamHeader:
    """Return the checked header of a stream, of which the payload may still be missing.

    Raises:
        CorruptStreamError: it is no stream, damaged, or of an unknown version.
    """
    data = _as_bytes(buf)
    if len(data) < _PREFIX.size:
        raise CorruptStreamError(f"stream has {len(data)} bytes, a header needs {_PREFIX.size}")
    magic, version, flags, length, crc = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise CorruptStreamError(f"stream begins with {magic!r}, a Lowtide stream with {MAGIC!r}")
    if version != FORMAT_VERSION or flags:
        raise CorruptStreamError(
            f"stream has format version {version} and flags {flags}, this release reads version "
            f"{FORMAT_VERSION}; it is damaged or was written by a newer Lowtide"
        )
    if length > min(MAX_HEADER_BYTES, len(data) - _PREFIX.size):
        raise CorruptStreamError(f"stream claims a header of {length} bytes, {len(data)} are there")
    header = data[_PREFIX.size : _PREFIX.size + length]
    if crc32c(header, crc32c(data[: _PREFIX.size - 4])) != crc:
        raise CorruptStreamError("stream header does not match its checksum; the stream is damaged")
    try:
        return _parse_header(json.loads(bytes(header)), _PREFIX.size + length)
    # RecursionError: a header of nothing but brackets.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptStreamError(f"stream header makes no sense: {error}") from error


def unpack_stream(buf: Any) -> tuple[StreamHeader, memoryview]:
    """Return header and payload of a complete stream, both checked.

    Raises:
        CorruptStreamError: it is damaged, truncated, or followed by other bytes.
    """
    header = read_header(buf)
    payload = _as_bytes(buf)[header.payload_offset :]
    if len(payload) != header.payload_bytes:
        raise CorruptStreamError(
            f"stream has {len(payload)} bytes of payload, its header says {header.payload_bytes}; "
            f"it is truncated, or followed by something else"
        )
    if crc32c(payload) != header.payload_crc32c:
        raise CorruptStreamError("stream payload does not match its checksum; it is damaged")
    return header, payload


def _parse_header(fields: dict[str, Any], payload_offset: int) -> StreamHeader:
    shape = tuple(fields["shape"])
    numbers = [*shape, fields["payload_bytes"], fields["payload_crc32c"]]
    if len(shape) > MAX_NDIM or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"shape {shape}, payload {numbers[-2:]}")
    header = StreamHeader(
        dict(fields["codec"]), str(fields["dtype"]), shape, numbers[-2], numbers[-1], payload_offset
    )
    if not isinstance(header.codec.get("id"), str) or header.nbytes >= 1 << 63:
        raise ValueError(f"codec {header.codec}, {header.nbytes} bytes")
    return header


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy type that carries elements of the type `name`, or raise ValueError."""
    if name not in _NUMPY_NAMES and name not in BIT_TYPES:
        raise ValueError(f'element type "{name}" is unknown; supported: {_supported()}')
    bits = BIT_TYPES[name][0] if name in BIT_TYPES else name
    dtype: np.dtype[Any] = np.dtype(bits).newbyteorder("<")
    return dtype


def _supported() -> str:
    return listed([*_NUMPY_NAMES, *BIT_TYPES])


def _as_bytes(buf: Any) -> memoryview:
    source: Any = buf.numpy() if isinstance(buf, torch.Tensor) else buf
    try:
        view = memoryview(source)
        return view.cast("B") if view.nbytes else memoryview(b"")
    except (TypeError, ValueError) as error:
        raise CodecError(
            f"cannot read a stream from a {type(buf).__name__}; pass contiguous bytes"
        ) from error


def writable_bytes(out: Any, header: StreamHeader) -> NDArray[np.uint8]:
    """Return the memory of `out` as flat bytes if it can take the decoded array."""
    values: Any = out
    if isinstance(out, torch.Tensor):
        if out.device.type != "cpu" or not out.is_contiguous():
            raise CodecError(f"out is on {out.device} or not contiguous; pass a host tensor")
        found = str(out.dtype).removeprefix("torch.")
        # An empty tensor may have strides that no view to another size accepts.
        flat_tensor = out.detach().reshape(-1) if out.numel() else torch.empty(0, dtype=out.dtype)
        values = flat_tensor.view(torch.uint8).numpy()
    else:
        values = out if isinstance(out, np.ndarray) else np.asarray(memoryview(out))
        found = values.dtype.name
        if not (values.flags.c_contiguous and values.flags.writeable and values.dtype.isnative):
            raise CodecError("out is read-only, byte-swapped or not contiguous")
    allowed = {header.dtype, numpy_dtype(header.dtype).name, "uint8", "int8"}
    if values.nbytes != header.nbytes or found not in allowed:
        raise CodecError(
            f"out has {values.nbytes} bytes of {found}, the stream holds {header.nbytes} bytes of "
            f"{header.dtype}, shape {header.shape}"
        )
    flat: NDArray[np.uint8] = values.reshape(-1).view(np.uint8)
    return flat
