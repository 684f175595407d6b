"""Data on a lattice, such as integers and counts: coded without loss where that is smaller."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowtide.compression import compress, decompress, inspect


def counts(scale: float = 1.0) -> Any:
    """Return a field of whole multiples of `scale`, smooth but for some noise."""
    x, y, z = np.meshgrid(*(np.linspace(0, 6, n) for n in (40, 50, 30)), indexing="ij")
    noise = np.random.default_rng(3).normal(size=x.shape)
    return (np.rint(40 * np.sin(x + np.cos(y)) * np.cos(z) + noise) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**-60, 2.0**60])
def test_multiples_come_back_exactly_and_make_smaller_codes_than_the_bound_asks_for(
    scale: float,
) -> None:
    values = counts(scale)
    blob = compress(values, bound=0.01 * scale)
    np.testing.assert_array_equal(decompress(blob), values)
    assert inspect(blob)["step"] == scale
    assert inspect(blob)["exceptions"] == 0
    forced = compress(values, bound=0.01 * scale, predictor="interpolation")
    assert len(blob) < 0.6 * len(forced)


def test_the_step_follows_the_finest_multiple_wherever_it_is() -> None:
    values = counts()
    values[17, 3, 5] = 7.125
    blob = compress(values, bound=0.01)
    assert inspect(blob)["step"] == 0.125
    np.testing.assert_array_equal(decompress(blob), values)


def test_one_value_off_the_lattice_brings_back_the_bound() -> None:
    values = counts()
    values[17, 3, 5] = 7.1
    blob = compress(values, bound=0.01)
    assert inspect(blob)["step"] == pytest.approx(0.02, rel=1e-3)
    assert np.abs(decompress(blob).astype(float) - values).max() <= 0.01


def test_a_wide_bound_is_made_use_of() -> None:
    blob = compress(counts(), bound=2.0)
    assert inspect(blob)["step"] == pytest.approx(4.0, rel=1e-3)


def test_fill_values_and_numbers_that_are_none_do_not_hide_the_lattice() -> None:
    values = counts()
    values[::3] = -1e34
    values[1, 2, 3] = np.nan
    blob = compress(values, bound=0.01, fill_value=-1e34)
    assert inspect(blob)["step"] == 1.0
    np.testing.assert_array_equal(decompress(blob), values)


def test_multiples_too_large_for_codes_are_coded_by_the_bound() -> None:
    values = counts() + np.float32(2.0**40)  # multiples of 2^17, at 2^23 of them
    values[0, 0, 0] = 1.0  # so many more multiples of 1
    blob = compress(values, bound=1e-3)
    assert inspect(blob)["step"] == 2e-3
    assert np.abs(decompress(blob).astype(float) - values.astype(float)).max() <= 1e-3
