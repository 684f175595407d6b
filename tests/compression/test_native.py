"""The native primitives of lowtide.sz give the reference's bytes and bits, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lowtide.compression import reference
from lowtide.core.native import native_or_none, status
from tests.compression.primitive_data import (
    CODE_KINDS,
    KINDS,
    chunk,
    codes,
    mutations,
    patchy_codes,
    steps_for,
)

EXTENTS = (1, 2, 3, 5, 8, 16, 17, 33)
DTYPES = (np.float32, np.float64)


@pytest.fixture(scope="module")
def native() -> Any:
    module = native_or_none()
    if module is None:
        pytest.skip(f"no native code: {status().reason}")
    if not hasattr(module, "compression"):
        pytest.skip("this build of the native code has no compression; install again")
    return module.compression


def random_shape(rng: np.random.Generator, most: int) -> tuple[int, ...]:
    n_axes = int(rng.integers(1, 5))
    while True:
        shape = tuple(rng.choice(EXTENTS, n_axes).tolist())
        if math.prod(shape) <= most:
            return shape if n_axes > 1 else (int(rng.integers(1, 3000)),)


def random_weights(rng: np.random.Generator, n_axes: int) -> tuple[int, ...]:
    ranges = ((1, 2), (0, 256), (0, 2))
    return tuple(rng.integers(*ranges[int(rng.integers(3))], n_axes).tolist())


def same_bits(found: NDArray[Any], expected: NDArray[Any]) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_differences_have_the_same_bits(native: Any, kind: str, dtype: type) -> None:
    rng = np.random.default_rng([1, KINDS.index(kind)])
    for _ in range(40):
        shape = random_shape(rng, 4000)
        work = chunk(kind, math.prod(shape), dtype, rng)
        step = float(rng.choice(steps_for(kind, dtype)))
        orders = tuple(rng.integers(0, 3, len(shape)).tolist())
        found = native.difference_encode(work, shape, orders, step)
        expected = reference.difference_encode(work, shape, orders, step)
        assert same_bits(found[0], expected[0])
        assert same_bits(found[1], expected[1])
        for numbers in (found[0], codes("limits", work.size, rng)):
            how = (shape, orders, step, dtype is np.float64)
            restored = native.difference_decode(numbers.copy(), *how)
            assert same_bits(restored, reference.difference_decode(numbers, *how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_interpolation_has_the_same_bits(native: Any, kind: str, dtype: type) -> None:
    rng = np.random.default_rng([2, KINDS.index(kind)])
    for i in range(60):
        shape = random_shape(rng, 4000)
        work = chunk(kind, math.prod(shape), dtype, rng)
        step = float(rng.choice(steps_for(kind, dtype)))
        alpha, beta = ((0, 0), (2, 4), (255, 255), (7, 200))[i % 4]
        how = (shape, random_weights(rng, len(shape)), bool(i % 3), alpha, beta, step)
        found = native.interpolation_encode(work, *how)
        expected = reference.interpolation_encode(work, *how)
        assert same_bits(found[0], expected[0]), how
        assert same_bits(found[1], expected[1]), how
        for numbers in (found[0], codes("limits", work.size, rng)):
            restored = native.interpolation_decode(numbers, *how, dtype is np.float64)
            wanted = reference.interpolation_decode(numbers, *how, dtype is np.float64)
            assert same_bits(restored, wanted), how


@pytest.mark.parametrize("kind", CODE_KINDS)
def test_sections_have_the_same_bytes(native: Any, kind: str) -> None:
    rng = np.random.default_rng([3, CODE_KINDS.index(kind)])
    for i in range(40):
        shape = random_shape(rng, 5000)
        weights = random_weights(rng, len(shape)) if i % 3 else None
        numbers = codes(kind, math.prod(shape), rng)
        section = native.entropy_encode(numbers, shape, weights)
        assert section == reference.entropy_encode(numbers, shape, weights), (shape, weights)
        assert same_bits(native.entropy_decode(section, shape, weights), numbers)
        assert same_bits(reference.entropy_decode(section, shape, weights), numbers)


@pytest.mark.parametrize("n_axes", [1, 2, 3, 4])
def test_sections_with_many_contexts_have_the_same_bytes(native: Any, n_axes: int) -> None:
    rng = np.random.default_rng([8, n_axes])
    shape = ((3000,), (61, 63), (13, 17, 21), (6, 7, 9, 11))[n_axes - 1]
    numbers = patchy_codes(shape, rng)
    for weights in (None, *(random_weights(rng, n_axes) for _ in range(4))):
        section = native.entropy_encode(numbers, shape, weights)
        assert section == reference.entropy_encode(numbers, shape, weights)
        assert section[0] & 7 < 5  # there are contexts
        for primitives in (native, reference):
            assert same_bits(primitives.entropy_decode(section, shape, weights), numbers)


@pytest.mark.parametrize("step", [0.3, 1e-2, 1e-4])
def test_sections_of_predicted_fields_have_the_same_bytes(native: Any, step: float) -> None:
    rng = np.random.default_rng(4)
    shape, weights = (20, 33, 41), (200, 255, 90)
    x, y, z = np.meshgrid(*(np.linspace(0, 3, extent) for extent in shape), indexing="ij")
    field = np.sin(x * y) + np.cos(y + 2 * z) + 1e-4 * rng.standard_normal(shape)
    work = field.astype(np.float32).ravel()
    numbers, _ = reference.interpolation_encode(work, shape, weights, True, 4, 4, step)
    differences, _ = reference.difference_encode(work, shape, (1, 1, 1), step)
    heads = []
    for made, scan in ((numbers, weights), (differences, None)):
        section = native.entropy_encode(made, shape, scan)
        assert section == reference.entropy_encode(made, shape, scan)
        assert same_bits(native.entropy_decode(section, shape, scan), made)
        assert native.cost_bits(made) == pytest.approx(reference.cost_bits(made), rel=1e-12)
        heads.append(section[0])
    assert heads[0] != heads[1] or step != 0.3  # not every field is merged alike


@pytest.mark.parametrize("is_relative", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_outside_finds_the_same_positions(
    native: Any, kind: str, dtype: type, is_relative: bool
) -> None:
    rng = np.random.default_rng([5, KINDS.index(kind)])
    for _ in range(10):
        n = int(rng.integers(1, 3000))
        x = chunk(kind, n, dtype, rng)
        with np.errstate(all="ignore"):
            r = x + (x * rng.choice((0.0, 0.25, 1e-3, -1e-6), n)).astype(dtype)
            r = np.where(rng.random(n) < 0.1, chunk(kind, n, dtype, rng), r)
            distance = np.abs(r.astype(np.float64) - x)
            exact = distance / np.abs(x) if is_relative else distance
        limits = [0.0, 1e-3, 0.25, 2.5, *rng.choice(exact[np.isfinite(exact)], 10).tolist()]
        limits += [math.nextafter(limit, math.inf) for limit in limits]
        for limit in limits:
            found = native.outside(x, r, limit, is_relative)
            assert same_bits(found, reference.outside(x, r, limit, is_relative)), limit


def test_exp2_has_the_same_bits(native: Any) -> None:
    rng = np.random.default_rng(6)
    y = np.concatenate(
        (
            rng.uniform(-1100, 1100, 20_000),
            rng.uniform(-1, 1, 20_000),
            np.arange(-1080.0, 1080.0, 0.5),
            [1e300, -1e300, -0.0, 5e-324, 0.49999999999999994, 2.0**31, -(2.0**31), 2.0**53 + 2],
        )
    )
    assert same_bits(native.exp2(y), reference.exp2(y))
    ends = np.array([np.nan, np.inf, -np.inf])
    assert np.isnan(native.exp2(ends)).all()  # as in the reference; which NaN is nobody's concern


@pytest.mark.parametrize("kind", CODE_KINDS)
def test_damaged_sections_are_refused_alike(native: Any, kind: str) -> None:
    rng = np.random.default_rng([7, CODE_KINDS.index(kind)])
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((1,), None),
        ((70,), None),
        ((9, 9), None),
        ((5, 3, 7), (1, 2, 3)),
        ((2, 3, 5, 4), (0, 0, 0, 1)),
    ]
    for shape, weights in shapes:
        numbers = codes(kind, math.prod(shape), rng)
        section = reference.entropy_encode(numbers, shape, weights)
        for damaged in mutations(section, 140, rng):
            results = []
            for primitives in (native, reference):
                try:
                    results.append(primitives.entropy_decode(damaged, shape, weights).tolist())
                except ValueError as error:
                    results.append(str(error)[:6])
            assert results[0] == results[1], damaged.hex()
            assert results[0] == "codes:" or len(results[0]) == numbers.size


# Each breaks one rule that bytes from an encoder keep, and could be read all the same.
LENIENT = {
    "a state below the limit": "05 01 8020 01000000 01000000 00000100 0000",
    "a context without a table": "05 00 01000000 01100000 00000100 0000",
    "a last frequency of 0": "05 02 8020 00 00000000 00000100 00000100",
    "a frequency written too long": "05 02 8000 8020 00000000 00000100 00000100",
}


@pytest.mark.parametrize("rule", LENIENT)
def test_sections_no_encoder_writes_are_refused_by_both(native: Any, rule: str) -> None:
    section = bytes.fromhex(LENIENT[rule])
    for primitives in (native, reference):
        with pytest.raises(ValueError, match="codes: "):
            primitives.entropy_decode(section, (1,), None)


def test_native_refuses_what_the_reference_refuses(native: Any) -> None:
    work, numbers = np.zeros(6, np.float32), np.zeros(6, np.int32)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("difference_encode", (work, (), (), 1.0)),
        ("difference_encode", (work, (1, 1, 1, 1, 6), (0,) * 5, 1.0)),
        ("difference_encode", (work, (6, 0), (0, 0), 1.0)),
        ("difference_encode", (work, (2, 3), (1,), 1.0)),
        ("difference_encode", (work, (2, 3), (1, 3), 1.0)),
        ("difference_encode", (work, (2, 3), (1, 1), 0.0)),
        ("difference_encode", (work, (2, 3), (1, 1), 1e-310)),
        ("difference_encode", (work, (2, 2), (1, 1), 1.0)),
        ("difference_decode", (numbers, (2, 3), (1, 1), math.nan, False)),
        ("interpolation_encode", (work, (2, 3), (1,), True, 0, 0, 1.0)),
        ("interpolation_encode", (work, (2, 3), (1, 256), True, 0, 0, 1.0)),
        ("interpolation_decode", (numbers, (6,), (1,), True, 0, 256, 1.0, True)),
        ("interpolation_decode", (numbers, (6,), (1,), True, 0, 0, math.inf, True)),
        ("entropy_encode", (numbers, (2, 3), (-1, 1))),
        ("entropy_encode", (numbers, (7,), None)),
        ("entropy_decode", (b"", (2, 3), (1, 1, 1))),
        ("entropy_decode", (b"", (6,), None)),
        ("outside", (work, work[:5], 1.0, False)),
    ]
    for name, arguments in calls:
        for primitives in (native, reference):
            with pytest.raises(ValueError, match=r"shape|orders|step|weights|codes|work|beta|rest"):
                getattr(primitives, name)(*arguments)
