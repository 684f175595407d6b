"""Inference optimizations that can be stacked, measured and undone.

``Stack(["prune.wanda:0.5", "quant.rtn:4"]).apply(model)`` changes a model until it is undone;
``read`` runs a prompt through it; ``optimizations`` lists the methods by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.evaluation.optimizations.base import Context
    from lowtide.evaluation.optimizations.reading import read
    from lowtide.evaluation.optimizations.registry import optimizations
    from lowtide.evaluation.optimizations.stack import Stack

__all__ = ["Context", "Stack", "optimizations", "read"]

_HOMES = {"Context": "base", "Stack": "stack", "optimizations": "registry", "read": "reading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
