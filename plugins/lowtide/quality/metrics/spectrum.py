"""Power spectra in radial bins, original against reconstruction.

The last up to three axes longer than 1 are transformed, cells taken to be cubes; power is averaged
over the axes before. One transform at a time is held in memory: 24 bytes for each element of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.quality.metrics.pair import PIECE, Floats, Pair
from lowtide.quality.metrics.registry import ERROR, Metric, Score, undefined

EMPTY = 1e-12  # of the fullest bin; less power than that is rounding


def spectral_error(pair: Pair, _: float) -> Score:
    """Mean over the radial bins from 1 to the Nyquist frequency of abs(ln(Py / Px)).

    Bins in which the original has less than `EMPTY` of the fullest bin's power are skipped and
    counted, and the reconstruction's power is taken to be at least that.
    """
    shape = tuple(length for length in pair.shape if length > 1)[-3:]
    if not shape or max(shape) < 4:
        return undefined(f"shape {pair.shape} has no frequencies")
    if pair.has_left_out:
        return undefined("not all values are finite")
    if pair.extremes.low == pair.extremes.high:
        return undefined("the original is constant")
    bins = radial_bins(shape)
    before, after = _power(pair, shape, bins, 0), _power(pair, shape, bins, 1)
    least = EMPTY * float(before.max())
    is_used = before >= least
    used = int(np.count_nonzero(is_used))
    ratios = np.log(np.maximum(after[is_used], least) / before[is_used])
    notes = {"bins_used": used, "bins_skipped": len(before) - used}
    return Score(float(np.abs(ratios).mean()), notes)


def radial_bins(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the bin of each element of a real transform; 0 is the mean.

    A bin is one cycle over the longest axis wide. Frequencies above Nyquist's, which only corners
    have, are in a bin of their own that is the last.
    """
    longest = max(shape)
    squares: Floats = np.zeros((1,) * len(shape))
    for axis, length in enumerate(shape):
        is_last = axis == len(shape) - 1
        one = np.fft.rfftfreq(length) if is_last else np.fft.fftfreq(length)
        along = [1] * len(shape)
        along[axis] = len(one)
        squares = squares + ((one * longest) ** 2).reshape(along)
    return np.minimum(np.rint(np.sqrt(squares)), longest // 2 + 1).astype(np.int64)


def _power(pair: Pair, shape: tuple[int, ...], bins: NDArray[np.int64], which: int) -> Floats:
    """Return the mean power of each bin from 1 to Nyquist's, of one of the two arrays."""
    size, nyquist = math.prod(shape), max(shape) // 2
    # Of a real transform each column but the first, and the last of an even length, stands for two.
    weights = np.full(bins.shape, 2.0)
    weights[..., 0] = 1.0
    if shape[-1] % 2 == 0:
        weights[..., -1] = 1.0
    flat = bins.reshape(-1)
    sizes = np.bincount(flat, weights.reshape(-1), minlength=nyquist + 2)
    totals = np.zeros(nyquist + 2)
    several = max(1, PIECE // size)
    axes = tuple(range(1, len(shape) + 1))
    for begin in range(0, pair.size, several * size):
        values = pair.raw(begin, min(begin + several * size, pair.size))[which]
        values -= pair.center
        values /= pair.unit
        transform: NDArray[Any] = np.fft.rfftn(values.reshape(-1, *shape), axes=axes)
        power = (np.square(transform.real) + np.square(transform.imag)).sum(axis=0) * weights
        totals += np.bincount(flat, power.reshape(-1), minlength=nyquist + 2)
    # Every bin up to Nyquist's has an element: the longest axis alone gives it one.
    return totals[1:-1] / sizes[1:-1]


METRICS = (
    Metric(
        "spectral_error", "mean over radial bins 1 to Nyquist of abs(ln(Py / Px)), bins below "
        f"{EMPTY:g} of the fullest skipped", "lower", spectral_error, ERROR,
    ),
)  # fmt: skip
