"""Which ranks hold the same parameters, and which part of a divided one this rank has.

DeepSpeed 0.19.8: ``engine.data_parallel_group``; ZeRO-3's ``param.ds_tensor`` (the flat part of
this rank, padded at the end of the last one), ``ds_numel`` and ``ds_process_group``
(``runtime/zero/partition_parameters.py``). Megatron-core 0.16: ``parallel_state``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """Ranks that hold the same parameters and see different samples.

    Attributes:
        rank: Of this process among them.
        size: How many they are.
        group: Their process group; None where this one is alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


@dataclass(frozen=True)
class Shard:
    """This rank's part of a parameter that ZeRO-3 has divided.

    Attributes:
        values: Flat; what is behind the end of the whole parameter is padding.
        begin: Where it begins in the whole parameter.
        numel: Of the whole parameter.
        ranks: Those that have the other parts.
    """

    values: Tensor
    begin: int
    numel: int
    ranks: Replicas


def replicas_of(host: str, engine: Any) -> Replicas:
    """Return this process's place among its replicas.

    Args:
        host: Name of the host.
        engine: DeepSpeed's engine, or None for other hosts.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Replicas()
    if engine is not None:
        group = engine.data_parallel_group
    elif host == "megatron":
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group()
    else:
        group = dist.group.WORLD
    return _within(group)


def shard_of(parameter: Any, replicas: Replicas) -> Shard | None:
    """Return this rank's part of a parameter, or None for one that it has whole."""
    if not hasattr(parameter, "ds_tensor"):
        return None
    group = getattr(parameter, "ds_process_group", None)
    ranks = replicas if group is None else _within(group)
    part = parameter.ds_tensor
    begin = ranks.rank * part.numel()
    return Shard(part.reshape(-1), begin, parameter.ds_numel, ranks)


def is_expert(parameter: Any) -> bool:
    """Tell whether a parameter belongs to an expert, which other replicas do not have."""
    return getattr(parameter, "allreduce", True) is False


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the whole parameter, divided or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _within(group: Any) -> Replicas:
    size = dist.get_world_size(group)
    return Replicas() if size == 1 else Replicas(dist.get_rank(group), size, group)
