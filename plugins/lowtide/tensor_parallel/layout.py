"""Which ranks share one model and which train copies of the same part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lowtide.core.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """The groups that this process belongs to.

    Attributes:
        tensor_group: Ranks that hold one model together; None: this one alone, outside of any
            job. A group of one is a group: DeepSpeed sums norms over it, and over all ranks of
            the job where there is none.
        data_group: Ranks that hold the same part of it.
        tensor_ranks: Global ranks of `tensor_group`.
        data_ranks: Global ranks of `data_group`.
    """

    tensor_group: Any
    data_group: Any
    tensor_ranks: tuple[int, ...]
    data_ranks: tuple[int, ...]


def check_degree(degree: int, world_size: int) -> None:
    """Refuse a degree that does not divide the number of ranks.

    Raises:
        ConfigError: it does not.
    """
    if world_size % degree:
        allowed = [p for p in range(1, world_size + 1) if world_size % p == 0]
        raise ConfigError(
            f"lowtide.tensor_parallel.degree: got {degree}, which does not divide the "
            f"{world_size} rank(s) of this job; allowed are {allowed}"
        )


def build_layout(degree: int) -> Layout:
    """Form the groups: `degree` neighbours share a model. All ranks call this together.

    Neighbours, because they are the ones with the fast links between them.

    Raises:
        ConfigError: `degree` does not divide the number of ranks.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    check_degree(degree, world_size)
    tensor: list[tuple[int, ...]] = [
        tuple(range(first, first + degree)) for first in range(0, world_size, degree)
    ]
    data = [tuple(range(place, world_size, degree)) for place in range(degree)]
    tensor_group = data_group = None
    tensor_ranks: tuple[int, ...] = (rank,)
    data_ranks: tuple[int, ...] = (rank,)
    for ranks in tensor:  # every rank takes part in forming every group
        group = dist.new_group(ranks)
        if rank in ranks:
            tensor_group, tensor_ranks = group, ranks
    for ranks in data:
        group = dist.new_group(ranks)
        if rank in ranks:
            data_group, data_ranks = group, ranks
    return Layout(tensor_group, data_group, tensor_ranks, data_ranks)
