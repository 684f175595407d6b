"""Which memory nothing but an update changes, so that it can be copied later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class StableMemory:
    """Storages of parameters and optimizer state, found anew for every checkpoint.

    Buffers (running statistics, counters), what the script owns (an average of the weights) and
    everything unknown is not in it: that may change during a forward pass.
    """

    def __init__(self) -> None:
        self.is_trusted = True  # False: something changes even this outside of updates
        self._storages: set[int] = set()
        self._bytes = 0
        self._missing_bytes = 0

    def look_at(self, model: Any, optimizer: Any) -> None:
        """Collect the storages of `model` and `optimizer` as they are now."""
        self._storages = set()
        self._bytes = 0
        for tensor in _parameters(model):
            self._add(tensor)
        self._missing_bytes = 0
        for each in _optimizers(optimizer):
            updated = [p for g in getattr(each, "param_groups", []) for p in g["params"]]
            for tensor in filter(torch.is_tensor, updated):
                self._add(tensor)
            for flat in _flat_masters(each):
                self._add(flat)
            states = [s for s in getattr(each, "state", {}).values() if isinstance(s, dict)]
            for tensor in [v for s in states for v in s.values() if torch.is_tensor(v)]:
                self._add(tensor)
            if not states:  # Adam makes its two moments, in fp32, in the first step
                elements = sum(p.numel() for p in updated if torch.is_tensor(p))
                self._missing_bytes = max(self._missing_bytes, 8 * elements)

    def covers(self, tensor: torch.Tensor) -> bool:
        """Tell whether only an update changes the memory of `tensor`."""
        return self.is_trusted and tensor.untyped_storage().data_ptr() in self._storages

    def expected_bytes(self) -> int:
        """Return about how many bytes one checkpoint will have."""
        return self._bytes + self._missing_bytes

    def _add(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address == 0 or address in self._storages:
            return 0
        self._storages.add(address)
        self._bytes += storage.nbytes()
        return storage.nbytes()


def _parameters(model: Any) -> Iterator[torch.Tensor]:
    if not isinstance(model, torch.nn.Module):
        return
    for parameter in model.parameters():
        yield parameter
        shard = getattr(parameter, "ds_tensor", None)  # ZeRO-3 keeps the data there
        if torch.is_tensor(shard):
            yield shard


def _optimizers(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those that it wraps."""
    seen: set[int] = set()
    while optimizer is not None and id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _flat_masters(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the masters that ZeRO-3 keeps outside of ``param_groups`` between two steps."""
    groups = getattr(optimizer, "fp32_partitioned_groups_flat", None) or []
    keys = getattr(optimizer, "state", None) or {}
    yield from (tensor for tensor in [*groups, *keys] if torch.is_tensor(tensor))
