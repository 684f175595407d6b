"""The codec contract, its container, and the lossless codec of the core."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from lowtide.core import codec as codec_module
from lowtide.core.codec import (
    ArrayData,
    Bound,
    Codec,
    CodecError,
    StreamHeader,
    ZstdCodec,
    codecs,
    decode_stream,
    decode_tensor,
    get_codec,
    pack_stream,
    read_header,
    unpack_stream,
)
from lowtide.core.errors import (
    ConfigError,
    CorruptStreamError,
    LowtideError,
    UnknownNameError,
)
from lowtide.core.native import crc32c
from tests.helpers.codec_suite import CodecSuite, assert_bound, forge, sample

# Written by format version 1. Every later release must read it.
GOLDEN = bytes.fromhex(
    "4c544331010000007800000064bf74f47b22636f646563223a7b226964223a226c6f77746964652e7a73746422"
    "2c226c6576656c223a337d2c226474797065223a22666c6f61743332222c227061796c6f61645f627974657322"
    "3a32392c227061796c6f61645f637263333263223a333539333131393730342c227368617065223a5b322c335d"
    "7d28b52ffd2018a50000700000c000008050003fc0007f408001001bc002"
)
GOLDEN_VALUES = np.array([[1.5, -2.0, 0.0], [np.inf, 3.25, -0.0]], np.float32)


class TestZstdCodec(CodecSuite):
    codec = ZstdCodec(level=5)


class RoundingCodec(Codec):
    """The smallest lossy codec: proof that the suite serves those as well."""

    codec_id = "test.rounding"

    def __init__(self, digits: int = 2) -> None:
        self.digits = digits

    @property
    def bound(self) -> Bound:
        return Bound("abs", 0.5000001 * 10.0**-self.digits)

    def _encode(self, data: ArrayData) -> bytes:
        with np.errstate(all="ignore"):
            rounded = np.round(data.values, self.digits)
            off = np.abs(rounded - data.values.astype(np.longdouble))
        is_off = ~(off <= self.bound.value)
        return bytes(np.where(is_off, data.values, rounded).tobytes())

    def _decode(self, header: StreamHeader, payload: memoryview) -> Any:
        if len(payload) != header.nbytes:
            raise CorruptStreamError(f"{len(payload)} bytes for {header.nbytes}")
        return np.frombuffer(payload, header.dtype).copy()


class TestRoundingCodec(CodecSuite):
    codec = RoundingCodec(3)
    dtypes = ("float32", "float64")
    keeps_negative_zero = True

    @pytest.fixture(autouse=True)
    def _registered(self) -> Any:
        codecs.register("test.rounding", RoundingCodec)
        yield
        codecs.unregister("test.rounding")


@pytest.mark.parametrize(
    ("bound", "off", "is_within"),
    [
        (Bound("abs", 0.25), 0.25, True),
        (Bound("abs", 0.25), np.nextafter(0.25, 1), False),
        (Bound("rel", 0.0625), 0.25, True),  # range 4
        (Bound("rel", 0.0625), np.nextafter(0.25, 1), False),
        (Bound("pw_rel", 0.125), 0.25, True),  # the value is 2
        (Bound("pw_rel", 0.125), 0.2500001, False),
        (Bound("none"), 1e9, True),
        (Bound("lossless"), 0.0, True),
        (Bound("lossless"), 1e-12, False),
    ],
)
def test_the_suite_checks_bounds_to_the_last_bit(bound: Bound, off: Any, is_within: bool) -> None:
    values, decoded = np.array([2.0, 0.0, 4.0, np.inf]), np.array([2.0, 0.0, 4.0, np.inf])
    decoded[1 if bound.kind in ("abs", "rel") else 0] += off  # 0 + off is exact
    if is_within:
        assert_bound(values, decoded, "float64", bound)
    else:
        with pytest.raises(AssertionError):
            assert_bound(values, decoded, "float64", bound)


def test_the_suite_sees_a_lost_infinity() -> None:
    with pytest.raises(AssertionError):
        assert_bound(np.array([np.inf]), np.array([1e308]), "float64", Bound("abs", 1e308))


def test_streams_of_the_first_release_are_read_for_ever() -> None:
    decoded = decode_stream(GOLDEN)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == GOLDEN_VALUES.tobytes()
    assert read_header(GOLDEN).codec == {"id": "lowtide.zstd", "level": 3}


def test_byte_planes_help_smooth_floats() -> None:
    values = np.cumsum(np.random.default_rng(0).normal(size=1 << 16)).astype(np.float32)
    plain = len(zstandard.ZstdCompressor(level=3).compress(values.tobytes()))
    assert len(ZstdCodec().encode(values)) < 0.95 * plain


def test_a_header_can_be_read_before_the_payload_has_arrived() -> None:
    stream = ZstdCodec().encode(np.zeros((3, 4), np.float16))
    header = read_header(stream)
    assert read_header(stream[: header.payload_offset]) == header
    assert header.nbytes == 24
    assert len(stream) == header.payload_offset + header.payload_bytes
    with pytest.raises(CorruptStreamError, match="truncated"):
        unpack_stream(stream[:-1])


def reseal(start: bytes, header: bytes, payload: bytes = b"") -> bytes:
    return start + struct.pack("<I", crc32c(header, crc32c(start))) + header + payload


@pytest.mark.parametrize(
    ("stream", "text"),
    [
        (b"", "has 0 bytes, a header needs 16"),
        (b"PK\3\4" + bytes(40), "begins with b'PK"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 2, 0, 2), b"{}"), "version 2 .*newer Lowtide"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 1, 2), b"{}"), "flags 1"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 0, 1 << 31), b"{}"), "claims a header of 2147"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 0, 2), b"{}"), "makes no sense"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 0, 2), b"[]"), "makes no sense"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 0, 2), b"\xff\xff"), "makes no sense"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 0, 60000), b"[" * 60000), "makes no sense"),
        (reseal(struct.pack("<4sHHI", b"LTC1", 1, 0, 9000), b"1" * 9000), "makes no sense"),
    ],
)
def test_what_is_no_stream_is_named(stream: bytes, text: str) -> None:
    with pytest.raises(CorruptStreamError, match=text):
        read_header(stream)


def test_a_zstd_frame_cannot_ask_for_memory() -> None:
    honest = ZstdCodec().encode(np.zeros(64, np.uint8))
    # A frame header that claims 2**40 bytes, and a container that agrees with it.
    frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\1\0\0"
    assert zstandard.get_frame_parameters(frame).content_size == 1 << 40
    with pytest.raises(CorruptStreamError, match="claim to hold 1099511627776"):
        decode_stream(forge(honest, payload=frame, shape=[1 << 40]))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64))
    with pytest.raises(CorruptStreamError, match="the header says 64"):
        decode_stream(forge(honest, payload=unsized))
    frame = zstandard.ZstdCompressor().compress(bytes(64))
    with pytest.raises(CorruptStreamError, match="damaged payload"):
        decode_stream(forge(honest, payload=frame + b"x"))


def test_the_densest_honest_stream_is_within_the_ratio_limit() -> None:
    values = np.zeros(64 << 20, np.uint8)
    for level in (1, 3, 22):
        stream = ZstdCodec(level).encode(values)
        assert decode_stream(stream).nbytes == values.nbytes


def test_bfloat16_comes_back_as_bits_or_as_a_tensor() -> None:
    tensor = sample("bfloat16", (4, 5))
    stream = ZstdCodec().encode(tensor)
    assert ZstdCodec().decode(stream).dtype == np.uint16
    assert torch.equal(decode_tensor(stream), tensor)
    assert read_header(stream).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.array(["a"]), "cannot encode elements of <U1; supported: .*bfloat16"),
        (np.array([object()]), "elements of object"),
        (np.zeros(2, np.longdouble), "elements of"),
        (np.zeros(2, "M8[s]"), "elements of datetime64"),
        (np.ma.masked_array([1.0], [True]), "mask would be lost"),
        ([1.0, 2.0], "cannot encode a list"),
        (3.0, "cannot encode a float"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, device="meta"), "on meta"),
        (torch.zeros(2, dtype=torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
    ],
)
def test_what_cannot_be_encoded_is_named(value: Any, text: str) -> None:
    with pytest.raises(CodecError, match=text):
        ZstdCodec().encode(value)


def test_a_damaged_stream_leaves_out_alone() -> None:
    stream = bytearray(ZstdCodec().encode(np.arange(8)))
    stream[-1] ^= 1
    out = np.full(8, 7)
    with pytest.raises(CorruptStreamError, match="payload does not match its checksum"):
        decode_stream(stream, out)
    assert (out == 7).all()


def test_get_codec_takes_names_configurations_and_codecs() -> None:
    codec = ZstdCodec(9)
    assert get_codec(codec) is codec
    assert get_codec("lowtide.zstd") == ZstdCodec(3)
    assert get_codec({"id": "lowtide.zstd", "level": 9}) == codec != ZstdCodec(3)
    assert "lowtide.zstd" in codecs.names()
    with pytest.raises(UnknownNameError, match=r'codec "lowtide.zst"\. Did you mean "lowtide.zstd'):
        get_codec("lowtide.zst")
    with pytest.raises(ConfigError, match='"id" must name a codec'):
        get_codec({"level": 3})
    with pytest.raises(ConfigError, match=r"lowtide.zstd.*\{'levle': 3\}.*levle"):
        get_codec({"id": "lowtide.zstd", "levle": 3})
    with pytest.raises(ConfigError, match="level 99, allowed are 1 to 22"):
        get_codec({"id": "lowtide.zstd", "level": 99})


@pytest.mark.parametrize("level", [0, 23, 2.5, "3", True, None])
def test_zstd_levels_are_checked(level: Any) -> None:
    with pytest.raises(CodecError, match="allowed are 1 to 22"):
        ZstdCodec(level)


def test_streams_of_other_codecs_are_told_apart() -> None:
    stream = forge(ZstdCodec().encode(b"abc"), codec={"id": "lowtide.future"})
    with pytest.raises(UnknownNameError, match=r"lowtide\.future"):
        decode_stream(stream)
    with pytest.raises(CodecError, match=r'written by "lowtide.future".*decode_stream\(\)'):
        ZstdCodec().decode(stream)
    stream = forge(ZstdCodec().encode(b"abc"), codec={"id": "lowtide.zstd", "level": -1})
    with pytest.raises(CorruptStreamError, match="impossible codec configuration"):
        decode_stream(stream)


def test_only_codecs_can_be_registered() -> None:
    codecs.register("test.wrong", "json:JSONDecoder")
    try:
        with pytest.raises(LowtideError, match="not a subclass"):
            get_codec("test.wrong")
    finally:
        codecs.unregister("test.wrong")


def test_configurations_that_are_not_json_are_refused_when_packing() -> None:
    for value, text in ((object(), "is not JSON"), (float("nan"), "is not JSON")):
        with pytest.raises(CodecError, match=text):
            pack_stream({"id": "x", "value": value}, "uint8", (0,), b"")
    with pytest.raises(CodecError, match="allowed are 65536"):
        pack_stream({"id": "x", "value": "y" * 70000}, "uint8", (0,), b"")


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("absolute", 1.0, 'bound kind "absolute"'),
        ("abs", -1.0, "finite and not negative"),
        ("abs", float("nan"), "finite and not negative"),
        ("abs", float("inf"), "finite and not negative"),
    ],
)
def test_bounds_are_checked(kind: str, value: float, text: str) -> None:
    with pytest.raises(CodecError, match=text):
        Bound(kind, value)


def test_headers_are_canonical() -> None:
    stream = ZstdCodec().encode(np.zeros(2, np.uint8))
    header = read_header(stream)
    text = stream[16 : header.payload_offset].decode()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert codec_module.ZstdCodec().encode(np.zeros(2, np.uint8)) == stream
