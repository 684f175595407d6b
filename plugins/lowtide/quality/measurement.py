"""An array through a codec and back: size, time, quality, and whether the bound was kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from lowtide.core.codec import Bound, Codec
from lowtide.core.stream import BIT_TYPES, ArrayData, as_array, read_header
from lowtide.quality.candidates import Candidate
from lowtide.quality.metrics.evaluation import Evaluation, evaluate
from lowtide.quality.metrics.pair import Floats, Pair


@dataclass(frozen=True)
class QualityReport:
    """What a codec did to an array.

    Attributes:
        candidate: The codec.
        raw_bytes: Of the elements.
        stream_bytes: Of all that decoding needs: header, shape and type included.
        elements: How many.
        encode_s: Wall-clock seconds of one call.
        decode_s: The same.
        evaluation: Metrics.
        bound: What the codec promises.
        is_within_bound: Whether it kept that, in exact arithmetic but for "pw_rel" (to the last
            bit of float64); None where it promises nothing.
    """

    candidate: Candidate
    raw_bytes: int
    stream_bytes: int
    elements: int
    encode_s: float
    decode_s: float
    evaluation: Evaluation
    bound: Bound
    is_within_bound: bool | None

    @property
    def stored_bytes(self) -> int:
        """What has to be stored: the elements as they are where the stream is not smaller."""
        return min(self.raw_bytes, self.stream_bytes)

    @property
    def ratio(self) -> float | None:
        """Raw over stored bytes, 1 at least; None for an empty array."""
        return self.raw_bytes / self.stored_bytes if self.raw_bytes else None

    @property
    def bit_rate(self) -> float | None:
        """Stored bits for each element; None for an empty array."""
        return 8 * self.stored_bytes / self.elements if self.elements else None

    def value(self, name: str) -> float | None:
        """Return a metric that was measured, "compression_ratio" or "bit_rate"."""
        if name == "compression_ratio":
            return self.ratio
        return self.bit_rate if name == "bit_rate" else self.evaluation[name]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "codec": self.candidate.config(),
            "raw_bytes": self.raw_bytes,
            "stream_bytes": self.stream_bytes,
            "compression_ratio": self.ratio,
            "bit_rate": self.bit_rate,
            "encode_s": self.encode_s,
            "decode_s": self.decode_s,
            "bound": {"kind": self.bound.kind, "value": self.bound.value},
            "is_within_bound": self.is_within_bound,
            **self.evaluation.as_dict(),
        }


def measure(
    tensor: Any,
    candidate: Candidate | Codec | str | Mapping[str, Any],
    metrics: Sequence[str] | None = None,
    *,
    value_range: float | None = None,
) -> QualityReport:
    """Encode, decode and compare.

    Args:
        tensor: Numpy array or torch tensor; from a device it is copied before the clock starts.
        candidate: What to measure: a candidate, a codec, its name or its configuration.
        metrics: As for `evaluate`.
        value_range: As for `evaluate`.

    Raises:
        CodecError: the codec does not take this type.
        ConfigError, UnknownNameError: no codec can be built.
    """
    candidate = Candidate.of(candidate)
    codec = candidate.build()
    data = host_array(tensor)
    # Codecs take their input's type from the object, and numpy lacks some types.
    given = as_object(data)
    begin_s = time.perf_counter()
    stream = codec.encode(given)
    middle_s = time.perf_counter()
    values = codec.decode(stream)
    end_s = time.perf_counter()
    decoded = ArrayData(values, read_header(stream).dtype)
    return QualityReport(
        candidate=candidate,
        raw_bytes=data.values.nbytes,
        stream_bytes=len(stream),
        elements=data.values.size,
        encode_s=middle_s - begin_s,
        decode_s=end_s - middle_s,
        evaluation=evaluate(data, decoded, metrics, value_range=value_range),
        bound=codec.bound,
        is_within_bound=keeps(Pair(data, decoded), codec.bound),
    )


def dataset_ratio(reports: Iterable[QualityReport]) -> float | None:
    """Return the ratio of many arrays: the sum of bytes over the sum of stored bytes."""
    pairs = [(report.raw_bytes, report.stored_bytes) for report in reports]
    stored = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / stored if stored else None


def host_array(tensor: Any) -> ArrayData:
    """Return a tensor, array or `ArrayData` as `ArrayData` in host memory.

    Raises:
        CodecError: the type or layout is not supported.
    """
    if isinstance(tensor, ArrayData):
        return tensor
    return as_array(tensor.detach().cpu() if isinstance(tensor, torch.Tensor) else tensor)


def as_object(data: ArrayData) -> Any:
    """Return what `Codec.encode` takes as this array and type."""
    if data.dtype not in BIT_TYPES:
        return data.values
    return torch.from_numpy(data.values).view(BIT_TYPES[data.dtype][1])


def keeps(pair: Pair, bound: Bound) -> bool | None:
    """Return whether all elements of a pair are within `bound`; None if that is "none"."""
    if bound.kind == "none":
        return None
    if bound.kind == "lossless":
        return pair.is_same_bits
    if pair.extremes.mismatched:
        return False
    if not pair.extremes.count:
        return True
    if bound.kind == "pw_rel":
        # The product is rounded: one unit in the last place is the check's, not the codec's.
        slack = 1 + 2.0**-52
        return all(
            bool((np.abs(e) <= bound.value * np.abs(x) * slack).all()) for x, e in pair.pieces()
        )
    limit = Fraction(bound.value)
    if bound.kind == "rel":
        limit *= Fraction(pair.extremes.high) - Fraction(pair.extremes.low)
    # Rounding is monotone: only differences that round to the limit itself need a closer look.
    if Fraction(pair.extremes.max_abs_error) < limit:
        return True
    return all(_within(x, y, limit) for x, y in pair.values())


def _within(x: Floats, y: Floats, limit: Fraction) -> bool:
    with np.errstate(over="ignore"):
        error = np.abs(y - x)
    nearest = float(limit)
    if (error > np.nextafter(nearest, np.inf)).any():
        return False
    is_close = error >= np.nextafter(nearest, 0)
    # The same difference occurs again and again in quantised values.
    close = np.unique(np.stack([x[is_close], y[is_close]], axis=1), axis=0)
    return all(abs(Fraction(after) - Fraction(before)) <= limit for before, after in close.tolist())
