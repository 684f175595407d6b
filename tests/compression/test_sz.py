"""What ``lowtide.sz`` promises for values: the bound in exact arithmetic, and what is exact."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from lowtide.compression import coding, compress, decompress, inspect
from lowtide.compression.bounds import rounded_down
from lowtide.compression.elements import element_type
from lowtide.compression.sz import SzCodec
from lowtide.core.codec import Bound, get_codec
from lowtide.core.errors import CodecError, ConfigError
from tests.helpers.codec_suite import assert_bound, bits, exact

DTYPES = ("float16", "bfloat16", "float32", "float64")
SHAPES = [(), (1,), (2,), (97,), (1, 1), (6, 17), (33, 3), (5, 1, 7, 4), (4, 5, 6), (2, 3, 2, 3, 5)]
# One value of each type to stand for "no value".
FILLS = {"float16": -6e4, "bfloat16": -1e34, "float32": -1e34, "float64": -1e34}
LARGEST = {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38, "float64": 1.7e308}
SMALLEST = {"float16": 6e-8, "bfloat16": 9.2e-41, "float32": 1.4e-45, "float64": 5e-324}


def typed(values: np.ndarray, dtype: str) -> Any:
    """Return float64 values as an array, or as a tensor where numpy lacks the type."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.array(values)).bfloat16()
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype)


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    axes = [np.linspace(0, 3 + axis, n) for axis, n in enumerate(shape)]
    total = sum(np.ix_(*[np.sin(a + rng.random()) for a in axes]), start=np.zeros(shape))
    return np.asarray(total + 1e-3 * rng.normal(size=shape))


def data(kind: str, dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    rng = np.random.default_rng(seed)
    x = smooth(rng, shape)
    odd = rng.random(shape) < 0.2
    if kind == "noise":
        x = rng.normal(size=shape)
    elif kind == "NaN and infinities":
        x = np.where(odd, rng.choice([np.nan, -np.nan, np.inf, -np.inf], size=shape), x)
    elif kind == "only NaN":
        x = np.full(shape, np.nan)
    elif kind == "denormal":
        x = np.round(x * 40) * SMALLEST[dtype]
    elif kind == "huge":
        x = x / max(1e-9, np.abs(x).max(initial=0)) * LARGEST[dtype]
    elif kind == "mixed exponents":
        x = rng.normal(size=shape) * 10.0 ** rng.integers(-7, 5, size=shape)
    elif kind == "offset":
        x = 1e7 + x if dtype != "float16" else 3e4 + x
    elif kind == "constant":
        x = np.full(shape, 3.7)
    elif kind == "zeros":
        x = np.where(rng.random(shape) < 0.5, rng.choice([0.0, -0.0], size=shape), x)
    elif kind == "fill":
        x = np.where(rng.random(shape) < 0.5, FILLS[dtype], x)
    return typed(x, dtype)


KINDS = ["smooth", "noise", "NaN and infinities", "only NaN", "denormal", "huge", "mixed exponents",
         "offset", "constant", "zeros", "fill"]  # fmt: skip


def assert_kept(x: Any, y: Any, dtype: str, mode: str, bound: float, fill: float | None) -> None:
    """Assert the bound for what is finite and no fill value, and the bits of all else."""
    values = exact(x, dtype)
    ordinary = np.isfinite(values)
    if fill is not None:
        ordinary &= values != exact(typed(np.array([fill]), dtype), dtype)[0]
    size = bits(x).size // max(1, values.size)
    before, after = (bits(side).reshape(-1, size) for side in (x, y))
    np.testing.assert_array_equal(after[~ordinary], before[~ordinary])
    kept = Bound(mode, bound) if bound else Bound("lossless")
    assert_bound(values[ordinary], exact(y, dtype)[ordinary], "float64", kept)


@pytest.mark.parametrize("may_be_lossless", [False, True])
@pytest.mark.parametrize("mode", ["abs", "rel", "pw_rel"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_whatever_the_data(
    kind: str, mode: str, may_be_lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not may_be_lossless:  # which small arrays would often be
        monkeypatch.setattr(coding, "_WORTH_COMPARING", math.inf)
    turns = itertools.cycle(SHAPES)
    for dtype, bound, _ in itertools.product(DTYPES, (1e-1, 1e-3, 1e-6), range(2)):
        shape = next(turns)
        x = data(kind, dtype, shape, seed=len(shape))
        fill = FILLS[dtype] if kind == "fill" else None
        unit = LARGEST[dtype] if kind == "huge" and mode == "abs" else 1.0
        unit = 40 * SMALLEST[dtype] if kind == "denormal" and mode == "abs" else unit
        codec = SzCodec(mode, bound=bound * unit, fill_value=fill)
        y = decompress(codec.encode(x))
        assert tuple(y.shape) == shape
        assert_kept(x, y, dtype, mode, bound * unit, fill)


def test_a_fill_value_amid_the_data_stays_exact() -> None:
    rng = np.random.default_rng(0)
    for mode in ("abs", "rel", "pw_rel"):
        x = (1 + 0.01 * rng.normal(size=5000)).astype(np.float32)
        x[::5] = 1.0
        y = decompress(compress(x, mode=mode, bound=0.05, fill_value=1.0))
        assert (y[::5] == 1).all()
        assert np.count_nonzero(y == x) < 1500


@pytest.mark.parametrize("predictor", ["auto", "differences", "interpolation"])
@pytest.mark.parametrize("chunk_elements", [1, 7, 64, 1000])
def test_the_bound_holds_in_chunks_of_any_size(predictor: str, chunk_elements: int) -> None:
    for shape in ((9, 8, 11), (200,), (3, 2, 2, 5, 6)):
        x = data("smooth", "float32", shape, seed=3)
        blob = compress(x, bound=1e-2, predictor=predictor, chunk_elements=chunk_elements)
        assert_kept(x, decompress(blob), "float32", "abs", 1e-2, None)
        assert len(inspect(blob)["chunks"]) >= x.size / chunk_elements


def test_large_chunks_are_sampled_and_keep_the_bound() -> None:
    rng = np.random.default_rng(0)
    for shape in ((90_001,), (300, 271), (41, 47, 53), (9, 8, 37, 33)):
        for mode, bound in (("abs", 1e-3), ("pw_rel", 1e-3)):
            x = (2 + smooth(rng, shape)).astype(np.float32)
            y = decompress(compress(x, mode=mode, bound=bound))
            error = np.abs(y.astype(np.float64) - x)
            assert (
                error <= bound * (np.abs(x.astype(np.float64)) if mode == "pw_rel" else 1)
            ).all()


def test_a_relative_bound_is_that_of_all_the_array_without_fill_values() -> None:
    x = np.linspace(0, 1, 4000).reshape(40, 100)
    x[7:9] = 1e20
    blob = compress(x, mode="rel", bound=1e-2, fill_value=1e20, chunk_elements=500)
    found = inspect(blob)
    assert 0.019 < found["step"] < 0.0201
    assert len(found["chunks"]) == 8
    y = decompress(blob)
    assert (y[7:9] == 1e20).all()
    assert 1e-3 < np.abs(y - x).max() <= 0.01
    with_fill = decompress(compress(x, mode="rel", bound=1e-2))
    assert np.abs(with_fill - x)[:7].max() > 0.1  # the trap that fill_value is for


@pytest.mark.parametrize("value", ["0.1", "0.30000000000000004", "1e-320", "3e-324", "5e-324"])
def test_limits_are_rounded_towards_zero(value: str) -> None:
    wanted = Fraction(value)
    found = rounded_down(wanted)
    assert Fraction(found) <= wanted < Fraction(float(np.nextafter(found, np.inf)))
    assert rounded_down(Fraction(10) ** 400) == np.finfo(np.float64).max


def test_float64_from_end_to_end_has_a_range() -> None:
    x = np.array([-1.7e308, 1.7e308, 0.0, 1e300] * 20)
    y = decompress(compress(x, mode="rel", bound=0.25))
    assert_kept(x, y, "float64", "rel", 0.25, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["noise", "any bits"])
def test_what_cannot_be_compressed_costs_at_most_a_hundredth(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    width = element_type(dtype).dtype.itemsize
    if kind == "noise":
        x = typed(rng.normal(size=30_000), dtype)
    else:
        raw = rng.integers(0, 256, 30_000 * width, dtype=np.uint8)
        x = torch.from_numpy(raw).view(getattr(torch, dtype))
        x = x if dtype == "bfloat16" else x.numpy()
    for mode, bound in itertools.product(("abs", "rel", "pw_rel"), (0, 1e-300, 1e-30, 1e-9)):
        blob = compress(x, mode=mode, bound=bound)
        assert len(blob) <= 1.01 * 30_000 * width + 200
        assert_kept(x, decompress(blob), dtype, mode, bound, None) if bound == 1e-9 else None


def test_the_same_bytes_with_any_number_of_threads() -> None:
    x = data("fill", "float32", (40, 30, 20), seed=5)
    blobs, arrays = [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codec = SzCodec("rel", bound=1e-3, fill_value=-1e34, chunk_elements=2000)
            blobs.append(codec.encode(x))
            arrays.append(decompress(blobs[-1]).tobytes())
    finally:
        torch.set_num_threads(before)
    assert blobs[0] == blobs[1]
    assert arrays[0] == arrays[1]


def test_flushing_denormal_numbers_changes_nothing() -> None:
    x = data("denormal", "float32", (30, 20), seed=2)
    codec = SzCodec("rel", bound=1e-2)
    wanted = codec.encode(x)
    assert {chunk["kind"] for chunk in inspect(wanted)["chunks"]} != {"lossless"}
    restored = decompress(wanted).tobytes()
    assert torch.set_flush_denormal(True)
    try:
        assert codec.encode(x) == wanted
        assert decompress(wanted).tobytes() == restored
    finally:
        torch.set_flush_denormal(False)
    assert_kept(x, decompress(wanted), "float32", "rel", 1e-2, None)


def test_the_choice_is_about_as_good_as_the_better_predictor() -> None:
    rng = np.random.default_rng(4)
    fields = [
        smooth(rng, (64, 60, 50)),
        rng.normal(size=(300, 400)),
        np.cumsum(rng.normal(size=100_000)),
        np.repeat(rng.normal(size=200), 1000).reshape(200, 1000),
    ]
    for x, bound in itertools.product(fields, (3e-2, 1e-4)):
        sizes = {
            name: len(compress(x, mode="rel", bound=bound, predictor=name))
            for name in ("auto", "differences", "interpolation")
        }
        best = min(sizes["differences"], sizes["interpolation"])
        assert sizes["auto"] <= 1.06 * best + 60, sizes
    assert inspect(compress(fields[0], bound=1e-2))["chunks"][0]["kind"] == "interpolation"
    assert inspect(compress(fields[1], bound=1e-4))["chunks"][0]["kind"] == "differences"


def test_repetitions_are_lossless_where_that_is_smaller() -> None:
    x = np.tile(np.random.default_rng(0).normal(size=1000), 80).astype(np.float32)
    found = inspect(compress(x, bound=1e-3))
    assert found["chunks"][0]["kind"] == "lossless"
    assert found["ratio"] > 15


def test_bfloat16_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    near = typed(rng.normal(size=4000) * 10.0 ** rng.integers(-40, 38, 4000), "bfloat16").double()
    there = near.numpy()
    # Ties between neighbours, and the next float64 on both sides of them.
    up = torch.from_numpy(there).bfloat16().view(torch.int16).add(1).view(torch.bfloat16).double()
    ties = (there + up.numpy()) / 2
    values = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), there])
    values = np.concatenate([values, [0.0, -0.0, 1e308, -1e308, 5e-324]])
    element = element_type("bfloat16")
    found = element.widen(element.narrow(values))
    for value, got in zip(values.tolist(), found.tolist(), strict=True):
        if not np.isfinite(got):
            assert abs(value) > 3.38e38
            continue
        pattern = int(np.float32(got).view(np.uint32)) >> 16
        around = [pattern + d for d in (-1, 1) if 0 <= (pattern & 0x7FFF) + d < 0x7F80]
        others = np.array(around, np.uint32) << 16
        error = abs(Fraction(got) - Fraction(value))
        for other, other_pattern in zip(others.view(np.float32).tolist(), around, strict=True):
            other_error = abs(Fraction(other) - Fraction(value))
            assert error < other_error or (error == other_error and other_pattern % 2)


# ---- configuration


def test_a_configuration_is_numbers_and_gives_the_bound() -> None:
    codec = get_codec({"id": "lowtide.sz", "mode": "rel", "bound": 1})
    assert codec.get_config() == {
        "id": "lowtide.sz", "mode": "rel", "bound": 1.0, "predictor": "auto", "goal": "size",
        "fill_value": None, "chunk_elements": 4 << 20, "level": 3,
    }  # fmt: skip
    assert isinstance(codec.get_config()["bound"], float)
    assert codec.bound == Bound("rel", 1.0)
    assert SzCodec(bound=0).bound == Bound("lossless")
    assert SzCodec("pw_rel", bound=np.float32(0.5)).bound == Bound("pw_rel", 0.5)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({}, "bound is missing; give"),
        ({"bound": -1e-3}, "bound -0.001, allowed are 0 and more"),
        ({"bound": float("nan")}, "bound nan, allowed are finite"),
        ({"bound": float("inf")}, "bound inf"),
        ({"bound": "1e-3"}, "bound '1e-3'"),
        ({"bound": True}, "bound True"),
        ({"bound": 10**400}, "bound 1000"),
        ({"bound": 1, "mode": "pwrel"}, 'mode \'pwrel\'.*Did you mean "pw_rel".*Known: "abs"'),
        ({"bound": 1, "mode": ["abs"]}, "mode"),
        ({"bound": 1, "predictor": "lorenzo"}, "predictor 'lorenzo'.*\"differences\""),
        ({"bound": 1, "fill_value": float("nan")}, "fill_value nan.*come back exactly"),
        ({"bound": 1, "chunk_elements": 0}, "chunk_elements 0, allowed are 1 to 67108864"),
        ({"bound": 1, "chunk_elements": 1e6}, "chunk_elements"),
        ({"bound": 1, "chunk_elements": True}, "chunk_elements"),
        ({"bound": 1, "level": 23}, "level 23, allowed are 1 to 22"),
        ({"bound": 1, "levle": 3}, "levle"),
    ],
)
def test_parameters_are_checked(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        get_codec({"id": "lowtide.sz", **parameters})


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_other_types_are_told_which_codec_takes_them(dtype: str) -> None:
    with pytest.raises(CodecError, match=f"elements are {dtype}.*lowtide.zstd"):
        compress(np.zeros(3, dtype), bound=1)
    with pytest.raises(CodecError, match=r"float8_e5m2.*lowtide\.zstd"):
        compress(torch.zeros(3).to(torch.float8_e5m2), bound=1)
