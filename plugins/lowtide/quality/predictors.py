"""What a codec will do to an array, without running it on all of the array.

The baselines that a learned surrogate has to beat: a closed form, blocks that are measured, and
what was measured last. All are `Predictor`s, and so is the surrogate.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowtide.core.errors import UnknownNameError, listed, near
from lowtide.core.stream import ArrayData
from lowtide.quality.candidates import Candidate
from lowtide.quality.measurement import QualityReport, as_object, host_array, measure
from lowtide.quality.metrics.pair import Pair
from lowtide.quality.metrics.registry import Scale
from lowtide.quality.targets import scale_of

_UNIFORM = 10 * math.log10(3)  # dB that errors spread evenly within a bound are below the bound


class Interval(NamedTuple):
    """A predicted value and where the true one is expected to be."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Estimate:
    """What is predicted of one candidate.

    Attributes:
        candidate: Of which.
        metrics: By name, "compression_ratio" and "bit_rate" included; what is not there is not
            predicted.
        source: Who predicted it.
        is_familiar: False where the array is unlike all that the predictor knows.
    """

    candidate: Candidate
    metrics: Mapping[str, Interval]
    source: str
    is_familiar: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types; infinite ends are null."""
        return {
            "codec": self.candidate.config(),
            "source": self.source,
            "is_familiar": self.is_familiar,
            "metrics": {
                name: {part: value if math.isfinite(value) else None for part, value in
                       interval._asdict().items()}
                for name, interval in self.metrics.items()
            },
        }  # fmt: skip


class Predictor(Protocol):
    """Anything that predicts quality."""

    name: str

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Return one estimate for each candidate, in their order.

        Args:
            tensor: Floating-point, finite, not constant; array, tensor or `ArrayData`.
            candidates: Whose quality is asked for; unknown codecs get estimates without metrics.
        """

    def observe(self, report: QualityReport) -> None:
        """Hear what was measured on an array that was predicted."""


def value_range_of(tensor: Any) -> float:
    """Return max - min of the finite values; nan without one."""
    data = host_array(tensor)
    return Pair(data, data).value_range


def relative_bound(candidate: Candidate, value_range: float) -> float | None:
    """Return a candidate's bound in units of the range; None without one, or for "pw_rel"."""
    if candidate.mode == "rel":
        return candidate.bound
    if candidate.mode == "abs" and candidate.bound is not None and value_range > 0:
        return candidate.bound / value_range
    return None


class ClosedForm:
    """Errors taken to be spread evenly within the bound: PSNR = -20 log10(bound) + 10 log10(3).

    Source: Tao et al., Fixed-PSNR lossy compression (2018). Says nothing about the size. Codecs
    whose errors are smaller than their bound allows are better than predicted.

    Args:
        margin_db: Half the width of the interval around the PSNR.
    """

    name = "closed_form"

    def __init__(self, margin_db: float = 0.1) -> None:
        self.margin_db = margin_db

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `Predictor.predict`."""
        spread = value_range_of(tensor)
        return [
            Estimate(candidate, self._metrics(relative_bound(candidate, spread), spread), self.name)
            for candidate in candidates
        ]

    def observe(self, report: QualityReport) -> None:
        """Learn nothing."""

    def _metrics(self, relative: float | None, spread: float) -> dict[str, Interval]:
        if relative is None or not relative:
            return {}
        decibels = -20 * math.log10(relative) + _UNIFORM
        factor = 10 ** (self.margin_db / 20)
        root = relative / math.sqrt(3)
        around = Interval(root, root / factor, root * factor)
        largest = Interval(relative, 0.0, relative)
        return {
            "psnr_db": Interval(decibels, decibels - self.margin_db, decibels + self.margin_db),
            "nrmse": around,
            "rmse": Interval(*(value * spread for value in around)),
            "mse": Interval(*((value * spread) ** 2 for value in around)),
            "max_rel_error": largest,
            "max_abs_error": Interval(*(value * spread for value in largest)),
        }


_SAMPLED = ("rmse", "nrmse", "psnr_db", "mse", "max_abs_error", "max_rel_error", "dssim", "ssim")


class BlockSampling:
    """Blocks spread over the array, put together and measured as if they were all of it.

    Bounds relative to the range use the range of the whole array. The bytes that any stream has,
    whatever its length, are counted once and not for each share.

    Args:
        share: Of the elements, above 0 and up to 1.
        blocks: Into how many parts the sample is cut; each is whole rows of the first axes.
    """

    name = "block_sampling"

    def __init__(self, share: float = 0.05, *, blocks: int = 8) -> None:
        self.share, self.blocks = share, blocks

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `Predictor.predict`."""
        data = host_array(tensor)
        spread = value_range_of(data)
        sample = self.sample(data)
        return [self._estimate(data, sample, candidate, spread) for candidate in candidates]

    def observe(self, report: QualityReport) -> None:
        """Learn nothing."""

    def sample(self, data: ArrayData) -> ArrayData:
        """Return blocks of an array, joined along the first axis."""
        shape = _spatial(data.values.shape)
        values = data.values.reshape(shape)
        if values.size * self.share < 1:
            return data
        # Near cubes: the same part of each axis, but whole axes where they are short.
        part = (self.share / self.blocks) ** (1 / len(shape))
        edges: list[int] = [min(length, max(8, round(length * part))) for length in shape]
        wanted = max(1, round(values.size * self.share / math.prod(edges)))
        places = np.random.default_rng(wanted).permutation(wanted)
        cuts = []
        for number in range(wanted):
            # Evenly along the first axis, in any order along the others.
            shifts = (0.0, places[number] / wanted, 0.618 * number)
            corner = [
                int((shape[axis] - edge) * (((number + 0.5) / wanted + shifts[axis]) % 1.0))
                for axis, edge in enumerate(edges)
            ]
            cuts.append(values[tuple(slice(c, c + e) for c, e in zip(corner, edges, strict=True))])
        return ArrayData(np.ascontiguousarray(np.concatenate(cuts)), data.dtype)

    def _estimate(
        self, data: ArrayData, sample: ArrayData, candidate: Candidate, spread: float
    ) -> Estimate:
        used = candidate
        if candidate.mode == "rel" and candidate.bound is not None and spread < math.inf:
            used = replace(candidate, mode="abs", bound=candidate.bound * spread)
        report = measure(sample, used, _SAMPLED, value_range=spread)
        metrics = {
            name: Interval(value, value, value)
            for name, value in report.evaluation.items()
            if value is not None
        }
        one = ArrayData(
            sample.values.reshape(-1)[:1].reshape((1,) * sample.values.ndim), data.dtype
        )
        fixed = len(used.build().encode(as_object(one)))
        growing = max(0, report.stream_bytes - fixed) * data.values.size / sample.values.size
        stored = min(data.values.nbytes, fixed + growing)
        ratio, rate = data.values.nbytes / stored, 8 * stored / data.values.size
        metrics["compression_ratio"] = Interval(ratio, ratio, ratio)
        metrics["bit_rate"] = Interval(rate, rate, rate)
        return Estimate(candidate, metrics, self.name)


def _spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape of at most 3 axes longer than 1; leading ones are merged."""
    shape = tuple(length for length in shape if length > 1) or (1,)
    return shape if len(shape) <= 3 else (math.prod(shape[:-2]), *shape[-2:])


class Persistence:
    """What was measured last time is what will be measured: for one tensor of a run over steps.

    Between measured bounds of a family, values are interpolated on the scale of decades; beyond
    them, errors grow with the bound, and each decade of it saves log2(10) bits of each value.
    """

    name = "persistence"

    def __init__(self) -> None:
        self._families: dict[str, dict[float, QualityReport]] = {}  # bound -> the newest

    def observe(self, report: QualityReport) -> None:
        """Remember a measurement; an older one of the same candidate is forgotten."""
        bound = report.candidate.bound or 0.0
        self._families.setdefault(report.candidate.family, {})[bound] = report

    def forget(self) -> None:
        """Forget everything."""
        self._families.clear()

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `Predictor.predict`; what was measured on another number of elements is no use."""
        size = host_array(tensor).values.size
        return [
            Estimate(candidate, self._metrics(candidate, size), self.name)
            for candidate in candidates
        ]

    def _metrics(self, candidate: Candidate, size: int) -> dict[str, Interval]:
        reports = self._families.get(candidate.family, {})
        known = {bound: each for bound, each in reports.items() if each.elements == size}
        if not known:
            return {}
        bound = candidate.bound or 0.0
        if bound in known:
            near = [known[bound]]
        else:
            bounds = sorted(known)
            at = bisect_left(bounds, bound)
            near = [known[each] for each in bounds[max(0, at - 1) : at + 1]]
        found = {}
        for name in near[0].evaluation:
            value = _quality(name, near, bound)
            if value is not None:
                found[name] = Interval(value, value, value)
        rate, ratio = _bit_rate(near, bound), near[0].ratio
        if rate and ratio and near[0].bit_rate:
            ratio *= near[0].bit_rate / rate
            found["bit_rate"] = Interval(rate, rate, rate)
            found["compression_ratio"] = Interval(ratio, ratio, ratio)
        return found


def _quality(name: str, near: Sequence[QualityReport], bound: float) -> float | None:
    """Return a quality metric at `bound` from what was measured at one or two bounds."""
    if any(name not in report.evaluation for report in near):
        return None
    values = [report.evaluation[name] for report in near]
    if values[0] is None or (near[0].candidate.bound or 0.0) == bound:
        return values[0]
    scale = scale_of(name)
    scales = [scale.decades(value) for value in values if value is not None]
    if len(scales) != len(near) or not all(math.isfinite(each) for each in scales):
        return None
    return scale.value(_line([report.candidate for report in near], scales, bound, slope=-1.0))


def _bit_rate(near: Sequence[QualityReport], bound: float) -> float | None:
    rates = [report.bit_rate for report in near if report.bit_rate is not None]
    if len(rates) != len(near):
        return None
    line = _line([report.candidate for report in near], rates, bound, slope=-math.log2(10))
    return max(line, min(rates) / 4)


def _line(
    near: Sequence[Candidate], values: Sequence[float], bound: float, *, slope: float
) -> float:
    """Return the value at `bound` on a line over log10(bound), through one point or two."""
    first = near[0].bound
    if first is None or first == bound:
        return values[0]
    along = math.log10(bound / first)
    if len(near) == 2 and near[1].bound is not None:
        slope = (values[1] - values[0]) / math.log10(near[1].bound / first)
    return values[0] + slope * along


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    each.name: each for each in (ClosedForm, BlockSampling, Persistence)
}


def predictor_of(name: str) -> Predictor:
    """Return a new predictor.

    Raises:
        UnknownNameError: no such predictor.
    """
    if name not in PREDICTORS:
        raise UnknownNameError(
            f'unknown predictor "{name}".{near(name, PREDICTORS)} Known: {listed(PREDICTORS)}'
        )
    return PREDICTORS[name]()


def interpolated(
    estimates: Sequence[Estimate], candidates: Sequence[Candidate], names: Collection[str]
) -> list[Estimate]:
    """Return estimates for all bounds of one family from those for some of them.

    Args:
        estimates: Of one family, ascending bounds, at least one.
        candidates: The same family; bounds beyond the predicted ones are left out.
        names: Of the metrics that are wanted.
    """
    bounds = [estimate.candidate.bound or 0.0 for estimate in estimates]
    found = []
    for candidate in candidates:
        bound = candidate.bound or 0.0
        at = min(bisect_left(bounds, bound * (1 - 1e-12)), len(bounds) - 1)
        after = estimates[at]
        if math.isclose(bounds[at], bound, rel_tol=1e-9) or bounds[at] == bound:
            found.append(replace(after, candidate=candidate))
        elif bounds[0] < bound < bounds[-1]:
            share = math.log(bound / bounds[at - 1]) / math.log(bounds[at] / bounds[at - 1])
            found.append(_between(estimates[at - 1], after, share, candidate, names))
    return found


def _between(
    before: Estimate, after: Estimate, share: float, candidate: Candidate, names: Collection[str]
) -> Estimate:
    metrics = {}
    for name in names:
        start, end = before.metrics.get(name), after.metrics.get(name)
        if start is not None and end is not None:
            scale = scale_of(name)
            metrics[name] = Interval(
                *(_mixed(scale, a, b, share) for a, b in zip(start, end, strict=True))
            )
    is_familiar = before.is_familiar and after.is_familiar
    return Estimate(candidate, metrics, after.source, is_familiar)


def _mixed(scale: Scale, start: float, end: float, share: float) -> float:
    if start == end:
        return start
    try:
        low, high = scale.decades(start), scale.decades(end)
    except ValueError:  # an end without a logarithm: the looser bound stands for both
        return end
    if not (math.isfinite(low) and math.isfinite(high)):
        return end
    return scale.value(low + (high - low) * share)
