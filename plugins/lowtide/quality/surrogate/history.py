"""Predictions with a memory: one tensor of a run, predicted again and again, sometimes measured.

What a prediction was off by stays much the same from step to step. So with an earlier measurement
the surrogate predicts the change: what was measured then, plus what stage 2 says now, less what it
said then. How much of that to believe is learned for each codec and metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowtide.quality.candidates import Candidate
from lowtide.quality.measurement import QualityReport
from lowtide.quality.predictors import Estimate
from lowtide.quality.surrogate.features import FeatureHandle
from lowtide.quality.surrogate.samples import Label

if TYPE_CHECKING:
    from lowtide.quality.surrogate.model import QualitySurrogate

Floats = NDArray[np.float64]
Memory = Mapping[str, Mapping[float, Floats]]  # head -> log10 of relative bound -> what was off

_REACH = 0.5  # decades from a measured bound within which its error says something


def recalled(known: Mapping[float, Floats], decades: Floats, metrics: int) -> Floats:
    """Return what was off at the nearest measured bounds, less the farther they are.

    Args:
        known: By log10 of relative bound; NaN for metrics that were not measured.
        decades: log10 of relative bounds that are asked for, shape (bounds,).
        metrics: How many there are.

    Returns:
        float64, shape (bounds, metrics).
    """
    found = np.zeros((len(decades), metrics))
    if not known:
        return found
    measured = np.array(list(known))
    errors = np.nan_to_num(np.stack(list(known.values())))
    for row, decade in zip(found, decades, strict=True):
        distances = np.abs(measured - decade)
        nearest = int(distances.argmin())
        row[:] = errors[nearest] * np.exp(-((distances[nearest] / _REACH) ** 2))
    return found


class Following:
    """A `Predictor` for one tensor over time: a surrogate that remembers what was measured.

    Args:
        surrogate: Fitted; shared by any number of these.
    """

    name = "surrogate_following"

    def __init__(self, surrogate: QualitySurrogate) -> None:
        self._surrogate = surrogate
        self._handle: FeatureHandle | None = None
        self._memory: dict[str, dict[float, Floats]] = {}

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `Predictor.predict`; what is measured next is taken to be of this array."""
        return self.predict_from_features(self._surrogate.extract_features(tensor), candidates)

    def predict_from_features(
        self, handle: FeatureHandle, candidates: Sequence[Candidate]
    ) -> list[Estimate]:
        """Return the same from stage 1."""
        self._handle = handle
        return self._surrogate.predict_from_features(handle, candidates, memory=self._memory)

    def observe(self, report: QualityReport) -> None:
        """Remember what the prediction of the last array was off by; the newest counts."""
        self.remember(Label.of(report))

    def remember(self, label: Label) -> None:
        """Do the same from a label."""
        if self._handle is None:
            return
        found = self._surrogate.residual(self._handle, label)
        if found is not None:
            head, decade, residual = found
            self._memory.setdefault(head, {})[round(decade, 9)] = residual

    def forget(self) -> None:
        """Forget all measurements."""
        self._memory.clear()
