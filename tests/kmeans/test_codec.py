"""The codec ``lowtide.pq``: what every codec passes, and how well it does on what has structure."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from lowtide.core.codec import decode_stream, get_codec, read_header
from lowtide.core.errors import CodecError, ConfigError, CorruptStreamError
from tests.helpers.codec_suite import CodecSuite, forge


class TestPq(CodecSuite):
    codec = get_codec({"id": "lowtide.pq", "n_clusters": 16, "sub_dim": 4, "max_iter": 5})
    dtypes = ("float16", "bfloat16", "float32", "float64")
    keeps_negative_zero = False


class TestPqWithWideCodes(CodecSuite):
    codec = get_codec({"id": "lowtide.pq", "n_clusters": 300, "sub_dim": 1, "max_iter": 2})
    dtypes = ("float32",)
    keeps_negative_zero = False


def blobs(count: int, width: int, kinds: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(kinds, width))
    drawn = centres[rng.integers(kinds, size=count)]
    return (drawn + noise * rng.normal(size=drawn.shape)).astype(np.float32)


def test_vectors_of_few_kinds_come_back_but_for_their_noise() -> None:
    values = blobs(20000, 8, 64, 0.01)
    codec = get_codec({"id": "lowtide.pq", "n_clusters": 128})
    stream = codec.encode(values)
    error = float(np.sqrt(np.mean((codec.decode(stream) - values) ** 2)))
    assert error < 0.0105  # the noise itself
    assert values.nbytes / len(stream) > 25  # 32 at one byte for 8 values, less the codebook


def test_more_entries_lose_less() -> None:
    values = np.random.default_rng(1).normal(size=(4096, 8)).astype(np.float32)
    errors = []
    for entries in (4, 16, 64, 256):
        codec = get_codec({"id": "lowtide.pq", "n_clusters": entries})
        errors.append(float(np.square(codec.decode(codec.encode(values)) - values).mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6  # of a variance of 1, at one bit per value


def test_the_same_array_gives_the_same_bytes() -> None:
    values = np.random.default_rng(2).normal(size=3000).astype(np.float64)
    codec = get_codec("lowtide.pq")
    assert codec.encode(values) == codec.encode(values.copy())
    other = get_codec({"id": "lowtide.pq", "seed": 1})
    assert other.encode(values) != codec.encode(values)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"n_clusters": 0}, "n_clusters 0, allowed are 1 to 65536"),
        ({"n_clusters": 65537}, "n_clusters 65537"),
        ({"sub_dim": 0}, "sub_dim 0, allowed are 1 to 4096"),
        ({"sub_dim": True}, "sub_dim True"),
        ({"max_iter": 1.5}, "max_iter 1.5"),
        ({"seed": -1}, "seed -1, allowed are 0"),
        ({"clusters": 3}, "clusters"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises((CodecError, ConfigError), match=expected):
        get_codec({"id": "lowtide.pq", **options})


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(CodecError, match="elements of int32, allowed are"):
        get_codec("lowtide.pq").encode(np.arange(3, dtype=np.int32))


HEAD = struct.Struct("<IIQQ")


@pytest.mark.parametrize(
    "head",
    [
        (65537, 8, 10, 1),  # more entries than codes can name
        (0, 8, 10, 1),
        (16, 0, 10, 1),
        (16, 5000, 10, 1),
        (16, 8, 1 << 60, 1),
        (16, 8, 10, 1 << 60),
        (16, 8, 10, 0),
    ],
)
def test_lies_of_the_payload_are_found(head: tuple[int, int, int, int]) -> None:
    values = np.random.default_rng(3).normal(size=100).astype(np.float32)
    values[7] = np.nan
    stream = get_codec({"id": "lowtide.pq", "n_clusters": 16}).encode(values)
    payload = stream[read_header(stream).payload_offset :]
    with pytest.raises(CorruptStreamError):
        decode_stream(forge(stream, payload=HEAD.pack(*head) + payload[HEAD.size :]))


def test_a_code_without_an_entry_is_found() -> None:
    values = np.random.default_rng(4).normal(size=(64, 2)).astype(np.float32)
    stream = get_codec({"id": "lowtide.pq", "n_clusters": 16, "sub_dim": 2}).encode(values)
    payload = bytearray(stream[read_header(stream).payload_offset :])
    entries, width, code_bytes, specials = HEAD.unpack(payload[: HEAD.size])
    head = HEAD.pack(entries - 1, width, code_bytes, specials)  # one entry less, codes as before
    shorter = head + payload[HEAD.size + width * 4 :]
    with pytest.raises(CorruptStreamError, match="a code of 15, there are 15 entries"):
        decode_stream(forge(stream, payload=bytes(shorter)))
