"""Quality of lossy compression: metrics, measurement, choice of codec and bound.

``evaluate`` compares two arrays, ``measure`` puts one through a codec, ``select`` finds the codec
and bound that are smallest under quality targets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.quality.metrics.evaluation import evaluate

__all__ = ["evaluate"]

_HOMES = {
    "evaluate": "lowtide.quality.metrics.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No module here may bear one of these names: imported, it would stand in place of the function.
    return getattr(import_module(_HOMES[name]), name)
