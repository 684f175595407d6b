"""Codecs: arrays to self-describing byte streams and back. Plugins exchange data through them.

The interface is numcodecs' (`codec_id`, `encode`, `decode`, `get_config`, `from_config`), plus a
`Bound` that says what decoding guarantees. A codec derives from `Codec` and only turns an
`ArrayData` into a payload and back; the container of `lowtide.core.stream` adds the rest.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import CodecError, ConfigError, CorruptStreamError, listed, near
from lowtide.core.registry import Registry
from lowtide.core.stream import (
    BIT_TYPES,
    ArrayData,
    StreamHeader,
    as_array,
    numpy_dtype,
    pack_stream,
    read_header,
    unpack_stream,
    writable_bytes,
)

__all__ = [
    "ArrayData",
    "Bound",
    "Codec",
    "CodecError",
    "StreamHeader",
    "ZstdCodec",
    "codecs",
    "decode_stream",
    "decode_tensor",
    "get_codec",
    "pack_stream",
    "read_header",
    "unpack_stream",
]

BOUND_KINDS = ("lossless", "abs", "rel", "pw_rel", "none")


@dataclass(frozen=True)
class Bound:
    """What a codec guarantees for every finite value x and its decoded x'.

    Kinds: "lossless" (same bits), "abs" (abs(x' - x) <= value), "rel" (the same with value times
    the range max - min of the finite values), "pw_rel" (abs(x' - x) <= value * abs(x)) and "none".
    """

    kind: str
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in BOUND_KINDS:
            raise CodecError(
                f'bound kind "{self.kind}" is unknown.{near(self.kind, BOUND_KINDS)} '
                f"Known: {listed(BOUND_KINDS)}"
            )
        if not 0 <= self.value < math.inf:
            raise CodecError(f"bound value {self.value} must be finite and not negative")


class Codec(ABC):
    """Base of all codecs. Public attributes of an instance are its configuration."""

    codec_id: ClassVar[str]

    @property
    @abstractmethod
    def bound(self) -> Bound:
        """What decoding guarantees."""

    @abstractmethod
    def _encode(self, data: ArrayData) -> bytes:
        """Return the payload; must not write to `data`, and may be called from many threads."""

    @abstractmethod
    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        """Return the elements as a flat array of numpy's dtype for ``header.dtype``.

        The checksums hold, but whoever made the stream may still lie: check every length against
        `payload` and ``header.nbytes`` before allocating, and raise CorruptStreamError.
        """

    def encode(self, buf: Any) -> bytes:
        """Return `buf` as a self-describing stream.

        Args:
            buf: numpy array, torch tensor in host memory, or any bytes-like object; every layout.

        Raises:
            CodecError: the element type or the kind of object is not supported.
        """
        data = as_array(buf)
        return pack_stream(self.get_config(), data.dtype, data.values.shape, self._encode(data))

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return the array of a stream of this codec; the stream's parameters count, not ours.

        A dtype that numpy lacks comes back as its bits: use `decode_tensor` for those.

        Args:
            buf: The stream, bytes-like.
            out: Contiguous array, tensor or writable buffer of the right size and dtype (bytes
                fit every dtype). It is filled and returned.

        Raises:
            CorruptStreamError: the stream is damaged.
            CodecError: `out` does not fit, or another codec wrote the stream.
        """
        header, payload = unpack_stream(buf)
        if header.codec["id"] != self.codec_id:
            raise CodecError(
                f'codec "{self.codec_id}": the stream was written by "{header.codec["id"]}"; '
                f"decode it with decode_stream()"
            )
        target = None if out is None else writable_bytes(out, header)
        values = self._decode(header, payload).reshape(header.shape)
        if target is None:
            return values
        target[:] = values.reshape(-1).view(np.uint8)
        return out

    def get_config(self) -> dict[str, Any]:
        """Return the configuration as JSON types, with the codec's name as "id"."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"id": self.codec_id, **public}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Codec:
        """Return the codec that `get_config` describes.

        Raises:
            ConfigError: a parameter is unknown or its value is not allowed.
        """
        arguments = {name: value for name, value in config.items() if name != "id"}
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f'codec "{cls.codec_id}": cannot use the parameters {arguments}: {error}'
            ) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(json.dumps(self.get_config(), sort_keys=True))

    def __repr__(self) -> str:
        arguments = [f"{name}={value!r}" for name, value in self.get_config().items()]
        return f"{type(self).__name__}({', '.join(arguments[1:])})"


# A zstd block is at least 4 bytes long and gives at most 128 KiB.
_MAX_ZSTD_RATIO = 1 << 15


def checked_level(codec_id: str, level: Any) -> int:
    """Return a zstandard level, 1 (fast) to 22 (small), or raise CodecError."""
    if isinstance(level, bool) or not isinstance(level, int) or not 1 <= level <= 22:
        raise CodecError(f'codec "{codec_id}": level {level!r}, allowed are 1 to 22')
    return level


def compress_bytes(raw: Any, level: int) -> bytes:
    """Return the bytes of a contiguous buffer as one zstd frame that says how many they are."""
    import zstandard

    # A context per call: they are not thread-safe.
    return bytes(zstandard.ZstdCompressor(level=level).compress(raw))


def decompress_bytes(frame: Any, size_bytes: int) -> bytes:
    """Return the `size_bytes` bytes in a zstd frame, which nothing may follow.

    Raises:
        CorruptStreamError: the frame is damaged or holds another number of bytes.
    """
    import zstandard

    try:
        # zstandard allocates what the frame claims, so the claim is checked first.
        claimed = zstandard.get_frame_parameters(frame).content_size
        if claimed != size_bytes or claimed > len(frame) * _MAX_ZSTD_RATIO:
            raise CorruptStreamError(
                f"{len(frame)} bytes claim to hold {claimed}, the header says {size_bytes}; the "
                "stream was not written by Lowtide"
            )
        decompressor = zstandard.ZstdDecompressor()
        return bytes(decompressor.decompress(frame, claimed or 1, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise CorruptStreamError(f"damaged payload: {error}") from error


def compress_planes(values: NDArray[Any], level: int) -> bytes:
    """Return elements as a zstd frame of byte planes: all first bytes, all second bytes, ..."""
    flat = values.reshape(-1)
    planes = flat.view(np.uint8).reshape(flat.size, flat.itemsize).T  # (byte, element)
    return compress_bytes(np.ascontiguousarray(planes).data, level)


def decompress_planes(frame: Any, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Undo `compress_planes`: a flat, writable array of `count` elements.

    Raises:
        CorruptStreamError: as for `decompress_bytes`.
    """
    raw = decompress_bytes(frame, count * dtype.itemsize)
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    return np.array(planes.T, order="C").reshape(-1).view(dtype)  # always a copy: writable


class ZstdCodec(Codec):
    """Lossless: the bytes of the elements sorted into planes, then zstandard.

    Args:
        level: zstandard's level, 1 (fast) to 22 (small).
    """

    codec_id = "lowtide.zstd"

    def __init__(self, level: int = 3) -> None:
        self.level = checked_level(self.codec_id, level)

    @property
    def bound(self) -> Bound:
        """Every bit comes back."""
        return Bound("lossless")

    def _encode(self, data: ArrayData) -> bytes:
        return compress_planes(data.values, self.level)

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        try:
            return decompress_planes(payload, numpy_dtype(header.dtype), math.prod(header.shape))
        except CorruptStreamError as error:
            raise CorruptStreamError(f'codec "{self.codec_id}": {error}') from error


codecs: Registry[Codec] = Registry("codec", "lowtide.codecs", Codec)
codecs.register(ZstdCodec.codec_id, "lowtide.core.codec:ZstdCodec")
codecs.register("lowtide.sz", "lowtide.compression.sz:SzCodec")  # lazy: core imports no plugin
codecs.register("lowtide.aesz", "lowtide.compression.aesz:AeszCodec")


def get_codec(spec: str | Mapping[str, Any] | Codec) -> Codec:
    """Return the codec for a name, for a configuration with "id", or for a codec itself.

    Raises:
        UnknownNameError: no such codec is registered.
        ConfigError: the configuration has no "id" or wrong parameters.
    """
    if isinstance(spec, Codec):
        return spec
    config: Mapping[str, Any] = {"id": spec} if isinstance(spec, str) else spec
    name = config.get("id")
    if not isinstance(name, str):
        raise ConfigError(
            f'codec configuration {dict(config)}: "id" must name a codec. '
            f"Known: {listed(codecs.names())}"
        )
    return codecs.get(name).from_config(config)


def decode_stream(buf: Any, out: Any = None, *, max_bytes: int | None = None) -> Any:
    """Decode a stream of any registered codec; see `Codec.decode`.

    Args:
        buf: The stream, bytes-like.
        out: As for `Codec.decode`.
        max_bytes: Refuse streams that decode to more. Set it for streams of strangers: a small
            stream can honestly hold many zeros.

    Raises:
        CorruptStreamError: the stream is damaged, or larger than `max_bytes`.
        UnknownNameError: its codec is not registered here.
    """
    header = read_header(buf)
    if max_bytes is not None and header.nbytes > max_bytes:
        raise CorruptStreamError(
            f"stream decodes to {header.nbytes} bytes, allowed are max_bytes={max_bytes}"
        )
    try:
        codec = get_codec(header.codec)
    except ConfigError as error:
        raise CorruptStreamError(
            f"stream has an impossible codec configuration: {error}"
        ) from error
    return codec.decode(buf, out)


def decode_tensor(buf: Any, *, max_bytes: int | None = None) -> torch.Tensor:
    """Decode a stream to a torch tensor of the dtype that was encoded; see `decode_stream`."""
    header = read_header(buf)
    values = torch.from_numpy(decode_stream(buf, max_bytes=max_bytes))
    return values.view(BIT_TYPES[header.dtype][1]) if header.dtype in BIT_TYPES else values
