"""The codec ``lowtide.sz``: prediction, quantization, entropy coding; the bound holds exactly.

After SZ (Liang et al., 2018) and its interpolation (Zhao et al., 2021); the bytes are described in
FORMAT.md. Every element that a decoder would give outside of the bound, in exact arithmetic, and
every one that is not finite or the fill value, is stored as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.compression.bounds import (
    Limits,
    extremes,
    fill_of,
    limits_of,
    on_lattice,
    ordinary,
)
from lowtide.compression.chunks import MAX_CHUNK_ELEMENTS, Grid
from lowtide.compression.coding import Coder, decode_chunk
from lowtide.compression.elements import Array, ElementType, element_type
from lowtide.compression.payload import (
    LINEAR,
    PayloadHeader,
    pack_payload,
    parse_payload,
    parse_record,
)
from lowtide.compression.predictors import KINDS, Differences, Interpolation, Kind
from lowtide.compression.selection import GOALS, PREDICTORS
from lowtide.core.codec import ArrayData, Bound, Codec, checked_level
from lowtide.core.errors import CodecError, CorruptStreamError, listed, near
from lowtide.core.stream import StreamHeader

MODES = ("abs", "rel", "pw_rel")

T = TypeVar("T")
R = TypeVar("R")


class SzCodec(Codec):
    """Lossy within a bound, for float16, bfloat16, float32 and float64.

    NaNs with their payloads, infinities and the fill value come back exactly; -0.0 may come back
    as 0.0. Without loss where the bound is 0, or where losing something would not make it smaller.

    Args:
        mode: What the bound limits for each finite value x that becomes x': "abs" |x' - x|,
            "rel" the same in units of max - min of the array's finite values, "pw_rel" the same
            in units of |x|.
        bound: Finite, not negative. It has no default.
        predictor: "differences", "interpolation", or the one that makes each chunk smaller.
        goal: "size": the smallest stream that keeps the bound; "psnr": somewhat larger, with a
            smaller mean error, so that it is the smallest for the PSNR that it has.
        fill_value: Stands for "no value": exact, and not part of max - min.
        chunk_elements: The array is cut into chunks of at most so many elements, which are
            independent of each other.
        level: zstandard's level for what is not entropy-coded.
    """

    codec_id = "lowtide.sz"
    allowed_predictors: ClassVar[Sequence[str]] = PREDICTORS

    def __init__(
        self,
        mode: str = "abs",
        *,
        bound: float | None = None,
        predictor: str = "auto",
        goal: str = "size",
        fill_value: float | None = None,
        chunk_elements: int = 4 << 20,
        level: int = 3,
    ) -> None:
        if bound is None:
            raise CodecError(
                f'codec "{self.codec_id}": bound is missing; give the largest error, such as '
                '"bound": 1e-3, or 0 for none'
            )
        self.mode = self._checked_name("mode", mode, MODES)
        self._value = self._checked_number("bound", bound)
        if self._value < 0:
            raise CodecError(f'codec "{self.codec_id}": bound {bound}, allowed are 0 and more')
        self.predictor = self._checked_name("predictor", predictor, self.allowed_predictors)
        self.goal = self._checked_name("goal", goal, GOALS)
        self.fill_value = (
            None if fill_value is None else self._checked_number("fill_value", fill_value)
        )
        if (
            isinstance(chunk_elements, bool)
            or not isinstance(chunk_elements, int)
            or not (1 <= chunk_elements <= MAX_CHUNK_ELEMENTS)
        ):
            raise CodecError(
                f'codec "{self.codec_id}": chunk_elements {chunk_elements!r}, allowed are 1 to '
                f"{MAX_CHUNK_ELEMENTS}"
            )
        self.chunk_elements = chunk_elements
        self.level = checked_level(self.codec_id, level)

    @property
    def bound(self) -> Bound:
        """What decoding guarantees for finite values other than the fill value, which is exact."""
        return Bound(self.mode, self._value) if self._value else Bound("lossless")

    def get_config(self) -> dict[str, Any]:
        """Return the configuration as JSON types; its "bound" is the number alone."""
        return {**super().get_config(), "bound": self._value}

    def _encode(self, data: ArrayData) -> bytes:
        return _with_denormals(self._encode_all, data)

    def _encode_all(self, data: ArrayData) -> bytes:
        element = element_type(data.dtype)
        flat = data.values.reshape(-1)
        grid = Grid(data.values.shape, self.chunk_elements)
        if grid.count >= 1 << 32:
            raise CodecError(
                f'codec "{self.codec_id}": {grid.count} chunks; make chunk_elements larger'
            )
        fill = fill_of(self.fill_value, element)
        with _Workers(grid.count) as workers:
            limits = self._limits(flat, element, grid, fill, workers)
            coder = self._coder(element, limits, fill)
            records = workers.map(
                lambda chunk: coder.encode(flat[chunk.elements], chunk.shape), grid
            )
        header = PayloadHeader(limits.domain, limits.step, self.chunk_elements)
        return pack_payload(header, records)

    def _coder(self, element: ElementType, limits: Limits, fill: Any) -> Coder:
        # Of these predictors only differences stay on a lattice.
        policy = Differences.name if limits.is_lattice else self.predictor
        return Coder(element, limits, fill, policy=policy, goal=self.goal, level=self.level)

    def _limits(
        self, flat: Array, element: ElementType, grid: Grid, fill: Any, workers: _Workers
    ) -> Limits:
        if not self._value:
            return Limits(LINEAR, 0.0, 0.0)
        found: list[Any] = []
        if self.mode != "pw_rel":
            found = workers.map(
                lambda chunk: extremes(element.widen(flat[chunk.elements]), fill), grid
            )
        limits = limits_of(self.mode, self._value, element, found)
        if limits.domain != LINEAR or limits.is_lossless or self.predictor == Interpolation.name:
            return limits

        def wide(elements: Array) -> Array:
            original = element.widen(elements)
            mask = ordinary(original, fill)
            return original if mask is None else original[mask]

        return on_lattice(limits, flat, wide)

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        return _with_denormals(_decode_all, header, payload, self._kinds(header))

    def _kinds(self, _header: StreamHeader) -> Mapping[int, Kind]:
        """Return the kinds of records that a stream of this codec may have."""
        return KINDS

    def _checked_name(self, what: str, found: Any, allowed: Sequence[str]) -> str:
        if found not in allowed:
            hint = near(str(found), allowed)
            raise CodecError(
                f'codec "{self.codec_id}": {what} {found!r}.{hint} Known: {listed(allowed)}'
            )
        return str(found)

    def _checked_number(self, what: str, found: Any) -> float:
        is_number = isinstance(found, (int, float, np.number)) and not isinstance(found, bool)
        try:
            number = float(found) if is_number else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise CodecError(
                f'codec "{self.codec_id}": {what} {found!r}, allowed are finite numbers (NaN and '
                "infinities come back exactly in any case)"
            )
        return number


def _decode_all(header: StreamHeader, payload: memoryview, kinds: Mapping[int, Kind]) -> Array:
    try:
        element = element_type(header.dtype)
    except CodecError as error:
        raise CorruptStreamError(f"{error}; the stream was not written by Lowtide") from error
    head, records = parse_payload(payload, header.shape)
    try:
        out = np.empty(math.prod(header.shape), element.dtype)
    except MemoryError as error:
        raise CorruptStreamError(
            f"stream claims {header.nbytes} bytes of elements, more than there is memory for; set "
            f"max_bytes for streams of strangers"
        ) from error

    def decode(number: int) -> None:
        chunk, raw = records[number]
        with _naming(header, number):
            record = parse_record(raw, head, chunk, kinds)
            out[chunk.elements] = decode_chunk(record, head, chunk, element)

    with _Workers(len(records)) as workers:
        workers.map(decode, range(len(records)))
    return out


def inspect_payload(
    header: StreamHeader, payload: memoryview, kinds: Mapping[int, Kind] = KINDS
) -> dict[str, Any]:
    """Return what a payload says about itself; see `lowtide.compression.inspect`."""
    head, records = parse_payload(payload, header.shape)
    chunks = []
    for number, (chunk, raw) in enumerate(records):
        with _naming(header, number):
            record = parse_record(raw, head, chunk, kinds)
            parameters = {} if record.predictor is None else record.predictor.as_dict()
        predictor = record.predictor
        kind = {"kind": "lossless"} if predictor is None else {"kind": predictor.name}
        size = {"stream_bytes": len(raw), "exceptions": record.exceptions}
        chunks.append({"shape": list(chunk.shape), **kind, **parameters, **size})
    return {
        "domain": "linear" if head.domain == LINEAR else "logarithmic",
        "step": head.step,
        "chunk_elements": head.chunk_elements,
        "exceptions": sum(chunk["exceptions"] for chunk in chunks),
        "chunks": chunks,
    }


class _Workers:
    """Threads for the chunks of one array: as many as torch uses, none for a single chunk."""

    def __init__(self, chunks: int) -> None:
        count = min(torch.get_num_threads(), chunks)
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return what `function` gives for each item, in their order; raise what it raises."""
        return [*(map if self._pool is None else self._pool.map)(function, items)]


_SMALLEST = 5e-324


def _with_denormals(function: Callable[..., R], *arguments: Any) -> R:
    """Call `function` where denormal numbers are not zero, whatever this thread has set."""
    if _SMALLEST * 1.0 > 0:
        return function(*arguments)
    # torch.set_flush_denormal is one thread's setting, and its new threads inherit it.
    with ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(False,)) as own:
        return own.submit(function, *arguments).result()


@contextmanager
def _naming(header: StreamHeader, number: int) -> Iterator[None]:
    """Say in errors in which chunk something is wrong."""
    try:
        yield
    except CorruptStreamError as error:
        where = f'codec "{header.codec["id"]}": chunk {number}'
        raise CorruptStreamError(f"{where}: {error}") from error
