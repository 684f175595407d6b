"""The ranks that share a clustering: sums over all of them, and errors that reach all of them.

Every rank has its own samples (a shard, of any size) and the same centroids. A Lloyd iteration
adds up one packed float64 vector. gloo and NCCL reduce each of its elements in one place and hand
the result out, so that all ranks hold the same bits and take the same decisions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import ConfigError, DataError, LowtideError

T = TypeVar("T")
Vector = NDArray[np.float64]


class Group:
    """One process alone; `Ranks` is several."""

    rank = 0
    size = 1

    def sum(self, values: Vector) -> Vector:
        """Return the sum of all ranks' values (same shape everywhere), the same bits on each."""
        return values

    def gather(self, rows: Vector) -> list[Vector]:
        """Return every rank's (n, d) rows in order of ranks; n may differ."""
        return [rows]

    def is_any(self, flag: bool) -> bool:
        """Return whether the flag of any rank is set."""
        return flag

    def same(self, value: int) -> int:
        """Return rank 0's value."""
        return value

    def agree(self, values: Vector, *, is_right: bool) -> bool:  # noqa: ARG002
        """Return whether all ranks hold the same bits and each finds them right."""
        return is_right

    def together(self, work: Callable[[], T]) -> T:
        """Return what `work` does on this rank; its error on any rank is an error on all.

        Raises:
            LowtideError: it failed on another rank; the text has that rank and what it said.
        """
        return work()

    def failed(self, error: BaseException | None) -> None:
        """Raise on all ranks; called by all, by those that failed with their error."""
        if error is not None:
            raise error


class Ranks(Group):
    """The ranks of a torch.distributed process group.

    Args:
        group: The group; None is that of all ranks.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "process_group: torch.distributed is not initialised; call "
                "torch.distributed.init_process_group first, or pass None"
            )
        self._dist = dist
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ConfigError("process_group: this rank is not in the group; pass one that has it")
        is_nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else None

    def sum(self, values: Vector) -> Vector:
        """See `Group.sum`."""
        sent = self._sent(np.array(values, np.float64))
        self._dist.all_reduce(sent, group=self._group)
        return self._received(sent)

    def gather(self, rows: Vector) -> list[Vector]:
        """See `Group.gather`."""
        counts = [int(part[0]) for part in self._gather_same(np.array([len(rows)], np.float64))]
        padded = np.zeros((max(counts), rows.shape[1]))
        padded[: len(rows)] = rows
        if not padded.size:
            return [padded[:0] for _ in counts]
        return [part[:count] for part, count in zip(self._gather_same(padded), counts, strict=True)]

    def is_any(self, flag: bool) -> bool:
        """See `Group.is_any`."""
        return bool(self.sum(np.array([float(flag)]))[0] > 0)

    def same(self, value: int) -> int:
        """See `Group.same`."""
        return int(self._gather_same(np.array([float(value)]))[0][0])

    def agree(self, values: Vector, *, is_right: bool) -> bool:
        """See `Group.agree`."""
        digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=6).digest()
        mine = float(int.from_bytes(digest, "little"))  # 48 bits: exact in float64
        parts = self._gather_same(np.array([mine, float(is_right)]))
        return all(part[0] == mine and part[1] for part in parts)

    def together(self, work: Callable[[], T]) -> T:
        """See `Group.together`."""
        error: BaseException | None = None
        try:
            done = work()
        except Exception as caught:  # noqa: BLE001  # raised below, on every rank
            error = caught
        if self.is_any(error is not None):
            self.failed(error)
        return done

    def failed(self, error: BaseException | None) -> None:
        """See `Group.failed`."""
        said: list[Any] = [None] * self.size
        mine = None if error is None else (isinstance(error, DataError), str(error))
        self._dist.all_gather_object(said, mine, group=self._group)
        if error is not None:
            raise error
        others = [(rank, *each) for rank, each in enumerate(said) if each]
        kind = DataError if all(is_data for _, is_data, _ in others) else LowtideError
        texts = "; ".join(f"rank {rank}: {text}" for rank, _, text in others)
        raise kind(f"the clustering failed on another rank, so it stops on all: {texts}")

    def _gather_same(self, values: Vector) -> list[Vector]:
        sent = self._sent(values)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        self._dist.all_gather(parts, sent, group=self._group)
        return [self._received(part) for part in parts]

    def _sent(self, values: Vector) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device or "cpu")

    @staticmethod
    def _received(tensor: torch.Tensor) -> Vector:
        return np.asarray(tensor.cpu().numpy())


def group_of(process_group: Any) -> Group:
    """Return the ranks that share a fit.

    Args:
        process_group: None (this process alone), "world" (all ranks), or a process group.

    Raises:
        ConfigError: it is none of these, or torch.distributed is not initialised.
    """
    if process_group is None:
        return Group()
    if isinstance(process_group, str):
        if process_group != "world":
            raise ConfigError(
                f'process_group: "{process_group}" is unknown. Allowed: None, "world", or a '
                f"torch.distributed process group"
            )
        return Ranks()
    return Ranks(process_group)
