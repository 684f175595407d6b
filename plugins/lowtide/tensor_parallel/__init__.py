"""Bottleneck-aware tensor parallelism: low-rank models of which only latents are sent."""

from lowtide.tensor_parallel.bottleneck import BottleneckLinear
from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.factorise import Factorisation, factorise
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.patterns import (
    LayerInputs,
    LayerPattern,
    ModelPattern,
    ModelShape,
    Projection,
    register_pattern,
)
from lowtide.tensor_parallel.shard import (
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
