"""The ranks that hold one model together, and the collectives between them, counted.

All messages of this plugin go through `TensorGroup`, so that what is sent can be told exactly.
With one rank every collective is the identity and nothing is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Newer names of the same collectives; the older ones warn from torch 2.13 on.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_ODD, _OTHER_ODD = 6364136223846793005, 2862933555777941757
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # numbers hashed at once, each in a few int64: a dense mask can have billions


def fingerprint(numbers: Tensor) -> Tensor:
    """Return a number (int64, 62 bits) that other numbers, or another order of them, change.

    Args:
        numbers: Numbers of any shape.
    """
    flat = numbers.flatten()
    if flat.is_floating_point():
        # Numbers of the same size: others could not be seen in an expanded tensor, on one number.
        flat = flat.view(_BITS[flat.element_size()])
    result = torch.zeros((), dtype=torch.int64, device=flat.device)
    place = torch.arange(1, min(flat.numel(), _CHUNK) + 1, device=flat.device)
    for first, chunk in enumerate(flat.split(_CHUNK)):
        # Multiplied, folded and multiplied again: a sum of products alone would be the same
        # wherever changes cancel. int64 wraps around.
        mixed = (chunk + (place[: len(chunk)] + first * _CHUNK) * _ODD) * _OTHER_ODD
        mixed = (mixed ^ (mixed >> 29)) * _ODD
        result += (mixed ^ (mixed >> 32)).sum()
    return result >> 2


@dataclass
class Traffic:
    """What one rank handed to collectives.

    Attributes:
        messages: Number of collectives by ``"<phase>/<kind>"``, e.g. ``"forward/all_reduce"``.
        payload_bytes: Bytes of the whole tensors, by the same keys. A ring sends
            ``2 (p-1)/p`` times as many for an all-reduce and ``(p-1)/p`` times for the others.
    """

    messages: dict[str, int] = field(default_factory=dict)
    payload_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, phase: str, kind: str, nbytes: int) -> None:
        """Count one collective."""
        key = f"{phase}/{kind}"
        self.messages[key] = self.messages.get(key, 0) + 1
        self.payload_bytes[key] = self.payload_bytes.get(key, 0) + nbytes

    def wire_bytes(self, size: int) -> float:
        """Return the bytes that a ring of `size` ranks makes each rank send."""
        total = 0.0
        for key, nbytes in self.payload_bytes.items():
            passes = 2 if key.endswith("all_reduce") else 1
            total += passes * (size - 1) / size * nbytes
        return total

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts as plain JSON."""
        return {"messages": dict(self.messages), "payload_bytes": dict(self.payload_bytes)}


class Pending:
    """A collective under way; `wait` returns its result."""

    def __init__(self, result: Tensor, work: Any = None) -> None:
        self._result = result
        self._work = work

    def wait(self) -> Tensor:
        """Wait and return the reduced tensor."""
        if self._work is not None:
            self._work.wait()
        return self._result


class TensorGroup:
    """The tensor-parallel ranks: they see the same tokens and each holds a slice of every weight.

    Args:
        process_group: Their process group; None is this process alone.

    Attributes:
        size: Number of ranks (p).
        rank: This process's place among them.
        traffic: What was sent.
        check_data: Whether different inputs or labels on the ranks are looked for.
        is_call_checked: Whether the running call of the model has compared its tokens already.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.traffic = Traffic()
        self.check_data = True
        self.is_call_checked = False

    def __deepcopy__(self, _memo: Any) -> TensorGroup:
        """Return this object: the copy of a model (an average of it, say) is on the same ranks."""
        return self

    def start_sum(self, owned: Tensor, *, phase: str) -> Pending:
        """Start to sum `owned` over the ranks, in place; the caller gives the buffer away.

        Args:
            owned: Contiguous; a view would silently be left unreduced, so it is refused.
            phase: For the counters.
        """
        if self.size == 1:
            return Pending(owned)
        if not owned.is_contiguous():
            raise AssertionError(f"all-reduce of a view of shape {tuple(owned.shape)}")
        self.traffic.add(phase, "all_reduce", owned.nbytes)
        return Pending(owned, dist.all_reduce(owned, group=self.process_group, async_op=True))

    def sum(self, owned: Tensor, *, phase: str) -> Tensor:
        """Sum `owned` over the ranks in place and return it. See `start_sum`."""
        return self.start_sum(owned, phase=phase).wait()

    def maximum(self, owned: Tensor, *, phase: str) -> Tensor:
        """Replace `owned` by its maximum over the ranks and return it."""
        if self.size > 1:
            self.traffic.add(phase, "all_reduce", owned.nbytes)
            dist.all_reduce(owned, op=dist.ReduceOp.MAX, group=self.process_group)
        return owned

    def gather_rows(self, rows: Tensor, *, phase: str) -> Tensor:
        """Return the ranks' tensors (all of one shape) one after another along dimension 0."""
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        gathered = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        self.traffic.add(phase, "all_gather", gathered.nbytes)
        _all_gather(gathered, rows, group=self.process_group)
        return gathered

    def gather_columns(self, columns: Tensor, *, phase: str) -> Tensor:
        """Return ``[..., n]`` of every rank side by side: ``[..., p n]``."""
        if self.size == 1:
            return columns
        stacked = self.gather_rows(columns.unsqueeze(0), phase=phase)  # [p, ..., n]
        return stacked.movedim(0, -2).flatten(-2)

    def scatter_sum_columns(self, columns: Tensor, *, phase: str) -> Tensor:
        """Sum ``[..., p n]`` over the ranks and return this rank's ``[..., n]`` of it."""
        if self.size == 1:
            return columns
        stacked = columns.unflatten(-1, (self.size, -1)).movedim(-2, 0).contiguous()
        mine = stacked.new_empty(stacked.shape[1:])
        self.traffic.add(phase, "reduce_scatter", stacked.nbytes)
        _reduce_scatter(mine, stacked.flatten(0, 1), group=self.process_group)
        return mine

    def where_different(self, values: Tensor) -> Tensor:
        """Tell where `values` (int64) is not the same on all ranks: bool, of its shape."""
        if self.size == 1:
            return torch.zeros_like(values, dtype=torch.bool)
        both = self.maximum(torch.stack((values, -values)), phase="check")
        return both[0] != -both[1]

    def differs(self, values: Tensor) -> bool:
        """Tell whether `values` (int64) is not the same on all ranks."""
        return bool(self.where_different(values).any())

    def must_check(self) -> bool:
        """Tell whether an embedding has to compare its tokens; once, after a call that did so."""
        is_checked, self.is_call_checked = self.is_call_checked, False
        return self.size > 1 and self.check_data and not is_checked

    def slice_of(self, length: int) -> slice:
        """Return this rank's part of a dimension of `length`, which p divides."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)
