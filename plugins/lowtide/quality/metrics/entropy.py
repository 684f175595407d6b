"""Entropy of quantised values: what a compressor could do, not how good its result is."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from lowtide.core.errors import DataError
from lowtide.quality.metrics.pair import Floats, Pair


def quantised_entropy(
    values: Any, bound: float, *, of: Literal["data", "lorenzo"] = "data"
) -> float | None:
    """Return the Shannon entropy of round(v / (2 bound)), bits per value; None without values.

    Args:
        values: As for `evaluate`; NaNs and infinities are left out.
        bound: Absolute error bound, positive.
        of: v is the data themselves, or the residual of the first-order Lorenzo predictor over the
            last up to three axes longer than 1, computed on the quantised data.

    Raises:
        DataError: `bound` or `of` is not allowed.
    """
    if not 0 < bound < float("inf"):
        raise DataError(f"bound {bound}: allowed are positive, finite numbers")
    if of not in ("data", "lorenzo"):
        raise DataError(f'of "{of}": allowed are "data" and "lorenzo"')
    pair = Pair(values, values)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = np.rint(pair.raw(0, pair.size)[0] / (2 * bound))
    if of == "lorenzo":
        codes = _lorenzo(codes.reshape(pair.shape))
    codes = codes[np.isfinite(codes)]
    if not len(codes):
        return None
    counts = np.unique(codes, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _lorenzo(codes: Floats) -> Floats:
    """Return what the predictor misses: first differences along each axis in turn."""
    axes = [axis for axis, length in enumerate(codes.shape) if length > 1][-3:]
    for axis in axes:
        before: Floats = np.zeros_like(np.take(codes, [0], axis=axis))
        with np.errstate(invalid="ignore"):
            codes = np.diff(codes, axis=axis, prepend=before)
    return codes.reshape(-1)
