"""Bottleneck-aware tensor parallelism: low-rank models of which only latents are sent.

Names are imported when they are first asked for: planning needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "BottleneckLinear": "bottleneck",
    "Factorisation": "factorisation",
    "LayerInputs": "patterns",
    "LayerPattern": "patterns",
    "ModelPattern": "patterns",
    "ModelShape": "patterns",
    "Projection": "patterns",
    "Shards": "sharding",
    "TensorGroup": "group",
    "TensorParallelConfig": "config",
    "factorise": "factorisation",
    "load_unsharded_state_dict": "sharding",
    "register_pattern": "patterns",
    "shard": "sharding",
    "unsharded_state_dict": "sharding",
}

if TYPE_CHECKING:
    from lowtide.tensor_parallel.bottleneck import BottleneckLinear
    from lowtide.tensor_parallel.config import TensorParallelConfig
    from lowtide.tensor_parallel.factorisation import Factorisation, factorise
    from lowtide.tensor_parallel.group import TensorGroup
    from lowtide.tensor_parallel.patterns import (
        LayerInputs,
        LayerPattern,
        ModelPattern,
        ModelShape,
        Projection,
        register_pattern,
    )
    from lowtide.tensor_parallel.sharding import (
        Shards,
        load_unsharded_state_dict,
        shard,
        unsharded_state_dict,
    )

__all__ = [
    "BottleneckLinear",
    "Factorisation",
    "LayerInputs",
    "LayerPattern",
    "ModelPattern",
    "ModelShape",
    "Projection",
    "Shards",
    "TensorGroup",
    "TensorParallelConfig",
    "factorise",
    "load_unsharded_state_dict",
    "register_pattern",
    "shard",
    "unsharded_state_dict",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module = importlib.import_module(f"lowtide.tensor_parallel.{_HOMES[name]}")
        value = getattr(module, name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
