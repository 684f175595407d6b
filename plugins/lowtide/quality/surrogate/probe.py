"""What quantisation within a bound does to blocks, at a fixed series of bounds.

A codec of this family predicts each value, quantises what it missed, and codes the steps. This does
so to a few blocks in two ways, differences of quantised values (Lorenzo) and interpolation level by
level from values as a decoder has them, at every bound of `NODES` at once. What it counts does not
depend on the codec or the bound that somebody asks about later, only on the array.

After: Jin et al. (2022) and SECRE (Khan et al., 2023), who run such stages on samples; SZ3's
interpolation (Zhao et al., 2021).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]
Floats = NDArray[np.float64]
Cut = tuple[Any, ...]

# Bounds in units of the range, half a decade apart.
NODES: Floats = np.power(10.0, -0.5 * np.arange(1, 13), dtype=np.float64)
NAMES = (
    "interpolation_bits", "interpolation_zeros", "interpolation_run_bits", "interpolation_mse",
    "interpolation_dssim", "interpolation_autocorrelation", "lorenzo_bits", "lorenzo_zeros",
    "lorenzo_run_bits", "lorenzo_mse", "lorenzo_dssim", "lorenzo_autocorrelation", "plane_bits",
    "plane_zeros",
)  # fmt: skip
MOST = 8  # blocks: half of those that the rest looks at
_COARSEST = 32  # stride of the first level of interpolation
_LEAST_BITS = 1e-3
_WINDOW = 8  # of local variances: blocks of so many elements along each axis
_C2 = 0.03**2  # of SSIM, in units of the range


def probed(values: Singles) -> Floats:
    """Return what is counted at each of `NODES`.

    Args:
        values: float32, shape (blocks, *block), in units of the range.

    Returns:
        float64, shape (len(NODES), len(NAMES)): for both ways, log2 of the entropy of the steps,
        their share of zeros, log2 of the bits if runs of zeros are coded, log10 of the mean square
        error, log10 of what SSIM lacks to 1, and the error's lag-1 autocorrelation along the last
        axis; then bits above the bound and share of coefficients below it, of a block transform.
    """
    step = max(1, len(values) // MOST)
    chosen = values[::step][:MOST]
    variances = _local(chosen, squared=False)
    found = np.empty((len(NODES), len(NAMES)))
    for first, (errors, codes) in ((0, _interpolated(chosen)), (6, _differences(chosen))):
        found[:, first : first + 3] = _code_statistics(codes)
        found[:, first + 3 : first + 6] = _error_statistics(errors, variances)
    found[:, 12:] = _planes(chosen)
    return found


def at_bound(table: Floats, relative: float) -> Floats:
    """Return the row of `probed` at a bound relative to the range, between nodes on a line."""
    place = -2.0 * np.log10(relative) - 1.0
    place = min(max(place, 0.0), len(NODES) - 1.0)
    low = min(int(place), len(NODES) - 2)
    share = place - low
    return np.asarray(table[low] * (1 - share) + table[low + 1] * share)


# -- the two ways -----------------------------------------------------------------------------


def _steps(rank: int) -> Singles:
    return np.asarray(2 * NODES, np.float32).reshape((-1,) + (1,) * (rank + 1))


def _differences(x: Singles) -> tuple[Singles, Singles]:
    """Return errors and steps, shape (nodes, blocks, *block); steps lack each first element."""
    step = _steps(x.ndim - 1)
    lattice = np.rint(x / step)
    errors = lattice * step
    errors -= x
    for axis in range(2, lattice.ndim):
        lattice = np.diff(lattice, axis=axis)
    return errors, lattice


def _interpolated(x: Singles) -> tuple[Singles, Singles]:
    """Return errors and steps, shape (nodes, blocks, *block)."""
    rank = x.ndim - 1
    step = _steps(rank)
    inverse = 1 / step
    decoded = np.empty((len(NODES), *x.shape), np.float32)
    codes = np.zeros_like(decoded)
    anchors: Cut = (Ellipsis, *(slice(None, None, 2 * _COARSEST),) * rank)
    decoded[anchors] = x[anchors]
    stride = _COARSEST
    while stride:
        for axis in range(rank):
            cut: list[Any] = [
                slice(None, None, stride if other < axis else 2 * stride) for other in range(rank)
            ]
            known, wanted = list(cut), list(cut)
            known[axis], wanted[axis] = (
                slice(None, None, 2 * stride),
                slice(stride, None, 2 * stride),
            )
            here: Cut = (Ellipsis, *wanted)
            originals = np.moveaxis(x[here], axis + 1, -1)
            if not originals.size:
                continue
            near: Cut = (Ellipsis, *known)
            neighbours = np.moveaxis(decoded[near], axis + 2, -1)
            guess = _cubic(neighbours, originals.shape[-1])
            code = originals - guess
            code *= inverse
            np.rint(code, out=code)
            np.moveaxis(codes[here], axis + 2, -1)[...] = code
            code *= step
            code += guess
            np.moveaxis(decoded[here], axis + 2, -1)[...] = code
        stride //= 2
    decoded -= x
    return decoded, codes


def _cubic(known: Singles, count: int) -> Singles:
    """Return values in the middle between neighbours along the last axis, `count` of them."""
    between = min(count, known.shape[-1] - 1)
    guess = np.empty((*known.shape[:-1], count), np.float32)
    inner = guess[..., :between]
    np.add(known[..., :between], known[..., 1 : between + 1], out=inner)
    inner *= np.float32(0.5)
    if between >= 3:
        inner[..., 1:-1] *= np.float32(1.125)
        inner[..., 1:-1] -= np.float32(1 / 16) * (
            known[..., : between - 2] + known[..., 3 : between + 1]
        )
    guess[..., between:] = known[..., -1:]
    return guess


# -- what is counted --------------------------------------------------------------------------


def _bins() -> tuple[NDArray[np.int16], Floats]:
    """Return the bin of each step from -32768 on, and log2 of how many steps each bin holds."""
    steps = np.arange(-32768, 32768)
    size = np.abs(steps)
    # One bin each up to 64, then four to an octave.
    place = np.where(size < 64, size, 64 + (4 * np.log2(np.maximum(size, 64) / 64)).astype(int))
    bins = np.sign(steps) * place
    bins -= bins.min()
    return bins.astype(np.int16), np.log2(np.bincount(bins))


_BIN, _WIDTHS = _bins()


def _code_statistics(codes: Singles) -> Floats:
    """Return log2 of the entropy, share of zeros, and log2 of the bits with runs of zeros."""
    found = np.empty((len(codes), 3))
    np.clip(codes, -32768, 32767, out=codes)
    for row, each in zip(found, codes, strict=True):
        whole = each.astype(np.int32)
        counts = np.bincount(_BIN[whole.reshape(-1) + 32768], minlength=len(_WIDTHS))
        shares = counts / counts.sum()
        used = shares > 0
        bits = float((shares[used] * (_WIDTHS[used] - np.log2(shares[used]))).sum())
        is_zero = whole == 0
        zeros = float(is_zero.mean())
        both = float((is_zero[..., 1:] & is_zero[..., :-1]).mean())
        entering = min(max(1 - zeros, 0.0), max(zeros - both, 0.0))
        flags = _flag_bits(zeros, entering)
        runs = flags + max(0.0, bits - _entropy(zeros))
        row[:] = np.log2(bits + _LEAST_BITS), zeros, np.log2(runs + _LEAST_BITS)
    return found


def _entropy(share: float) -> float:
    parts = [part for part in (share, 1 - share) if part > 0]
    return -sum(part * float(np.log2(part)) for part in parts)


def _flag_bits(zeros: float, changing: float) -> float:
    """Return bits of "is this step zero", each told from the one before it."""
    bits = 0.0
    for share in (zeros, 1 - zeros):
        if share > 0:
            bits += share * _entropy(min(1.0, changing / share))
    return bits


def _error_statistics(errors: Singles, variances: Singles) -> Floats:
    """Return log10 of the mean square, log10 of what SSIM lacks, and lag-1 autocorrelation."""
    flat = errors.reshape(len(errors), -1, errors.shape[-1])
    squares = np.einsum("nij,nij->n", flat, flat) / flat[0].size
    products = np.einsum("nij,nij->n", flat[:, :, 1:], flat[:, :, :-1]) / flat[0, :, 1:].size
    local = np.stack([_local(each, squared=True) for each in errors])
    lacks = (local / (2 * variances + local + _C2)).reshape(len(errors), -1).mean(axis=1)
    found = np.empty((len(errors), 3))
    found[:, 0] = np.log10(squares + 1e-20)
    found[:, 1] = np.log10(lacks + 1e-12)
    found[:, 2] = products / (squares + 1e-20)
    return found


def _local(x: Singles, *, squared: bool) -> Singles:
    """Return mean squares, or variances, of windows of `_WINDOW` along each axis."""
    whole: Cut = (slice(None), *(slice(0, n - n % min(_WINDOW, n)) for n in x.shape[1:]))
    cut = x[whole]
    split: list[int] = [len(x)]
    for length in cut.shape[1:]:
        split += [length // min(_WINDOW, length), min(_WINDOW, length)]
    windows = cut.reshape(split)
    axes = tuple(range(2, windows.ndim, 2))
    if squared:
        return np.asarray(np.square(windows).mean(axis=axes))
    return np.asarray(windows.var(axis=axes))


_HALVES = 8  # bins in an octave of coefficients


def _planes(x: Singles) -> Floats:
    """Return of a transform of blocks of 4: mean bits above each bound, share of those below."""
    for axis in range(1, x.ndim):
        x = _transformed(x, axis)
    magnitudes = np.abs(x.reshape(-1))
    logs = np.log2(magnitudes + np.float32(2.0**-26))
    places = np.clip((logs + 26) * _HALVES, 0, 32 * _HALVES - 1).astype(np.int64)
    counts = np.bincount(places, minlength=32 * _HALVES) / places.size
    middles = (np.arange(32 * _HALVES) + 0.5) / _HALVES - 26
    above = np.maximum(0.0, middles[None, :] - np.log2(NODES)[:, None])
    found = np.empty((len(NODES), 2))
    found[:, 0] = np.log2((above * counts).sum(axis=1) + _LEAST_BITS)
    found[:, 1] = ((above == 0) * counts).sum(axis=1)
    return found


def _transformed(x: Singles, axis: int) -> Singles:
    """Return the cosine transform of each 4 neighbours along an axis."""
    if x.shape[axis] < 4:
        return x
    moved = np.moveaxis(x, axis, -1)
    moved = moved[..., : moved.shape[-1] // 4 * 4]
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    places = (2 * np.arange(4) + 1) * np.arange(4)[:, None] * np.pi / 8
    matrix = np.cos(places) * np.sqrt(0.5)
    matrix[0] = 0.5
    result = groups @ matrix.T.astype(np.float32)
    return np.moveaxis(result.reshape(moved.shape), -1, axis)
