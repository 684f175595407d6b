"""Chunks, codes and damaged sections for the tests of the primitives, from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("smooth", "noise", "constant", "huge", "denormal", "special", "steps")
CODE_KINDS = ("zeros", "small", "geometric", "wide", "limits")


def chunk(kind: str, n: int, dtype: type, rng: np.random.Generator) -> NDArray[Any]:
    """Return n working values of one kind."""
    noise = rng.standard_normal(n)
    info = np.finfo(dtype)
    if kind == "smooth":
        values = np.sin(np.arange(n) / 5.0) + 1e-3 * noise
    elif kind == "noise":
        values = noise
    elif kind == "constant":
        values = np.full(n, noise[0])
    elif kind == "huge":  # sums of four, and products with 9, overflow
        values = float(info.max) * rng.uniform(-1, 1, n).astype(dtype).astype(np.float64)
        values[rng.random(n) < 0.1] = float(info.max)  # half of these restore to infinity
    elif kind == "denormal":
        values = float(info.smallest_normal) * rng.uniform(-1, 1, n)
    elif kind == "special":
        values = noise * 10.0 ** rng.integers(-30, 30, n)
        values[rng.random(n) < 0.2] = np.nan
        values[rng.random(n) < 0.1] = np.inf
        values[rng.random(n) < 0.1] = -0.0
    elif kind == "steps":  # multiples of a power of two, so that rounding meets ties
        values = rng.integers(-40, 40, n) / 16
    else:
        raise AssertionError(kind)
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def steps_for(kind: str, dtype: type) -> tuple[float, ...]:
    """Return steps that make many, few and too large codes."""
    info = np.finfo(dtype)
    if kind == "huge":
        return (float(info.max) / 100, float(info.max) / 2**31, 1.0)
    if kind == "denormal":
        least = max(float(info.smallest_subnormal) * 3, 6e-309)  # the inverse must be finite
        return (least, float(info.smallest_normal) / 2, 1.0)
    return (0.125, 1e-3, 1e-11)


def codes(kind: str, n: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Return n codes of one kind."""
    if kind == "zeros":
        return np.zeros(n, np.int32)
    if kind == "small":
        return rng.integers(-2, 3, n).astype(np.int32)
    if kind == "geometric":
        return (rng.geometric(0.1, n) * rng.choice((-1, 1), n)).astype(np.int32)
    if kind == "wide":  # each bit length as often as another: all tokens
        length = rng.integers(0, 32, n)
        return (rng.integers(-(2**31), 2**31, n) >> length).astype(np.int32)
    if kind == "limits":
        ends = [-(2**31), 2**31 - 1, -(2**30), 2**30, 2**30 - 1, 7, 8, -8, 511, 512, 0]
        return rng.choice(np.array(ends), n).astype(np.int32)
    raise AssertionError(kind)


def patchy_codes(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int32]:
    """Return codes whose size depends on the place and the pass: many contexts pay."""
    places = np.indices(shape)
    along = sum(axis / extent for axis, extent in zip(places, shape, strict=True)) / len(shape)
    odd = (places % 2).sum(axis=0)  # on level 1, the number of axes in S
    sizes = 2.0 ** np.floor(6 * along) * (1 + odd + odd**2)
    sizes = np.where(odd == 0, 3 * sizes * (rng.random(shape) < 0.5), sizes)
    return (sizes * rng.choice((-1, 1), shape)).astype(np.int32).ravel()


def mutations(section: bytes, count: int, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield damaged forms of a section: cut, longer, some bytes changed or gone, all random."""
    for i in range(count):
        damaged = bytearray(section)
        at = int(rng.integers(len(section)))
        match i % 7:
            case 0:
                del damaged[at:]
            case 1:
                damaged += rng.bytes(int(rng.integers(1, 9)))
            case 2:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 3:
                for place in rng.integers(len(section), size=int(rng.integers(1, 6))):
                    damaged[place] = int(rng.integers(256))
            case 4:
                del damaged[at : at + int(rng.integers(1, 5))]
            case 5:
                damaged = bytearray(rng.bytes(len(section)))
                damaged[0] = int(rng.choice((0, 1, 2, 5, 8, 9, 10, 13, damaged[0])))
            case 6:  # the words' number and the states
                where = _start_of_lengths(section)
                damaged[where : where + 12] = rng.bytes(12)
        yield bytes(damaged)


def _start_of_lengths(section: bytes) -> int:
    at = 1
    for _ in range((6 if section[0] & 8 else 1) * ((21 >> (section[0] & 7)) + 1)):
        n_tokens, at = section[at], at + 1
        for _ in range(n_tokens):
            at += 2 if section[at] & 128 else 1
    return at
