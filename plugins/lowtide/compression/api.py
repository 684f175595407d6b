"""Arrays to streams and back, in one call each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowtide.compression.sz import SzCodec, inspect_payload
from lowtide.core.codec import Codec, decode_stream, decode_tensor, get_codec
from lowtide.core.errors import CodecError
from lowtide.core.stream import BIT_TYPES, read_header, unpack_stream


def compress(
    x: Any, codec: str | Mapping[str, Any] | Codec = "lowtide.sz", **parameters: Any
) -> bytes:
    """Return `x` as a self-describing stream.

    Args:
        x: numpy array, torch tensor in host memory, or bytes-like object; of any layout.
        codec: Name or configuration of a registered codec, or a codec.
        parameters: Of the codec; see `SzCodec` for those of "lowtide.sz", which needs ``bound``.

    Raises:
        CodecError: the element type is not supported, or parameters were given with a codec.
        ConfigError: a parameter is unknown or its value is not allowed.
        UnknownNameError: no such codec is registered.
    """
    if isinstance(codec, Codec):
        if parameters:
            raise CodecError(
                f"{codec!r} has its parameters already, but {parameters} were given; pass the "
                "codec's name with them"
            )
        return codec.encode(x)
    config = {"id": codec} if isinstance(codec, str) else dict(codec)
    return get_codec(config | parameters).encode(x)


def decompress(blob: Any, *, max_bytes: int | None = None) -> Any:
    """Return the array in a stream of any codec: numpy, or torch where numpy lacks the dtype.

    Args:
        blob: The stream, bytes-like.
        max_bytes: Refuse streams that decode to more. Set it for streams of strangers.

    Raises:
        CorruptStreamError: the stream is damaged, or larger than `max_bytes`.
        UnknownNameError: its codec is not registered here.
    """
    is_bits = read_header(blob).dtype in BIT_TYPES
    return (decode_tensor if is_bits else decode_stream)(blob, max_bytes=max_bytes)


def inspect(blob: Any) -> dict[str, Any]:
    """Return what a stream says about itself, as JSON types, without decoding it.

    Always: "codec", "dtype", "shape", "raw_bytes", "stream_bytes", "ratio" and "bits_per_value"
    (both null for an empty array). For "lowtide.sz" also "domain", "step", "chunk_elements",
    "exceptions" and "chunks", a list of what each chunk is: "shape", "kind", "stream_bytes",
    "exceptions", and the parameters of its predictor.

    Raises:
        CorruptStreamError: the stream is damaged.
    """
    header, payload = unpack_stream(blob)
    stream_bytes = header.payload_offset + header.payload_bytes
    raw_bytes = header.nbytes
    count = math.prod(header.shape)
    found: dict[str, Any] = {
        "codec": header.codec,
        "dtype": header.dtype,
        "shape": list(header.shape),
        "raw_bytes": raw_bytes,
        "stream_bytes": stream_bytes,
        "ratio": raw_bytes / stream_bytes if raw_bytes else None,
        "bits_per_value": 8 * stream_bytes / count if count else None,
    }
    if header.codec["id"] == SzCodec.codec_id:
        found |= inspect_payload(header, payload)
    return found
