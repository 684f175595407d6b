"""Differences with predictions in between come back, by native code and by the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowtide.compression import reference
from lowtide.compression.primitives import primitives

BOTH = {"reference": reference, "here": primitives()}


def cases() -> list[Any]:
    rng = np.random.default_rng(1)
    found = []
    for number in range(120):
        shape = tuple(rng.integers(1, 8, rng.integers(1, 5)).tolist())
        orders = tuple(rng.integers(0, 3, len(shape)).tolist())
        count = int(np.prod(shape))
        reach = 2**31 if number % 2 else 9
        numbers = rng.integers(-reach, reach, count).astype(np.int32)
        predicted = rng.integers(-(2**31), 2**31, count).astype(np.int32)
        mask = (rng.random(count) < rng.choice([0.0, 0.1, 0.5, 1.0])).astype(np.uint8)
        found.append((shape, orders, numbers, predicted, mask * np.uint8(1 + number % 3)))
    return found


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("is_double", [False, True])
def test_codes_of_both_kinds_come_back(name: str, is_double: bool) -> None:
    for shape, orders, numbers, predicted, mask in cases():
        codes = numbers.reshape(shape)
        for axis, order in enumerate(orders):
            for _ in range(order):
                codes = np.diff(codes, axis=axis, prepend=np.int32(0))
        with np.errstate(over="ignore"):
            codes = np.where(mask, numbers - predicted, codes.reshape(-1)).astype(np.int32)
        restored = BOTH[name].mixed_decode(codes, predicted, mask, shape, orders, 0.3, is_double)
        expected = (numbers * 0.3).astype(np.float64 if is_double else np.float32)
        assert restored.dtype == expected.dtype
        assert restored.tobytes() == expected.tobytes(), (shape, orders)


@pytest.mark.parametrize("name", BOTH)
def test_what_does_not_fit_is_refused(name: str) -> None:
    six, mask = np.zeros(6, np.int32), np.zeros(6, np.uint8)
    for codes, predicted, flags, shape, orders, step in (
        (six, six, mask, (2, 4), (1, 1), 1.0),
        (six, six[:5], mask, (2, 3), (1, 1), 1.0),
        (six, six, mask[:5], (2, 3), (1, 1), 1.0),
        (six, six, mask, (2, 3), (1,), 1.0),
        (six, six, mask, (2, 3), (1, 3), 1.0),
        (six, six, mask, (2, 3), (1, 1), 0.0),
    ):
        with pytest.raises(ValueError, match=r"codes|predicted|orders|step"):
            BOTH[name].mixed_decode(codes.copy(), predicted, flags, shape, orders, step, False)
