"""`QualitySurrogate`: quality of lossy codecs, predicted from one look at the array.

After DeepCQ (arXiv 2512.21433): an expensive first stage that is the same for all codecs, bounds
and metrics, a cheap second one for each codec, and mixtures of experts for data that change over
time. Network, sizes, inputs and training are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import DataError
from lowtide.quality.candidates import Candidate
from lowtide.quality.measurement import QualityReport
from lowtide.quality.predictors import Estimate
from lowtide.quality.surrogate.features import FeatureHandle
from lowtide.quality.surrogate.fitting import Fitted, Settings, fitted_heads, fitted_stage
from lowtide.quality.surrogate.history import Memory, recalled
from lowtide.quality.surrogate.outputs import from_scale, probed_at, scaled, with_derived
from lowtide.quality.surrogate.probe import at_bound
from lowtide.quality.surrogate.samples import (
    Label,
    Sample,
    codec_of,
    digest_of,
    head_of,
    relative_of,
)
from lowtide.quality.surrogate.stage import Stage
from lowtide.quality.surrogate.storage import loaded, saved

Floats = NDArray[np.float64]

_EDGE = 1e-3  # decades: how far beyond what was learned a bound may be


class QualitySurrogate:
    """A `Predictor` that learns from measurements.

    Predicts for codecs it has labels of, in the modes "abs" and "rel", between the bounds it
    learned; other candidates get estimates without metrics. Arrays unlike its training set are
    marked: `select` measures them.

    Args:
        settings: How to learn.
        confidence: Of intervals: this share of arrays like those of the last steps is inside.
    """

    name = "surrogate"

    def __init__(self, settings: Settings | None = None, *, confidence: float = 0.9) -> None:
        if not 0 < confidence < 1:
            raise DataError(f"confidence {confidence}: allowed are numbers between 0 and 1")
        self.settings = Settings() if settings is None else settings
        self.confidence = confidence
        self._fitted: Fitted | None = None

    # -- learning -----------------------------------------------------------------------------

    def fit(self, samples: Sequence[Sample]) -> QualitySurrogate:
        """Learn both stages; what was learned before is forgotten. Deterministic.

        Raises:
            DataError: no sample has a label of a codec with an absolute or relative bound.
        """
        samples = list(samples)
        stage, familiarity = fitted_stage(samples, self.settings)
        heads = fitted_heads(stage, samples, self.settings)
        self._fitted = Fitted(stage, familiarity, heads, digest_of(samples))
        return self

    def add_compressor(self, name: str, samples: Sequence[Sample]) -> list[str]:
        """Learn the heads of one more codec, and nothing else: stage 1 and other heads stay.

        Args:
            name: Registered name of the codec.
            samples: Arrays with labels of it; labels of others are not looked at.

        Returns:
            The new heads' names.

        Raises:
            DataError: it is known already, or `samples` have no label of it.
        """
        fitted = self._ready()
        if any(each == name for each in self.codecs()):
            raise DataError(f'codec "{name}": is known already; fit a surrogate anew to change it')
        own = [
            replace(each, labels=labels)
            for each in samples
            if (labels := [label for label in each.labels if label.candidate.codec == name])
        ]
        if not own:
            raise DataError(f'codec "{name}": none of {len(samples)} samples has a label of it')
        found = fitted_heads(fitted.stage, own, self.settings, only=name)
        self._fitted = replace(fitted, heads={**fitted.heads, **found})
        return list(found)

    # -- predicting ---------------------------------------------------------------------------

    def extract_features(self, tensor: Any) -> FeatureHandle:
        """Return stage 1 of an array: once for each array, whatever is asked about it later.

        Raises:
            DataError: the array is not floating-point, empty, constant, or not finite.
        """
        return self.stage.extract(tensor)

    def predict(self, tensor: Any, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `Predictor.predict`.

        Raises:
            DataError: as for `extract_features`.
        """
        return self.predict_from_features(self.extract_features(tensor), candidates)

    def predict_from_features(
        self,
        handle: FeatureHandle,
        candidates: Sequence[Candidate],
        *,
        memory: Memory | None = None,
    ) -> list[Estimate]:
        """Return stage 2: one estimate for each candidate.

        Args:
            handle: Of `extract_features` of this surrogate, or of the one it was made from.
            candidates: Whose quality is asked for.
            memory: What `Following` knows of earlier measurements.
        """
        fitted = self._ready()
        is_familiar = fitted.familiarity.knows(fitted.stage.description(handle.plain))
        empty = {} if memory is None else memory
        found = {n: Estimate(c, {}, self.name, is_familiar) for n, c in enumerate(candidates)}
        for name, numbers, places in self._places(handle, candidates):
            known = empty.get(name, {})
            head = fitted.heads[name]
            calibration = head.remembering if known else head.calibration
            relatives = [relative_of(candidates[n], handle.plain.value_range) for n in numbers]
            decades = np.log10(relatives)
            places = places + head.memory * recalled(known, decades, places.shape[1])
            widths = calibration.half_widths(decades, self.confidence)
            for n, relative, place, width in zip(numbers, relatives, places, widths, strict=True):
                metrics = {
                    metric: from_scale(metric, float(at), float(half))
                    for metric, at, half, is_known in zip(
                        self.settings.metrics, place, width, head.known, strict=True
                    )
                    if is_known
                }
                metrics = with_derived(
                    metrics, relative=relative, value_range=handle.plain.value_range,
                    item_bits=handle.plain.item_bits,
                )  # fmt: skip
                found[n] = Estimate(candidates[n], metrics, self.name, is_familiar)
        return [found[n] for n in range(len(candidates))]

    def observe(self, report: QualityReport) -> None:
        """Learn nothing: see `following` for what remembers."""

    def residual(self, handle: FeatureHandle, label: Label) -> tuple[str, float, Floats] | None:
        """Return head, log10 of the relative bound, and how far a prediction was off.

        On the scales of metrics, NaN for those that were not measured; None without a head.
        """
        for name, _, places in self._places(handle, [label.candidate]):
            measured = scaled(self.settings.metrics, label.values)
            relative = relative_of(label.candidate, handle.plain.value_range)
            return name, float(np.log10(relative)), measured - places[0]
        return None

    def _places(
        self, handle: FeatureHandle, candidates: Sequence[Candidate]
    ) -> Iterator[tuple[str, list[int], Floats]]:
        """Yield by head: its name, the numbers of its candidates, places on scales of metrics."""
        fitted = self._ready()
        plain = fitted.stage.checked(handle).plain
        groups: dict[str, list[int]] = {}
        for number, candidate in enumerate(candidates):
            name = head_of(candidate)
            if name in fitted.heads:
                low, high = fitted.heads[name].decades
                decade = np.log10(relative_of(candidate, plain.value_range))
                if low - _EDGE <= decade <= high + _EDGE:
                    groups.setdefault(name, []).append(number)
        for name, numbers in groups.items():
            relatives = [relative_of(candidates[n], plain.value_range) for n in numbers]
            x, gates = fitted.stage.rows(plain, handle.embedding, relatives)
            probed = np.stack([at_bound(plain.probe, relative) for relative in relatives])
            prior = [probed_at(m, probed, plain.item_bits) for m in self.settings.metrics]
            residual = fitted.heads[name].networks.predict(x, gates)
            yield name, numbers, np.stack(prior, axis=1) + residual

    # -- on disk ------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file: arrays, and JSON about them."""
        saved(self._ready(), self.settings, self.confidence, Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> QualitySurrogate:
        """Return what `save` wrote; it predicts the same bits.

        Logs a warning for each codec that is of another version here.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptStreamError: it is damaged, or of another format or feature schema.
        """
        fitted, settings, confidence = loaded(Path(path))
        surrogate = cls(settings, confidence=confidence)
        surrogate._fitted = fitted
        return surrogate

    # -- what it is ---------------------------------------------------------------------------

    def codecs(self) -> list[str]:
        """Return registered names of the codecs that have heads."""
        return sorted({codec_of(name) for name in self._ready().heads})

    @property
    def stage(self) -> Stage:
        """Stage 1, frozen."""
        return self._ready().stage

    def describe(self) -> dict[str, Any]:
        """Return JSON types: what was learned, from what, and how experts are used."""
        fitted = self._ready()
        return {
            "stage": fitted.stage.fingerprint,
            "training_set": fitted.training_set,
            "metrics": list(self.settings.metrics),
            "confidence": self.confidence,
            "heads": {
                name: {
                    "version": head.version,
                    "bounds": [10**decade for decade in head.decades],
                    "calibration_count": head.calibration.count.tolist(),
                    "memory": [round(float(each), 3) for each in head.memory],
                    "expert_utilisation": [round(each, 3) for each in head.utilisation],
                }
                for name, head in fitted.heads.items()
            },
        }

    def _ready(self) -> Fitted:
        if self._fitted is None:
            raise DataError("this surrogate has learned nothing yet; fit it, or load one")
        return self._fitted
