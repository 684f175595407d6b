"""Quality of lossy compression: metrics, measurement, choice of codec and bound.

``evaluate`` compares two arrays, ``measure`` puts one through a codec, ``select`` finds the codec
and bound that are smallest under quality targets, `QualitySurrogate` predicts what would be
measured.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.quality.candidates import Candidate
    from lowtide.quality.measurement import QualityReport, dataset_ratio, measure
    from lowtide.quality.metrics.evaluation import Evaluation, evaluate
    from lowtide.quality.predictors import Estimate, Predictor
    from lowtide.quality.selection import Selection, select
    from lowtide.quality.surrogate.history import Following
    from lowtide.quality.surrogate.model import QualitySurrogate
    from lowtide.quality.surrogate.samples import Sample, labelled
    from lowtide.quality.targets import Target

__all__ = [
    "Candidate",
    "Estimate",
    "Evaluation",
    "Following",
    "Predictor",
    "QualityReport",
    "QualitySurrogate",
    "Sample",
    "Selection",
    "Target",
    "dataset_ratio",
    "evaluate",
    "labelled",
    "measure",
    "select",
]

_HOMES = {
    "Candidate": "candidates",
    "QualityReport": "measurement",
    "dataset_ratio": "measurement",
    "measure": "measurement",
    "Evaluation": "metrics.evaluation",
    "evaluate": "metrics.evaluation",
    "Estimate": "predictors",
    "Predictor": "predictors",
    "Selection": "selection",
    "select": "selection",
    "Following": "surrogate.history",
    "QualitySurrogate": "surrogate.model",
    "Sample": "surrogate.samples",
    "labelled": "surrogate.samples",
    "Target": "targets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No module here may bear one of these names: imported, it would stand in place of the function.
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
