"""Which vectors of a tensor a fit looks at, and which of them are this rank's."""

from __future__ import annotations

import torch
from torch import Tensor

from lowtide.kmeans.adapters.replicas import Replicas, Shard, shard_of


def of_parameter(
    parameter: Tensor, width: int, limit: int, replicas: Replicas
) -> tuple[Tensor, Replicas] | None:
    """Return this rank's vectors of a weight matrix, and the ranks that have the others.

    A parameter that every replica has whole is divided among them. Of one that ZeRO-3 has divided,
    each rank takes what it has, so nothing is gathered; a vector that lies on two ranks is left
    out.

    Args:
        parameter: Of two axes or more; any device.
        width: Values of a vector, consecutive in memory order.
        limit: Vectors of all ranks together, at most.
        replicas: The ranks that hold the same parameters.

    Returns:
        float32 (n, width) on the CPU, n may be 0; None for a tensor that has no vectors at all.
    """
    shard = shard_of(parameter, replicas)
    total = (parameter.numel() if shard is None else shard.numel) // width
    if total == 0:
        return None
    # Evenly spaced, and the same ones for any number of ranks.
    wanted = _evenly(total, limit)
    if shard is None:
        mine = wanted[replicas.rank :: replicas.size]
        source, begin = parameter.detach().reshape(-1), 0
    else:
        mine, begin = _within(wanted, shard, width)
        source = shard.values.detach().reshape(-1)
    places = (mine[:, None] * width + torch.arange(width) - begin).reshape(-1)
    values = source[places.to(source.device)].to("cpu", torch.float32).reshape(-1, width)
    return values, replicas if shard is None else shard.ranks


def of_activation(output: Tensor, width: int, limit: int, replicas: Replicas) -> Tensor | None:
    """Return this rank's sample of what a module gave out: float32 (n, width) on the CPU.

    Args:
        output: (..., features), features a multiple of `width`; else None is returned.
        width: Values of a vector.
        limit: Vectors of all ranks together, at most; each takes an equal part.
        replicas: The ranks that see other samples.
    """
    if output.dim() == 0 or output.shape[-1] % width or not output.is_floating_point():
        return None
    rows = output.detach().reshape(-1, width)
    mine = _evenly(len(rows), max(1, limit // replicas.size))
    return rows[mine.to(rows.device)].to("cpu", torch.float32)


def _evenly(count: int, limit: int) -> Tensor:
    """Return up to `limit` of the numbers 0 to count - 1, increasing."""
    chosen = min(count, limit)
    return torch.arange(chosen) * count // max(chosen, 1)


def _within(wanted: Tensor, shard: Shard, width: int) -> tuple[Tensor, int]:
    first, last = wanted * width, wanted * width + width
    is_here = (first >= shard.begin) & (last <= shard.begin + shard.values.numel())
    return wanted[is_here], shard.begin
