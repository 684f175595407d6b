"""Structural similarity, in the two variants that people compare: they differ, so both have names.

Wang et al., Image Quality Assessment (2004), with uniform windows: the mean over windows of
(2 mx my + c1) / (mx^2 + my^2 + c1) * (2 sxy + c2) / (sx^2 + sy^2 + c2). What is computed is what
each factor lacks to 1, from the error: (mx - my)^2 / (...) and var(e) / (...). So 1 - SSIM does not
cancel, and reaches far below the spacing of numbers near 1.

Windows span the last up to three axes longer than 1; SSIM is averaged over the axes before. They
are 7 wide, or the largest odd width that the shortest axis has; below 3 there is no SSIM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lowtide.quality.metrics.pair import Floats, Pair
from lowtide.quality.metrics.registry import DEFICIT, SQUARE, Metric, Score, undefined

Parts = tuple[Floats, ...]
Join = Callable[[Parts, Parts, tuple[int, int]], Parts]

WIDTH, LEAST_WIDTH = 7, 3
K1, K2 = 0.01, 0.03
_BLOCK = 1 << 15  # elements of a slab: all its moments stay in a cache


@dataclass(frozen=True)
class Variant:
    """What differs between implementations.

    Attributes:
        name: For caches.
        stride: Distance of windows along each axis.
        is_range_local: Whether the dynamic range is that of each window, not of the array.
        is_unbiased: Whether variances are divided by n - 1.
    """

    name: str
    stride: int
    is_range_local: bool
    is_unbiased: bool


SCIKIT = Variant("ssim", stride=1, is_range_local=False, is_unbiased=True)
QCAT = Variant("ssim_qcat", stride=2, is_range_local=True, is_unbiased=False)


def dssim(pair: Pair, variant: Variant) -> Score:
    """1 - SSIM, without cancellation."""
    return pair.cached(variant.name, lambda: _dssim(pair, variant))


def ssim(pair: Pair, variant: Variant) -> Score:
    """Mean structural similarity."""
    found = dssim(pair, variant)
    return Score(None if found.value is None else 1.0 - found.value, found.notes)


def _dssim(pair: Pair, variant: Variant) -> Score:
    shape = tuple(length for length in pair.shape if length > 1)[-3:]
    width = min((WIDTH, *shape))
    width -= 1 - width % 2
    if not shape or width < LEAST_WIDTH:
        return undefined(f"shape {pair.shape} has no windows of {LEAST_WIDTH} or more")
    total, count, windows = 0.0, 0, 0
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for x, e in _slabs(pair, shape, width, variant.stride):
            lacks = _windows(x, e, pair, width, variant)
            windows += lacks.size
            if pair.has_left_out:
                lacks = lacks[~np.isnan(lacks)]  # a window with an element that is left out
            total, count = total + float(lacks.sum()), count + lacks.size
    notes: dict[str, object] = {"width": width, "windows": count}
    if windows != count:
        notes["windows_excluded"] = windows - count
    if not pair.value_range:
        notes["degenerate"] = "the original is constant; its range is taken to be 1"
    return Score(total / count, notes) if count else Score(None, notes)


def _slabs(
    pair: Pair, shape: tuple[int, ...], width: int, stride: int
) -> Iterator[tuple[Floats, Floats]]:
    """Yield original and error, shape (several, *shape) or slabs (1, rows, *shape[1:])."""
    size = math.prod(shape)
    if size <= _BLOCK:
        several = _BLOCK // size
        for begin in range(0, pair.size, several * size):
            x, e = pair.read(begin, min(begin + several * size, pair.size))
            yield x.reshape(-1, *shape), e.reshape(-1, *shape)
        return
    inner = size // shape[0]
    rows = max(4 * width, _BLOCK // inner) // stride * stride  # first rows of windows in a slab
    for start in range(0, pair.size, size):
        for row in range(0, shape[0] - width + 1, rows):
            end = min(row + rows - stride + width, shape[0])
            x, e = pair.read(start + row * inner, start + end * inner)
            yield x.reshape(1, -1, *shape[1:]), e.reshape(1, -1, *shape[1:])


def _windows(x: Floats, e: Floats, pair: Pair, width: int, variant: Variant) -> Floats:
    """Return 1 - SSIM of each window of (several, *spatial) values."""
    unit = pair.value_range or 1.0
    count = width ** (x.ndim - 1)
    x = (x - pair.center) / unit
    e = e / unit
    mean_x, mean_e, xx, ee, xe = _moments(x, e, width, variant)
    divisor = count - 1 if variant.is_unbiased else count
    var_x, var_e = xx / divisor, ee / divisor
    var_y = np.maximum(var_x + var_e + 2 * xe / divisor, 0.0)
    c1, c2 = _constants(x, width, unit, variant)
    before = mean_x + pair.center / unit
    after = before + mean_e
    luminance = mean_e * mean_e / (before * before + after * after + c1)
    structure = var_e / (var_x + var_y + c2)
    lacks: Floats = luminance + structure - luminance * structure
    return lacks


def _moments(x: Floats, e: Floats, width: int, variant: Variant) -> Parts:
    """Return of each window the means of x and e, and the sums of squares and products about them.

    Where the range is the array's, and x is about its middle, plain sums are precise enough: what
    cancels is far below c2. Where it is the window's, two halves are put together by the difference
    of their means (Chan et al., 1979), so that any window is as precise as any other.
    """
    if not variant.is_range_local:
        parts: Parts = (x, e, x * x, e * e, x * e)
        for axis in range(1, x.ndim):
            parts = _sliding(parts, axis, width, variant.stride, _added)
        sum_x, sum_e, xx, ee, xe = parts
        mean_x, mean_e = (each / width ** (x.ndim - 1) for each in (sum_x, sum_e))
        xx, ee = np.maximum(xx - mean_x * sum_x, 0.0), np.maximum(ee - mean_e * sum_e, 0.0)
        return mean_x, mean_e, xx, ee, xe - mean_x * sum_e
    none = np.zeros((1,) * x.ndim)
    parts = (x, e, none, none, none)
    each = 1  # elements that a part stands for

    def joined(one: Parts, other: Parts, share: tuple[int, int]) -> Parts:
        n, m = share[0] * each, share[1] * each
        dx, de = other[0] - one[0], other[1] - one[1]
        weight = m / (n + m)
        wx, we = dx * (weight * n), de * (weight * n)
        return (
            one[0] + dx * weight, one[1] + de * weight, one[2] + other[2] + dx * wx,
            one[3] + other[3] + de * we, one[4] + other[4] + dx * we,
        )  # fmt: skip

    for axis in range(1, x.ndim):
        parts = _sliding(parts, axis, width, variant.stride, joined)
        each *= width
    return parts


def _added(one: Parts, other: Parts, _: tuple[int, int]) -> Parts:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _constants(
    x: Floats, width: int, unit: float, variant: Variant
) -> tuple[Floats | float, Floats | float]:
    if not variant.is_range_local:
        return K1 * K1, K2 * K2

    def wider(one: Parts, other: Parts, _: tuple[int, int]) -> Parts:
        return np.maximum(one[0], other[0]), np.minimum(one[1], other[1])

    parts: Parts = (x, x)
    for axis in range(1, x.ndim):
        parts = _sliding(parts, axis, width, variant.stride, wider)
    spread = parts[0] - parts[1]
    # A constant window has the range 1, in the units of the data.
    spread = np.where(spread == 0, 1.0 / unit, spread)
    return (K1 * spread) ** 2, (K2 * spread) ** 2


def _sliding(parts: Parts, axis: int, width: int, stride: int, join: Join) -> Parts:
    """Join `width` (odd) neighbours along an axis, by doubling: no running sum that drifts."""
    whole = parts[0].shape[axis]

    def cut(each: Parts, begin: int, end: int, step: int = 1) -> Parts:
        at = (slice(None),) * axis + (slice(begin, end, step),)
        return tuple(part[at] if part.size > 1 else part for part in each)

    windows = whole - width + 1
    result, done, power, doubled = cut(parts, 0, windows, stride), 1, 1, parts
    while done < width:
        length = whole - 2 * power + 1
        head, tail = cut(doubled, 0, length), cut(doubled, power, power + length)
        doubled = join(head, tail, (power, power))
        power *= 2
        if width & power:
            result = join(result, cut(doubled, done, done + windows, stride), (done, power))
            done += power
    return result


_SCIKIT_TEXT = "uniform windows 7 wide, stride 1, one data range, sample covariance"
_QCAT_TEXT = "uniform windows 7 wide, stride 2, range and constants of each window"

METRICS = (
    Metric("ssim", _SCIKIT_TEXT, "higher", lambda pair, _: ssim(pair, SCIKIT), DEFICIT),
    Metric("dssim", f"1 - SSIM: {_SCIKIT_TEXT}", "lower", lambda pair, _: dssim(pair, SCIKIT),
           SQUARE),
    Metric("ssim_qcat", _QCAT_TEXT, "higher", lambda pair, _: ssim(pair, QCAT), DEFICIT),
    Metric("dssim_qcat", f"1 - SSIM: {_QCAT_TEXT}", "lower", lambda pair, _: dssim(pair, QCAT),
           SQUARE),
)  # fmt: skip
