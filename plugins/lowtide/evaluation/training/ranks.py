"""What the ranks of a training run have to agree on."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from lowtide.core.errors import DataError


class OtherRankFailedError(DataError):
    """Another rank could not go on, so that no rank does."""


class Ranks:
    """All ranks of the run, or a single process.

    Args:
        per_model: Neighbouring ranks that hold parts of one model and see the same items.
    """

    def __init__(self, *, per_model: int = 1) -> None:
        is_up = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_up else 0
        self.size = dist.get_world_size() if is_up else 1
        self.shards = max(1, self.size // per_model)
        self.shard = self.rank // per_model
        is_nccl = is_up and "nccl" in str(dist.get_backend())
        self._device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else None

    def from_first(self, value: int) -> int:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        tensor = self._tensor([value])
        dist.broadcast(tensor, src=0)
        return int(tensor[0])

    def agree(self, forwards: int | None) -> int:
        """Return the most forward passes that any rank needs; None tells that this one failed.

        Raises:
            OtherRankFailedError: on every rank that did not fail itself, where another one did.
        """
        if self.size == 1:
            return forwards or 0
        tensor = self._tensor([forwards or 0, forwards is None])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        if int(tensor[1]) and forwards is not None:
            raise OtherRankFailedError("another rank failed; see its log")
        return int(tensor[0])

    def any_of(self, is_true: bool) -> bool:
        """Tell whether it is true on any rank."""
        if self.size == 1:
            return is_true
        tensor = self._tensor([is_true])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor[0])

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, on all ranks.

        The ranks are of one run and trust each other as they do with its gradients.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def are_alike(self, value: Any) -> bool:
        """Tell whether all ranks have the same value."""
        return len({pickle.dumps(each) for each in self.gather(value)}) == 1

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(
            [int(value) for value in values], dtype=torch.int64, device=self._device
        )
