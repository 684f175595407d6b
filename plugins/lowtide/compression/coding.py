"""One chunk to one record and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lowtide.compression.bounds import Limits, ordinary
from lowtide.compression.chunks import Chunk
from lowtide.compression.elements import Array, ElementType
from lowtide.compression.payload import (
    LOGARITHMIC,
    PayloadHeader,
    Record,
    exception_values,
    lossless_elements,
    lossless_record,
    pack_positions,
    pack_signs,
    parse_positions,
    parse_signs,
)
from lowtide.compression.predictors import ChunkPredictor, Differences, Shape
from lowtide.compression.primitives import primitives
from lowtide.compression.selection import choose, choose_orders
from lowtide.core.codec import compress_planes
from lowtide.core.errors import CorruptStreamError

if TYPE_CHECKING:
    from lowtide.compression.learned.model import Model

# A coded record is compared with a lossless one if it is larger than this part of what that one
# is likely to take: integers, repetitions and few distinct values can make it small.
_WORTH_COMPARING = 0.7
_PROBE_ELEMENTS = 8192  # of each sample


class Coder:
    """Encodes the chunks of one array.

    Args:
        element: Their type.
        limits: What they may lose.
        fill: The fill value in the working type, or None.
        policy: One of `selection.PREDICTORS`.
        goal: One of `selection.GOALS`.
        level: zstandard's.
        model: What may predict blocks of a chunk, if that makes it smaller.
        insists: Whether it predicts them also if that makes a chunk larger.
    """

    def __init__(
        self, element: ElementType, limits: Limits, fill: Any, *, policy: str, goal: str,
        level: int, model: Model | None = None, insists: bool = False,
    ) -> None:  # fmt: skip
        self._element = element
        self._limits = limits
        self._fill = fill
        self._policy = policy
        self._goal = goal
        self._level = level
        self._model = model
        self._insists = insists

    def encode(self, elements: Array, shape: Shape) -> bytes:
        """Return the record of a chunk.

        Args:
            elements: Flat, of the element type; not written to.
            shape: Of the chunk.
        """
        if self._limits.is_lossless:
            return lossless_record(elements, self._level).pack()
        original = self._element.widen(elements)
        mask = self._predictable(original)
        if mask is not None and not mask.any():
            return lossless_record(elements, self._level).pack()
        record = self._coded(elements, original, mask, shape).pack()
        if len(record) > _WORTH_COMPARING * self._lossless_estimate(elements):
            lossless = lossless_record(elements, self._level).pack()
            return record if len(record) < len(lossless) else lossless
        return record

    def _lossless_estimate(self, elements: Array) -> float:
        """Return about how many bytes the elements take without loss, by three samples."""
        count = min(_PROBE_ELEMENTS, len(elements) // 3)
        if not count:
            return float(elements.nbytes)
        middle = (len(elements) - count) // 2
        parts = [elements[begin : begin + count] for begin in (0, middle, len(elements) - count)]
        probed = len(compress_planes(np.concatenate(parts), self._level))
        return probed * len(elements) / (3 * count)

    def _coded(self, elements: Array, original: Array, mask: Array | None, shape: Shape) -> Record:
        is_log = self._limits.domain == LOGARITHMIC
        work = _working_values(original, mask, is_log=is_log)
        predictor, section, restored = self._predicted(work, shape)
        is_negative = original < 0 if is_log else None
        decoded = _elements_of(restored, is_negative, self._element, is_log=is_log)
        positions = primitives().outside(
            original, self._element.widen(decoded), self._limits.limit, is_log
        )
        if mask is not None:
            is_exact = ~mask
            is_exact[positions] = True
            positions = np.flatnonzero(is_exact)
        packed, packed_bytes = pack_positions(positions, self._level)
        return Record(
            predictor=predictor,
            codes=section,
            signs=pack_signs(is_negative, self._level) if is_negative is not None else b"",
            exceptions=len(positions),
            positions=packed,
            positions_bytes=packed_bytes,
            values=compress_planes(elements[positions], self._level) if len(positions) else b"",
        )

    def _predicted(self, work: Array, shape: Shape) -> tuple[ChunkPredictor, bytes, Array]:
        """Return predictor, section and decoded working values: those that make it smallest."""
        step = self._limits.step
        ordinary = choose(work, shape, step, self._policy, self._goal)
        section, restored = ordinary.to_section(work, shape, step)
        if self._model is None or self._limits.domain == LOGARITHMIC:
            return ordinary, section, restored
        from lowtide.compression.learned.selection import choose_learned

        orders = (
            ordinary.orders
            if isinstance(ordinary, Differences)
            else choose_orders(work, shape, step)
        )
        learned = choose_learned(work, shape, step, self._model, orders, insists=self._insists)
        if learned is None:
            return ordinary, section, restored
        other_section, other_restored = learned.to_section(work, shape, step)
        is_better = len(other_section) < len(section) and (
            self._goal != "psnr" or _error(other_restored, work) <= _error(restored, work)
        )
        if is_better or self._insists:
            return learned, other_section, other_restored
        return ordinary, section, restored

    def _predictable(self, original: Array) -> Array | None:
        """Return which values the predictor sees; None if it sees them all."""
        mask = ordinary(original, self._fill)
        if self._limits.domain == LOGARITHMIC:
            is_other = original != 0
            mask = is_other if mask is None else mask & is_other
            return None if mask.all() else mask
        return mask


def decode_chunk(
    record: Record, header: PayloadHeader, chunk: Chunk, element: ElementType
) -> Array:
    """Return the elements of a chunk, flat.

    Raises:
        CorruptStreamError: the record is damaged.
    """
    predictor = record.predictor
    if predictor is None:
        return lossless_elements(record, element, chunk.count)
    is_log = header.domain == LOGARITHMIC
    # All that may be refused comes before what takes memory for a whole chunk.
    positions = parse_positions(record, chunk.count)
    values = exception_values(record, element) if record.exceptions else None
    is_negative = parse_signs(record.signs, chunk.count)
    is_double = is_log or element.working == np.float64
    with np.errstate(all="ignore"):  # a forged step may overflow
        try:
            restored = predictor.from_section(
                record.codes, chunk.shape, header.step, is_double=is_double
            )
        except ValueError as error:
            raise CorruptStreamError(f"damaged codes: {error}") from error
        elements = _elements_of(restored, is_negative, element, is_log=is_log)
    if values is not None:
        elements[positions] = values
    return elements


def _error(restored: Array, work: Array) -> float:
    with np.errstate(all="ignore"):
        return float(np.square(restored.astype(np.float64) - work).sum())


def _working_values(original: Array, mask: Array | None, *, is_log: bool) -> Array:
    """Return what the predictor works on; values it does not see become the last one it saw."""
    work = original
    if mask is not None:
        seen = np.flatnonzero(mask)
        last = np.cumsum(mask) - 1
        work = original[seen[np.maximum(last, 0)]]
    return np.log2(np.abs(work.astype(np.float64))) if is_log else work


def _elements_of(
    restored: Array, is_negative: Array | None, element: ElementType, *, is_log: bool
) -> Array:
    """Return the elements that a decoder makes of working values."""
    values = primitives().exp2(restored) if is_log else restored
    if is_negative is not None:
        np.negative(values, out=values, where=is_negative)
    return element.narrow(values)
