"""What every codec has to pass. Derive a test class and say which codec, dtypes and promises:

    class TestMyCodec(CodecSuite):
        codec = get_codec({"id": "lowtide.mine", "bound": 1e-3})
        dtypes = ("float32", "float64")

The bound is taken from the codec itself and checked in exact arithmetic. Lossy codecs must keep
infinities and the position of NaNs; what else they keep is declared.
"""

from __future__ import annotations

import array
import json
import random
import struct
import threading
import tracemalloc
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowtide.core.codec import Bound, Codec, decode_stream, decode_tensor, get_codec, read_header
from lowtide.core.errors import CorruptStreamError
from lowtide.core.native import crc32c

ALL_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    *("complex64", "complex128"),
)
SHAPES = [(), (0,), (1,), (3, 0, 2), (1021,), (16, 24), (5, 7, 11), (2, 1, 3, 4, 5)]
SPECIAL = {  # IEEE bits: quiet and signalling NaNs with payloads, infinities, -0, denormals, limits
    "float16": "7e01 fe55 7d01 7c00 fc00 8000 0001 03ff 7bff 3c00",
    "bfloat16": "7fc1 ffd5 7f81 7f80 ff80 8000 0001 007f 7f7f 3f80",
    "float32": "7fc00001 ffd55555 7f800001 7f800000 ff800000 80000000 00000001 007fffff 7f7fffff",
    "float64": "7ff8000000000001 fff5555555555555 7ff0000000000000 fff0000000000000 "
    "8000000000000000 0000000000000001 000fffffffffffff 7fefffffffffffff",
}
CORRUPTION = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
)


def sample(dtype: str, shape: tuple[int, ...], *, seed: int = 0) -> Any:
    """Return a smooth random array, a tensor for types that numpy lacks."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=int))
    smooth = np.cumsum(rng.normal(size=count)).reshape(shape)
    if dtype.startswith(("bfloat", "float8")):
        return torch.from_numpy(np.asarray(smooth)).to(getattr(torch, dtype))
    if dtype == "bool":
        return np.asarray(smooth > 0)
    if dtype.startswith("complex"):
        return np.asarray(smooth * (1 + 0.5j)).astype(dtype)
    if dtype.startswith("float"):
        return np.asarray(smooth).astype(dtype)
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
    return np.asarray(values)


def bits(values: Any) -> np.ndarray:
    """Return the bytes of an array or tensor in C order."""
    if isinstance(values, torch.Tensor):
        flat = values.detach().clone().reshape(-1)
        return flat.view(torch.uint8).numpy() if len(flat) else np.empty(0, np.uint8)
    little = np.asarray(values, dtype=values.dtype.newbyteorder("<"), order="C")
    return little.reshape(-1).view(np.uint8)


def exact(values: Any, dtype: str) -> np.ndarray:
    """Return floating-point values without rounding, flat: float64 holds all but integers."""
    if isinstance(values, torch.Tensor):
        return values.double().reshape(-1).numpy()
    if dtype.startswith(("bfloat", "float8")):  # decoded bits
        return exact(torch.from_numpy(np.array(values)).view(getattr(torch, dtype)), dtype)
    if dtype.startswith("complex"):
        return np.ascontiguousarray(values).reshape(-1).view(np.float64 if "128" in dtype else "f4")
    return np.asarray(values).reshape(-1)


def assert_bound(original: Any, decoded: Any, dtype: str, bound: Bound) -> None:
    """Assert that `decoded` is as near to `original` as the bound says, in exact arithmetic."""
    if bound.kind == "lossless":
        np.testing.assert_array_equal(bits(decoded), bits(original))
        return
    x, y = exact(original, dtype), exact(decoded, dtype)
    assert x.shape == y.shape
    finite = np.isfinite(x)
    np.testing.assert_array_equal(y[~finite], x[~finite])  # NaN equals NaN here
    if bound.kind == "none":
        return
    xs, ys = ([Fraction(each.item()) for each in values[finite]] for values in (x, y))
    scale = Fraction(bound.value)
    if bound.kind == "rel":
        scale *= max(xs, default=Fraction(0)) - min(xs, default=Fraction(0))
    for number, (a, b) in enumerate(zip(xs, ys, strict=True)):
        limit = scale * abs(a) if bound.kind == "pw_rel" else scale
        assert abs(b - a) <= limit, (
            f"finite element {number} of {dtype}: {float(a)!r} came back as {float(b)!r}, "
            f"off by {float(abs(b - a))!r}, allowed {float(limit)!r} ({bound})"
        )


def forge(stream: bytes, *, payload: bytes | None = None, **changes: Any) -> bytes:
    """Return `stream` with other header fields or payload and checksums that hold."""
    header = read_header(stream)
    body = stream[header.payload_offset :] if payload is None else payload
    fields = json.loads(stream[16 : header.payload_offset])
    fields |= {"payload_bytes": len(body), "payload_crc32c": crc32c(body)} | changes
    text = json.dumps(fields).encode()
    start = struct.pack("<4sHHI", b"LTC1", 1, 0, len(text))
    return start + struct.pack("<I", crc32c(text, crc32c(start))) + text + body


class CodecSuite:
    """See the top of the file."""

    codec: ClassVar[Codec]
    dtypes: ClassVar[tuple[str, ...]] = ALL_DTYPES
    keeps_nan_payload: ClassVar[bool] = True
    keeps_negative_zero: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", metafunc.cls.dtypes)
        if "special" in metafunc.fixturenames:
            metafunc.parametrize("special", [d for d in metafunc.cls.dtypes if d in SPECIAL])

    def stream(self) -> bytes:
        return self.codec.encode(sample(self.dtypes[-1], (9, 5)))

    def bound_for(self, values: Any) -> Bound:
        """Return the promise for these values; override where it depends on the dtype."""
        return self.codec.bound

    @pytest.mark.parametrize("shape", SHAPES)
    def test_round_trip_keeps_shape_dtype_and_bound(self, dtype: str, shape: Any) -> None:
        values = sample(dtype, shape)
        stream = self.codec.encode(values)
        decoded = self.codec.decode(stream)
        assert isinstance(stream, bytes)
        assert decoded.shape == shape
        assert decoded.flags.writeable
        header = read_header(stream)
        assert (header.dtype, header.shape) == (dtype, shape)
        assert header.nbytes == bits(values).size == decoded.nbytes
        if isinstance(values, np.ndarray):
            assert decoded.dtype == values.dtype
        assert_bound(values, decoded, dtype, self.bound_for(values))

    def test_layout_of_the_input_does_not_matter(self, dtype: str) -> None:
        values = sample(dtype, (6, 7, 8))
        layouts = [values[::2, :, 1::3], values.swapaxes(0, 2), values[1]]
        if isinstance(values, np.ndarray):
            layouts += [np.asfortranarray(values), values[::-1, ::-1]]
            layouts.append(values.astype(values.dtype.newbyteorder(">")))
        for layout in layouts:
            decoded = self.codec.decode(self.codec.encode(layout))
            assert decoded.shape == tuple(layout.shape)
            assert_bound(layout, decoded, dtype, self.bound_for(layout))

    def test_encoding_does_not_touch_its_input(self, dtype: str) -> None:
        values = sample(dtype, (33, 3))
        before = bits(values).copy()
        if isinstance(values, np.ndarray):
            values.flags.writeable = False
        self.codec.encode(values)
        np.testing.assert_array_equal(bits(values), before)

    def test_special_values_survive(self, special: str) -> None:
        raw = np.array([int(word, 16) for word in SPECIAL[special].split()])
        raw = raw.astype(f"uint{8 * bits(sample(special, (1,))).size}")
        padded = np.concatenate([raw, np.full(23, raw[-1]), raw[::-1]])
        is_torch = special == "bfloat16"
        values = torch.from_numpy(padded).view(torch.bfloat16) if is_torch else padded.view(special)
        decoded = self.codec.decode(self.codec.encode(values))
        assert_bound(values, decoded, special, self.bound_for(values))
        got = decoded.view(padded.dtype)
        if self.keeps_nan_payload:
            is_nan = np.isnan(exact(values, special))
            np.testing.assert_array_equal(got[is_nan], padded[is_nan])
        if self.keeps_negative_zero:
            is_zero = exact(values, special) == 0
            np.testing.assert_array_equal(got[is_zero], padded[is_zero])

    def test_bytes_like_inputs_and_streams(self) -> None:
        if "uint8" in self.dtypes:
            raw = bytes(range(256)) * 3
            for kind in (bytes, bytearray, memoryview, lambda x: memoryview(x)[::2]):
                decoded = self.codec.decode(self.codec.encode(kind(raw)))
                np.testing.assert_array_equal(decoded, np.asarray(memoryview(kind(raw))))
        if "float64" in self.dtypes:
            given_values = array.array("d", [1.5, -2.5, 4.0])
            decoded = self.codec.decode(self.codec.encode(given_values))
            assert_bound(np.array(given_values), decoded, "float64", self.bound_for(given_values))
        stream = self.stream()
        expected = bits(self.codec.decode(stream))
        as_numpy = np.frombuffer(stream, np.uint8)
        as_torch = torch.tensor(list(stream), dtype=torch.uint8)
        for form in (bytearray(stream), memoryview(stream), as_numpy, as_torch):
            np.testing.assert_array_equal(bits(self.codec.decode(form)), expected)

    def test_tensors_go_in_and_come_out(self, dtype: str) -> None:
        values = sample(dtype, (12, 5))
        tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
        if tensor.is_floating_point() and tensor.element_size() > 1:
            tensor = tensor.requires_grad_()
        stream = self.codec.encode(tensor.t())
        decoded = decode_tensor(stream)
        assert decoded.dtype == tensor.dtype
        assert decoded.shape == (5, 12)
        assert_bound(tensor.detach().t(), decoded, dtype, self.bound_for(values))

    @pytest.mark.parametrize("shape", [(12, 5), (), (0,)])
    def test_out_is_filled_and_returned(self, dtype: str, shape: Any) -> None:
        stream = self.codec.encode(sample(dtype, shape))
        expected = self.codec.decode(stream)
        for out in (np.empty_like(expected), bytearray(expected.nbytes)):
            assert self.codec.decode(stream, out) is out
            np.testing.assert_array_equal(np.frombuffer(out, np.uint8), bits(expected))
        tensor = torch.empty_like(decode_tensor(stream))
        assert decode_stream(stream, out=tensor) is tensor
        np.testing.assert_array_equal(bits(tensor), bits(expected))

    @pytest.mark.parametrize("problem", ["small", "large", "dtype", "strided", "read-only", "big"])
    def test_out_that_does_not_fit_is_refused(self, problem: str) -> None:
        stream = self.stream()
        right = self.codec.decode(stream)
        read_only = np.empty_like(right)
        read_only.flags.writeable = False
        other = np.dtype("M8[us]") if right.itemsize == 8 else np.dtype(f"V{right.itemsize}")
        outs = {
            "small": np.empty((8, 5), right.dtype),
            "large": bytearray(right.nbytes + 1),
            "dtype": np.empty(right.shape, other),
            "strided": np.empty((9, 10), right.dtype)[:, ::2],
            "read-only": read_only,
            "big": np.empty(right.shape, right.dtype.newbyteorder(">")),
        }
        if problem == "big" and right.itemsize == 1:
            pytest.skip("one byte has no order")
        with pytest.raises(ValueError, match=r"^out "):
            self.codec.decode(stream, outs[problem])

    def test_configuration_goes_through_json(self) -> None:
        config = json.loads(json.dumps(self.codec.get_config()))
        assert config["id"] == self.codec.codec_id
        for twin in (get_codec(config), type(self.codec).from_config(config)):
            assert twin == self.codec
            assert hash(twin) == hash(self.codec)
            assert type(twin) is type(self.codec)
        assert read_header(self.stream()).codec == config

    def test_repr_makes_the_codec_again(self) -> None:
        name = type(self.codec).__name__
        assert eval(repr(self.codec), {name: type(self.codec)}) == self.codec

    def test_the_stream_alone_is_enough_to_decode(self) -> None:
        stream = self.stream()
        np.testing.assert_array_equal(bits(decode_stream(stream)), bits(self.codec.decode(stream)))

    def test_four_threads_may_share_a_codec(self) -> None:
        values = [sample(self.dtypes[-1], (64, 64), seed=seed) for seed in range(4)]
        expected = [self.codec.encode(each) for each in values]
        wrong: list[int] = []

        def work(number: int) -> None:
            for _ in range(5):
                stream = self.codec.encode(values[number])
                if stream != expected[number]:
                    wrong.append(number)
                decoded = self.codec.decode(stream)
                assert_bound(
                    values[number], decoded, self.dtypes[-1], self.bound_for(values[number])
                )
            finished.append(number)

        finished: list[int] = []
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert wrong == []
        assert sorted(finished) == [0, 1, 2, 3]

    @CORRUPTION
    @given(st.data())
    def test_any_flipped_bit_is_noticed(self, data: st.DataObject) -> None:
        stream = bytearray(self.stream())
        place = data.draw(st.integers(0, 8 * len(stream) - 1))
        stream[place // 8] ^= 1 << place % 8
        with pytest.raises(CorruptStreamError):
            decode_stream(stream)

    def test_every_truncation_and_extension_is_noticed(self) -> None:
        stream = self.stream()
        for length in range(len(stream)):
            with pytest.raises(CorruptStreamError):
                decode_stream(stream[:length])
        with pytest.raises(CorruptStreamError, match="followed by"):
            decode_stream(stream + b"\0")

    @CORRUPTION
    @given(st.randoms(use_true_random=False), st.booleans())
    def test_a_forged_payload_is_decoded_or_refused(
        self, rng: random.Random, is_resized: bool
    ) -> None:
        stream = self.stream()
        header = read_header(stream)
        payload = bytearray(stream[header.payload_offset :])
        for _ in range(rng.randint(1, 6)):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        if is_resized:
            payload = payload[: rng.randrange(len(payload))] + rng.randbytes(rng.randrange(9))
        forged = forge(stream, payload=bytes(payload))
        try:
            decoded = self.codec.decode(forged)
        except CorruptStreamError:
            return
        assert (decoded.shape, decoded.nbytes) == (header.shape, header.nbytes)

    @pytest.mark.parametrize(
        "changes",
        [
            {"shape": [1 << 40]},
            {"shape": [1 << 31, 1 << 31, 1 << 31]},
            {"shape": [1 << 200]},
            {"shape": [10]},
            {"shape": [9, 5, 2]},
            {"shape": [-9, -5]},
            {"shape": [9.0, 5]},
            {"shape": [True, 45]},
            {"shape": "95"},
            {"shape": None},
            {"shape": [1] * 33},
            {"dtype": "object"},
            {"dtype": ["float32"]},
            {"dtype": "float32, object"},
            {"codec": {}},
            {"codec": None},
            {"codec": []},
            {"codec": {"id": 3}},
            {"payload_bytes": 1 << 62},
            {"payload_bytes": "12"},
            {"payload_crc32c": None},
        ],
        ids=str,
    )
    def test_a_lying_header_is_refused_without_a_large_allocation(self, changes: Any) -> None:
        forged = forge(self.stream(), **changes)
        tracemalloc.start()
        try:
            with pytest.raises(CorruptStreamError):
                decode_stream(forged)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 8 << 20

    def test_streams_may_be_limited_in_size(self) -> None:
        stream = self.stream()
        size = read_header(stream).nbytes
        assert decode_stream(stream, max_bytes=size).nbytes == size
        with pytest.raises(CorruptStreamError, match=f"decodes to {size} bytes.*{size - 1}"):
            decode_stream(stream, max_bytes=size - 1)
