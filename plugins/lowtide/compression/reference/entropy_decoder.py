"""From a section of bytes back to codes: FORMAT.md, section 5.

Nothing in a section is trusted: each length is held to the bytes that are there, and the result's
size comes from the shape alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.compression.reference.arguments import checked_shape, checked_weights
from lowtide.compression.reference.contexts import (
    FREQUENCY_BITS,
    FREQUENCY_SUM,
    KEPT,
    LIMITS,
    MAGNITUDE_LIMIT,
    N_GROUPS,
    N_TOKENS,
    SHIFTS,
    STATE_LOW,
    activity_beside,
    first_of_token,
    n_buckets,
)
from lowtide.compression.reference.grid import Pass, scan
from lowtide.compression.reference.lanes import coding_order, padded_places
from lowtide.core.errors import CorruptStreamError

_MAX_ACTIVITY = 7 * MAGNITUDE_LIMIT
_LENGTHS = struct.Struct("<III")
_TOKENS = [first_of_token(token) for token in range(N_TOKENS)]
_BUCKETS = np.searchsorted(LIMITS, np.arange(_MAX_ACTIVITY + 1), side="left")


def entropy_decode(
    section: bytes | bytearray | memoryview, shape: Sequence[int], weights: Sequence[int] | None
) -> NDArray[np.int32]:
    """Return the codes of a section that `entropy_encode` wrote.

    Args:
        section: The bytes of the section.
        shape: 1 to 4 extents, their product n, as given to the encoder.
        weights: As given to the encoder.

    Returns:
        int32, shape (n,), in C order.

    Raises:
        CorruptStreamError: The section is not one that the encoder writes for this shape.
        CodecError: `shape` or `weights` is not as above.
    """
    shape = checked_shape(shape)
    if weights is not None:
        weights = checked_weights(weights, len(shape))
    reader = _parse(bytes(section))
    zigzags = np.zeros(shape, np.uint32)
    magnitudes = np.zeros(shape, np.int64)
    for part in scan(shape, weights):
        beside = activity_beside(part, magnitudes)
        u = reader.read_pass(part, beside)
        zigzags[part.points] = u
        magnitudes[part.points] = np.minimum(u, MAGNITUDE_LIMIT)
    reader.check_end()
    signs = (zigzags & np.uint32(1)).astype(np.int32)
    return ((zigzags >> np.uint32(1)).astype(np.int32) ^ -signs).ravel()


@dataclass(frozen=True, slots=True)
class _Table:
    """One context: for each of 4096 slots the token there; by token frequency and start."""

    slots: bytes
    frequencies: list[int]
    starts: list[int]


class _Reader:
    """Decodes passes one after the other: a state for each lane, words, extra bits."""

    def __init__(
        self,
        head: int,
        tables: list[_Table | None],
        states: list[int],
        words: list[int],
        extra: bytes,
    ) -> None:
        self._keeps_groups = bool(head & KEPT)
        self._shift = head & ~KEPT
        self._tables = tables
        self._states = states
        self._words = words
        self._extra = extra
        self._n_words = 0
        self._n_bits = 0

    def read_pass(self, part: Pass, beside: NDArray[np.int64]) -> NDArray[Any]:
        """Return the zigzag numbers of a pass, in its shape.

        Args:
            part: The pass.
            beside: The part of the activity that does not come from points of this pass.
        """
        places, n_places, line, plane = padded_places(beside.shape)
        order, lanes = coding_order(beside.shape)
        magnitudes = [0] * n_places
        tables = self._tables_by_activity(part.group)
        numbers = np.empty(beside.size, np.uint32)
        turns = (order, lanes, places[order], beside.ravel()[order])
        for i, lane, place, activity in zip(*(turn.tolist() for turn in turns), strict=True):
            before = 2 * (magnitudes[place - 1] + magnitudes[place - line])
            table = tables[activity + before + magnitudes[place - plane]]
            if table is None:
                raise CorruptStreamError("codes: a context without a table occurs")
            first, n_extra = _TOKENS[self._next_token(table, lane)]
            u = first + self._next_bits(n_extra) if n_extra else first
            numbers[i] = u
            magnitudes[place] = min(u, MAGNITUDE_LIMIT)
        return numbers.reshape(beside.shape)

    def check_end(self) -> None:
        """Raise CorruptStreamError unless everything is read and the states are as at the start."""
        if self._states != [STATE_LOW, STATE_LOW]:
            raise CorruptStreamError("codes: the states do not end where the encoder began")
        if self._n_words != len(self._words):
            raise CorruptStreamError(
                f"codes: {len(self._words) - self._n_words} of {len(self._words)} words are left"
            )
        if -(-self._n_bits // 8) != len(self._extra):
            raise CorruptStreamError(
                f"codes: {len(self._extra)} bytes of extra bits are there, {self._n_bits} bits used"
            )
        if self._n_bits % 8 and self._extra[-1] >> (self._n_bits % 8):
            raise CorruptStreamError("codes: the bits that fill the last byte are not 0")

    def _tables_by_activity(self, group: int) -> list[_Table | None]:
        begin = (group if self._keeps_groups else 0) * n_buckets(self._shift)
        return [self._tables[i] for i in (begin + (_BUCKETS >> self._shift)).tolist()]

    def _next_token(self, table: _Table, lane: int) -> int:
        x = self._states[lane]
        slot = x & (FREQUENCY_SUM - 1)
        token = table.slots[slot]
        x = table.frequencies[token] * (x >> FREQUENCY_BITS) + slot - table.starts[token]
        if x < STATE_LOW:
            if self._n_words == len(self._words):
                raise CorruptStreamError("codes: more words are needed than are there")
            x = x << 16 | self._words[self._n_words]
            self._n_words += 1
        self._states[lane] = x
        return token

    def _next_bits(self, count: int) -> int:
        begin, self._n_bits = self._n_bits, self._n_bits + count
        if self._n_bits > 8 * len(self._extra):
            raise CorruptStreamError("codes: more extra bits are needed than are there")
        piece = int.from_bytes(self._extra[begin // 8 : -(-self._n_bits // 8)], "little")
        return (piece >> begin % 8) & ((1 << count) - 1)


def _parse(section: bytes) -> _Reader:
    """Read the tables and cut the rest into words and extra bits."""
    if not section:
        raise CorruptStreamError("codes: the section is empty")
    head = section[0]
    if head & ~KEPT not in SHIFTS:
        raise CorruptStreamError(f"codes: first byte {head}, allowed are 0, 1, 2, 5 and 8 more")
    at, tables = 1, []
    for _ in range((N_GROUPS if head & KEPT else 1) * n_buckets(head & ~KEPT)):
        table, at = _parse_table(section, at)
        tables.append(table)
    if len(section) < at + _LENGTHS.size:
        raise CorruptStreamError("codes: the section ends before its words")
    n_words, *states = _LENGTHS.unpack_from(section, at)
    at += _LENGTHS.size
    if min(states) < STATE_LOW:
        raise CorruptStreamError(f"codes: a state is {min(states)}, the least is {STATE_LOW}")
    if n_words > (len(section) - at) // 2:
        raise CorruptStreamError(f"codes: {n_words} words, but {len(section) - at} bytes are left")
    words = np.frombuffer(section, "<u2", n_words, at).tolist()
    return _Reader(head, tables, states, words, section[at + 2 * n_words :])


def _parse_table(section: bytes, at: int) -> tuple[_Table | None, int]:
    """Return the table at `at`, None for a context that never occurs, and where it ends."""
    frequencies: list[int] = []
    try:
        n_tokens = section[at]
        at += 1
        for _ in range(n_tokens):
            f = section[at]
            at += 1
            if f >= 128:
                f = f & 127 | section[at] << 7
                at += 1
                if not 128 <= f <= FREQUENCY_SUM:
                    raise CorruptStreamError("codes: a frequency is too large or written too long")
            frequencies.append(f)
    except IndexError as cause:
        raise CorruptStreamError("codes: the section ends in its tables") from cause
    if not frequencies:
        return None, at
    if n_tokens > N_TOKENS or not frequencies[-1] or sum(frequencies) != FREQUENCY_SUM:
        raise CorruptStreamError(
            f"codes: a table of {n_tokens} tokens and the sum {sum(frequencies)}; allowed are up "
            f"to {N_TOKENS} tokens, the last one above 0, and the sum {FREQUENCY_SUM}"
        )
    slots = np.repeat(np.arange(n_tokens, dtype=np.uint8), frequencies).tobytes()
    return _Table(slots, frequencies, [0, *np.cumsum(frequencies).tolist()]), at
