"""From codes to a section of bytes: FORMAT.md, section 5."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.arguments import checked_array, checked_shape, checked_weights
from lowtide.compression.reference.contexts import (
    FREQUENCY_BITS,
    KEPT,
    LIMITS,
    MAGNITUDE_LIMIT,
    N_BUCKETS,
    N_GROUPS,
    N_TOKENS,
    SHIFTS,
    STATE_LOW,
    activity_before,
    activity_beside,
    frequencies_of,
    n_buckets,
    tokens_of,
    zigzag,
)
from lowtide.compression.reference.grid import scan
from lowtide.compression.reference.lanes import coding_order

_CONTEXT_COST, _PAIR_COST = 8, 10  # bits that a context, and a token in one, cost in the tables
_MAX_EXTRA = 29


def entropy_encode(
    codes: NDArray[np.int32], shape: Sequence[int], weights: Sequence[int] | None
) -> bytes:
    """Return the codes as a section: tables, words of an entropy coder, extra bits.

    Args:
        codes: int32, shape (n,), in C order.
        shape: 1 to 4 extents, their product n.
        weights: The axes' weights in the interpolation, or None for codes of differences.

    Raises:
        CodecError: An argument is not as above.

    Source: Duda, Asymmetric numeral systems (arXiv 1311.2540), the range variant; contexts from
    the magnitudes of neighbours are this format's own.
    """
    shape = checked_shape(shape)
    if weights is not None:
        weights = checked_weights(weights, len(shape))
    u, groups, buckets, lanes = _in_scan_order(
        checked_array("codes", codes, shape, (np.int32,)), weights
    )
    tokens, n_extra, extra = tokens_of(u)
    full = np.bincount(
        (groups * N_BUCKETS + buckets) * N_TOKENS + tokens,
        minlength=N_GROUPS * N_BUCKETS * N_TOKENS,
    ).reshape(N_GROUPS, N_BUCKETS, N_TOKENS)
    head, counts = _best_merging(full, has_groups=weights is not None)
    shift = head & ~KEPT
    contexts = (groups if head & KEPT else 0) * n_buckets(shift) + (buckets >> shift)
    tables = [frequencies_of(row) if row.any() else [] for row in counts]
    words, states = _rans(contexts.tolist(), tokens.tolist(), lanes.tolist(), tables)
    is_set = ((extra[:, None] >> np.arange(_MAX_EXTRA)) & 1).astype(np.uint8)
    extra_bits = is_set[np.arange(_MAX_EXTRA) < n_extra[:, None]]  # row by row: scan order
    return b"".join(
        (
            bytes([head]),
            *(bytes([len(f)]) + b"".join(map(_leb128, f)) for f in tables),
            struct.pack("<III", len(words), *states),
            np.array(words, "<u2").tobytes(),
            np.packbits(extra_bits, bitorder="little").tobytes(),
        )
    )


def cost_bits(codes: NDArray[np.int32]) -> float:
    """Return about how many bits the codes cost: for a choice between predictors, no more.

    Args:
        codes: int32, shape (n,), n >= 1.

    Returns:
        The entropy of the tokens without contexts plus all extra bits; tables are not counted.

    Raises:
        CodecError: `codes` is not as above.
    """
    tokens, n_extra, _ = tokens_of(zigzag(checked_array("codes", codes, codes.shape, (np.int32,))))
    return _entropy_bits(np.bincount(tokens)) + float(n_extra.sum())


def _in_scan_order(
    codes: NDArray[np.int32], weights: Sequence[int] | None
) -> tuple[NDArray[np.int64], ...]:
    """Return zigzag numbers, groups, buckets, lanes of all points, shape (n,), in scan order."""
    u = zigzag(codes)
    magnitudes = np.minimum(u, MAGNITUDE_LIMIT)
    numbers, groups, activities, lanes = [], [], [], []
    for part in scan(codes.shape, weights):
        activity = activity_beside(part, magnitudes) + activity_before(magnitudes[part.points])
        turns, lanes_of_turns = coding_order(activity.shape)
        activities.append(activity.ravel()[turns])
        numbers.append(u[part.points].ravel()[turns])
        lanes.append(lanes_of_turns)
        groups.append(np.full(activity.size, part.group, np.int64))
    buckets = np.searchsorted(LIMITS, np.concatenate(activities), side="left")
    return np.concatenate(numbers), np.concatenate(groups), buckets, np.concatenate(lanes)


def _best_merging(full: NDArray[np.int64], *, has_groups: bool) -> tuple[int, NDArray[np.int64]]:
    """Return the first byte of the cheapest section and its counts (contexts, tokens)."""
    options = []
    for kept in (KEPT, 0) if has_groups else (0,):
        grouped = full if kept else full.sum(axis=0, keepdims=True)
        for shift in SHIFTS:
            merged = np.add.reduceat(grouped, np.arange(0, N_BUCKETS, 1 << shift), axis=1)
            counts = merged.reshape(-1, N_TOKENS)
            cost = 0.0
            for row in counts[counts.any(axis=1)]:
                cost += _entropy_bits(row)
            cost += _CONTEXT_COST * len(counts) + _PAIR_COST * np.count_nonzero(counts)
            options.append((cost, kept | shift, counts))
    _, head, counts = min(options, key=lambda option: option[0])  # the first of equals
    return head, counts


def _entropy_bits(counts: NDArray[np.int64]) -> float:
    """Return the sum of count * log2(total / count) over the tokens in their order."""
    total = int(counts.sum())
    cost = 0.0
    for count in counts[counts > 0].tolist():
        cost += count * math.log2(total / count)
    return cost


def _rans(
    contexts: list[int], tokens: list[int], lanes: list[int], tables: list[list[int]]
) -> tuple[list[int], list[int]]:
    """Return the 16-bit words in the order a decoder reads them, and its two first states."""
    starts = [[0, *np.cumsum(f).tolist()] for f in tables]
    states = [STATE_LOW, STATE_LOW]
    words = []
    for i in range(len(tokens) - 1, -1, -1):  # a decoder runs the other way
        context, token, lane = contexts[i], tokens[i], lanes[i]
        f, x = tables[context][token], states[lane]
        if x >= f << 20:  # once is enough: x < 2**32
            words.append(x & 0xFFFF)
            x >>= 16
        states[lane] = ((x // f) << FREQUENCY_BITS) + x % f + starts[context][token]
    return words[::-1], states


def _leb128(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])
