"""Tokens, contexts and frequencies of the entropy coder: FORMAT.md, section 5."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.grid import Pass
from lowtide.compression.reference.lanes import lanes_of

N_GROUPS = 6
N_BUCKETS = 22
N_TOKENS = 128
FREQUENCY_BITS = 12
FREQUENCY_SUM = 1 << FREQUENCY_BITS
SHIFTS = (0, 1, 2, 5)
"""By how many bits buckets may be merged."""
KEPT = 8
"""The flag for groups that stay apart, beside the shift in a section's first byte."""
STATE_LOW = 1 << 16
"""Lower limit of the states, and what both are where coding begins and decoding ends."""
MAGNITUDE_LIMIT = 1023
LIMITS = np.array(
    (0, 1, 2, 4, 6, 9, 13, 18, 26, 38, 54, 80, 120, 180, 270, 400, 600, 900, 1400, 2200, 3500)
)
"""A bucket is the number of these below the activity."""

_DIRECT = 16  # tokens below are their number itself

Tokens: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def zigzag(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return codes 0, -1, 1, -2, ... as 0, 1, 2, 3, ...: below 2**32, in shape of `codes`."""
    q = codes.astype(np.int64)
    return (q << 1) ^ (q >> 63)


def tokens_of(u: NDArray[np.int64]) -> Tokens:
    """Return for zigzag numbers of shape (n,): tokens, numbers of extra bits, extra bits."""
    bits = np.frexp(np.maximum(u, 1).astype(np.float64))[1].astype(np.int64) - 1  # floor(log2 u)
    is_long = u >= _DIRECT
    n_extra = np.where(is_long, bits - 2, 0)
    token = np.where(is_long, _DIRECT + 4 * (bits - 4) + ((u >> n_extra) & 3), u)
    return token, n_extra, u & ((1 << n_extra) - 1)


def first_of_token(token: int) -> tuple[int, int]:
    """Return the smallest zigzag number of a token and the number of extra bits after it."""
    if token < _DIRECT:
        return token, 0
    n_extra = (token - _DIRECT) // 4 + 2
    return (4 + token % 4) << n_extra, n_extra


def activity_beside(part: Pass, magnitudes: NDArray[Any]) -> NDArray[np.int64]:
    """Return what the neighbours on the main axis add to the activity: shape of the pass."""
    activity = np.zeros(magnitudes[part.points].shape, np.int64)
    if part.main is not None:
        sides = np.moveaxis(activity, part.main, 0)
        known = part.lines(magnitudes, part.main)
        sides += known[: len(sides)]
        sides[: len(known) - 1] += known[1:]
    return activity


def activity_before(magnitudes: NDArray[Any]) -> NDArray[np.int64]:
    """Return what the lanes' points before, on the last three axes, add: a pass's magnitudes."""
    activity = np.zeros(magnitudes.shape, np.int64)
    for added, lane in zip(lanes_of(activity), lanes_of(magnitudes), strict=True):
        for weight, axis in zip((2, 2, 1), reversed(range(lane.ndim)), strict=False):
            here, before = np.moveaxis(added, axis, 0), np.moveaxis(lane, axis, 0)
            here[1:] += weight * before[:-1]
    return activity


def n_buckets(shift: int) -> int:
    """Return how many buckets are left when they are merged by `shift`."""
    return ((N_BUCKETS - 1) >> shift) + 1


def frequencies_of(counts: NDArray[np.int64]) -> list[int]:
    """Return frequencies with the sum 4096 for counts that are not all 0, without zeros behind."""
    total = int(counts.sum())
    f = [max(1, int(count) * FREQUENCY_SUM // total) if count else 0 for count in counts]
    if sum(f) < FREQUENCY_SUM:
        f[int(np.argmax(counts))] += FREQUENCY_SUM - sum(f)
    for _ in range(sum(f) - FREQUENCY_SUM):
        f[f.index(max(f))] -= 1
    return f[: int(np.flatnonzero(counts)[-1]) + 1]
