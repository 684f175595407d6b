"""What `goal="psnr"` is for: fewer bits at the same mean error, the bound kept all the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from lowtide.compression import compress, decompress, inspect
from lowtide.core.errors import CodecError, ConfigError

BOUNDS = (0.08, 0.056, 0.04, 0.028, 0.02, 0.014, 0.01)


@pytest.fixture(scope="module")
def rough() -> NDArray[np.float32]:
    """Return a surface like terrain: sums of random waves, amplitudes falling with frequency."""
    rng = np.random.default_rng(5)
    k = np.fft.fftfreq(320) * 320
    half = np.fft.rfftfreq(320) * 320
    radius = np.hypot(k[:, None], half[None, :])
    radius[0, 0] = 1.0
    waves = np.fft.rfft2(rng.normal(size=(320, 320))) * radius**-2.0
    surface = np.fft.irfft2(waves, s=(320, 320))
    return np.asarray(surface / np.ptp(surface), dtype=np.float32)


def curve(values: NDArray[np.float32], goal: str) -> tuple[list[float], list[float]]:
    """Return PSNR in dB and logarithm of the bits per value at each bound, rising PSNR."""
    psnr, bits = [], []
    for bound in BOUNDS:
        blob = compress(values, bound=bound, goal=goal)
        error = decompress(blob).astype(np.float64) - values
        assert np.abs(error).max() <= bound
        psnr.append(-10 * math.log10(np.mean(error**2)))
        bits.append(math.log(8 * len(blob) / values.size))
    return psnr, bits


def test_the_same_psnr_takes_fewer_bits(rough: NDArray[np.float32]) -> None:
    psnr, bits = curve(rough, "size")
    other_psnr, other_bits = curve(rough, "psnr")
    inside = [i for i, p in enumerate(psnr) if other_psnr[0] <= p <= other_psnr[-1]]
    assert len(inside) >= 3
    there = np.interp([psnr[i] for i in inside], other_psnr, other_bits)
    assert np.mean(there - [bits[i] for i in inside]) < math.log(0.95)


def test_the_same_bound_takes_no_more_bits_with_goal_size(rough: NDArray[np.float32]) -> None:
    sizes = [len(compress(rough, bound=0.02, goal=goal)) for goal in ("size", "psnr")]
    assert sizes[0] < sizes[1]


def test_finer_coarse_levels_are_what_it_chooses(rough: NDArray[np.float32]) -> None:
    (chunk,) = inspect(compress(rough, bound=0.005, goal="psnr"))["chunks"]
    assert chunk["kind"] == "interpolation"
    assert chunk["alpha"] > 1
    (chunk,) = inspect(compress(rough, bound=0.005))["chunks"]
    assert chunk["alpha"] == 1


@pytest.mark.parametrize("kind", ["constant", "noise", "short"])
def test_data_without_anything_to_gain_keep_their_bound(kind: str) -> None:
    noise = np.random.default_rng(1).normal(size=(9, 40, 300)).astype(np.float32)
    values = {"constant": np.full((70, 80), 3.0, np.float32), "noise": noise, "short": noise[0, 0]}
    decoded = decompress(compress(values[kind], bound=0.01, goal="psnr"))
    assert np.abs(decoded.astype(np.float64) - values[kind]).max() <= 0.01


@pytest.mark.parametrize("goal", ["size", "psnr"])
@pytest.mark.parametrize(("scale", "bound"), [(1e200, 1e190), (1e-305, 4e-309), (1e-200, 1e-203)])
def test_very_large_and_very_small_numbers_keep_their_bound(
    scale: float, bound: float, goal: str
) -> None:
    values = np.random.default_rng(2).normal(size=(40, 50)) * scale
    decoded = decompress(compress(values, bound=bound, goal=goal))
    assert (np.abs(decoded - values) <= bound).all()


@pytest.mark.parametrize("goal", ["size", "psnr"])
def test_values_whose_sums_overflow_in_one_row_keep_their_bound(goal: str) -> None:
    values = np.random.default_rng(2).normal(size=(64, 64)).astype(np.float32)
    values[0] = np.finfo(np.float32).min  # as files without a fill value mark what is missing
    decoded = decompress(compress(values, bound=1e-3, goal=goal))
    assert (np.abs(decoded.astype(np.float64) - values) <= 1e-3).all()


def test_an_unknown_goal_names_the_known_ones() -> None:
    with pytest.raises((CodecError, ConfigError), match=r"goal 'pnsr'.*psnr"):
        compress(np.zeros(3, np.float32), bound=1.0, goal="pnsr")
