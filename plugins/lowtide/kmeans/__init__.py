"""Fault-tolerant K-Means: scikit-learn's estimator with checksums inside.

`KMeans` clusters numpy arrays and torch tensors; `Protection` says which silent errors of the
hardware it looks for, `FaultReport` what it found.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.kmeans.estimator import KMeans
    from lowtide.kmeans.protection import FaultReport, Protection

__all__ = ["FaultReport", "KMeans", "Protection"]

_HOMES = {
    "KMeans": "lowtide.kmeans.estimator",  # imports torch, and scikit-learn where it is installed
    "FaultReport": "lowtide.kmeans.protection",
    "Protection": "lowtide.kmeans.protection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
