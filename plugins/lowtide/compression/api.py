"""Arrays to streams and back, in one call each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.compression.sz import SzCodec, inspect_payload
from lowtide.core.codec import Codec, decode_stream, decode_tensor, get_codec
from lowtide.core.errors import CodecError
from lowtide.core.stream import BIT_TYPES, read_header, unpack_stream

if TYPE_CHECKING:
    from lowtide.compression.learned.model import Model


def compress(
    x: Any, codec: str | Mapping[str, Any] | Codec = "lowtide.sz", **parameters: Any
) -> bytes:
    """Return `x` as a self-describing stream.

    Args:
        x: numpy array, torch tensor in host memory, or bytes-like object; of any layout.
        codec: Name or configuration of a registered codec, or a codec.
        parameters: Of the codec; see `SzCodec` for those of "lowtide.sz", which needs ``bound``,
            and `AeszCodec` for those of "lowtide.aesz", which needs ``model`` too.

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


def decompress(
    blob: Any, *, max_bytes: int | None = None, models: Iterable[str | Path | Model] = ()
) -> Any:
    """Return the array in a stream of any codec: numpy, or torch where numpy lacks the dtype.

    Args:
        blob: The stream, bytes-like.
        max_bytes: Refuse streams that decode to more. Set it for streams of strangers.
        models: Files of models, or loaded ones, for streams of "lowtide.aesz". A stream names its
            model by SHA-256; those that were registered with `register_model`, or lie in the folder
            LOWTIDE_MODELS, are found too.

    Raises:
        CorruptStreamError: the stream is damaged, or larger than `max_bytes`.
        MissingModelError: the stream's model is not at hand.
        UnknownNameError: its codec is not registered here.
    """
    is_bits = read_header(blob).dtype in BIT_TYPES
    decode = decode_tensor if is_bits else decode_stream
    given = tuple(models)
    if not given:
        return decode(blob, max_bytes=max_bytes)
    from lowtide.compression.learned.library import given_models

    with given_models(given):
        return decode(blob, max_bytes=max_bytes)


def register_model(model: str | Path | Model) -> Model:
    """Keep a model for all streams of "lowtide.aesz" that this process decodes, and return it.

    Args:
        model: A file that `lowtide train-codec` made, or a loaded one.

    Raises:
        CodecError: the file is not there, or is no model.
    """
    from lowtide.compression.learned.library import register_model as register

    return register(model)


def inspect(blob: Any) -> dict[str, Any]:
    """Return what a stream says about itself, as JSON types, without decoding it.

    Always: "codec", "dtype", "shape", "raw_bytes", "stream_bytes", "ratio" and "bits_per_value"
    (both null for an empty array). For "lowtide.sz" also "domain", "step", "chunk_elements",
    "exceptions" and "chunks", a list of what each chunk is: "shape", "kind", "stream_bytes",
    "exceptions", and the parameters of its predictor. For "lowtide.aesz" also "model": its
    "sha256" and, if it is at hand, "stored_bytes" and "ratio_with_model", the ratio if this were
    the only array that the model is kept for; else null.

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
    elif header.codec["id"] == "lowtide.aesz":
        from lowtide.compression.aesz import inspect_learned

        found |= inspect_learned(header, payload)
    return found
