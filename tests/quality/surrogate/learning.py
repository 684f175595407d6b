"""A training set that is small enough for tests, and a surrogate that learned it."""

from __future__ import annotations

import functools

from lowtide.quality.candidates import Candidate
from lowtide.quality.study.fields import Snapshot, snapshots
from lowtide.quality.surrogate.fitting import Settings
from lowtide.quality.surrogate.model import QualitySurrogate
from lowtide.quality.surrogate.networks import Shape
from lowtide.quality.surrogate.samples import Sample, labelled

BOUNDS = (1e-1, 1e-2, 1e-3, 1e-4)
SETTINGS = Settings(heads=Shape(members=2, width=16, steps=200), epochs=1)
STEPS, LEARNED = 10, 8


def candidates(predictor: str, mode: str = "rel", unit: float = 1.0) -> list[Candidate]:
    return [
        Candidate("lowtide.sz", {"predictor": predictor}, mode, bound * unit) for bound in BOUNDS
    ]


@functools.cache
def fields() -> tuple[Snapshot, ...]:
    return tuple(snapshots(("turbulence", "gray_scott"), edge=64, steps=STEPS))


@functools.cache
def samples(predictor: str = "differences") -> tuple[Sample, ...]:
    return tuple(
        labelled(each.values, candidates(predictor), series=each.series, step=each.step)
        for each in fields()
    )


@functools.cache
def surrogate() -> QualitySurrogate:
    """Learned the first steps of all series; not to be changed."""
    return QualitySurrogate(SETTINGS).fit([each for each in samples() if each.step < LEARNED])


def later() -> list[Sample]:
    return [each for each in samples() if each.step >= LEARNED]
