"""Arrays with what was measured on them: what a surrogate learns from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.quality.candidates import Candidate, Family
from lowtide.quality.measurement import QualityReport, measure
from lowtide.quality.surrogate.blocks import sample
from lowtide.quality.surrogate.embedding import pictures
from lowtide.quality.surrogate.features import Plain, plain_of
from lowtide.quality.surrogate.outputs import METRICS, RATIO
from lowtide.quality.surrogate.probe import NODES

Floats = NDArray[np.float64]
LEARNED = NODES[1:]  # of open families, in units of the range: 1e-1 to 1e-6
MODES = ("abs", "rel")  # the same in other units; a bound relative to each value is another thing


@dataclass(frozen=True)
class Label:
    """What was measured of one candidate.

    Attributes:
        candidate: Of which.
        values: Metrics by name, "compression_ratio" included.
    """

    candidate: Candidate
    values: Mapping[str, float | None]

    @classmethod
    def of(cls, report: QualityReport) -> Label:
        """Return the label that a measurement is."""
        return cls(report.candidate, {**report.evaluation, RATIO: report.ratio})


@dataclass(frozen=True)
class Sample:
    """One array and its labels.

    Attributes:
        tensor: Floating-point, finite, not constant.
        labels: At several bounds, of several codecs.
        series: Samples of the same series are the same thing at other times.
        step: Order within the series.
    """

    tensor: Any
    labels: Sequence[Label]
    series: str = ""
    step: int = 0

    @cached_property
    def seen(self) -> tuple[Plain, torch.Tensor]:
        """What stage 1 takes from the array: features without a network, and pictures for it."""
        blocks = sample(self.tensor)
        return plain_of(blocks), pictures(blocks.values)


def labelled(
    tensor: Any, candidates: Iterable[Candidate], *, series: str = "", step: int = 0,
    metrics: Sequence[str] = METRICS,
) -> Sample:  # fmt: skip
    """Return a sample of an array by measuring all candidates on it."""
    asked = [name for name in metrics if name != RATIO]
    labels = [Label.of(measure(tensor, candidate, asked)) for candidate in candidates]
    return Sample(tensor, labels, series, step)


def learning_candidates(families: Iterable[Family], value_range: float) -> list[Candidate]:
    """Return what is worth measuring to learn some families: two bounds in each decade.

    Args:
        families: Those without a bound, or with one relative to each value, are left out.
        value_range: Of the array: the unit of open "abs" bounds.
    """
    found = []
    for family in families:
        if family.mode not in MODES:
            continue
        unit = value_range if family.mode == "abs" else 1.0
        bounds = family.bounds or tuple(float(each) * unit for each in LEARNED)
        found += [Candidate(family.codec, family.options, family.mode, each) for each in bounds]
    return found


def head_of(candidate: Candidate) -> str | None:
    """Return which head a candidate belongs to: codec and options; None if it has no head.

    "abs" and "rel" are one: the same bound in other units.
    """
    if candidate.mode not in MODES or not candidate.bound:
        return None
    return replace(candidate, mode="rel").family


def codec_of(head: str) -> str:
    """Return the registered name of the codec that a head is of."""
    return str(json.loads(head)["id"])


def relative_of(candidate: Candidate, value_range: float) -> float:
    """Return the bound of a candidate with a head in units of the range."""
    bound = float(candidate.bound or 0.0)
    return bound if candidate.mode == "rel" else bound / value_range


def digest_of(samples: Sequence[Sample]) -> str:
    """Return a fingerprint of a training set: its arrays as stage 1 sees them, and its labels."""
    digest = hashlib.sha256()
    for each in samples:
        plain, _ = each.seen
        digest.update(plain.statistics.tobytes() + plain.probe.tobytes())
        rows = [[label.candidate.key, sorted(label.values.items())] for label in each.labels]
        digest.update(json.dumps([each.series, each.step, rows]).encode())
    return digest.hexdigest()
