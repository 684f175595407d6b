"""Lays a state out as the file that `torch.save` would write, without copying a tensor.

The result is a `FilePlan`: a zip archive that `torch.load` reads (also memory-mapped, also without
Lowtide), whose tensor bytes are still where they were. Differences from torch's own files:

- Of a storage only the bytes that the state can see are kept: a slice of a large buffer is saved
  as a slice. Tensors that overlap still share memory after loading.
- Large tensors lie at file offsets that fit their address modulo a page, so that a writer may hand
  their memory to the disk as it is.
- Checksums of the tensors stand behind them (zip's data descriptor), because they are known only
  when the bytes have been read. They are right: `zipfile.testzip` and ``unzip -t`` pass.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.archive import Archive, Record
from lowtide.checkpoint.plan import FilePlan

_MERGE_GAP_BYTES = 512  # slices this close in one storage are kept as one range

# The storage classes that torch names in its files. Other dtypes take torch's own way to pickle.
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}

# What torch's own pickles call, so that torch.load takes the file, also with weights_only.
_REBUILD = torch._utils._rebuild_tensor_v2
_REBUILD_PARAMETER = torch._utils._rebuild_parameter


@dataclass(kw_only=True)
class TorchFile:
    """A state laid out.

    Attributes:
        plan: What the writer is told.
        lazy: Tensors whose memory the plan reads later.
        eager_bytes: Bytes that were copied at once.
    """

    plan: FilePlan
    lazy: list[torch.Tensor]
    eager_bytes: int


@dataclass
class _Range:
    """A stretch of one storage that becomes one record of the archive."""

    begin: int  # bytes, in the storage
    end: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    name: _Name | None = None


class _Name:
    """Stands for a storage inside the pickle; pickled as torch's persistent id."""

    __slots__ = ("id",)

    def __init__(self, storage_type: Any, number: int, location: str, elements: int) -> None:
        self.id = ("storage", storage_type, str(number), location, elements)


def lay_out(state: Any, path: Path, *, is_stable: Callable[[torch.Tensor], bool]) -> TorchFile:
    """Lay `state` out as the torch file `path`.

    Args:
        state: What would be given to `torch.save`.
        path: The file that the plan names.
        is_stable: Whether a tensor's memory stays as it is until the plan has been captured. What
            is not stable is copied here and now.

    Raises:
        pickle.PicklingError, TypeError: `state` holds something that cannot be pickled.
    """
    pickler = _StatePickler(is_stable)
    pickler.add_ranges(state)
    pickled = pickler.dump_bytes(state)
    plan = Archive(path, pickled, pickler.records).plan()
    return TorchFile(plan=plan, lazy=pickler.lazy, eager_bytes=pickler.eager_bytes)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Find the tensors in nested dicts, lists and tuples; others are found by the pickler."""
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend(value)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether dtype, storage, offset, size and stride are all there is to a tensor."""
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype in _STORAGES
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_neg()
        and not (kind is torch.Tensor and tensor.grad_fn is not None)
        and not getattr(tensor, "__dict__", None)
        and not tensor._backward_hooks
    )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the bytes of its storage that a tensor reaches."""
    item = tensor.element_size()
    begin = int(tensor.storage_offset()) * item
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * item
    steps = sum(int((n - 1) * s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (steps + 1) * item


class _StatePickler(pickle.Pickler):
    """Writes torch's pickle; collects the bytes of the storages it names."""

    def __init__(self, is_stable: Callable[[torch.Tensor], bool]) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=2)
        self._is_stable = is_stable
        self._ranges: dict[tuple[int, torch.dtype], list[_Range]] = {}
        self._of_tensor: dict[int, _Range] = {}
        self._whole: dict[int, _Name] = {}  # storages that are kept as they are
        self._alive: list[Any] = []  # ids must stay taken while they are keys
        self.records: list[Record] = []
        self.lazy: list[torch.Tensor] = []
        self.eager_bytes = 0

    def add_ranges(self, state: Any) -> None:
        """Look at all tensors first: which part of which storage will be needed."""
        for tensor in _tensors(state):
            if id(tensor) not in self._of_tensor and tensor.numel() and _is_plain(tensor):
                self._add(tensor)
        for key, ranges in self._ranges.items():
            self._ranges[key] = self._merge(ranges)

    def dump_bytes(self, state: Any) -> bytes:
        """Return the pickle of `state`."""
        self.dump(state)
        return self._buffer.getvalue()

    def _add(self, tensor: torch.Tensor) -> None:
        self._alive.append(tensor)
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        found = _Range(*_extent(tensor), [tensor])
        self._of_tensor[id(tensor)] = found
        self._ranges.setdefault(key, []).append(found)

    def _merge(self, ranges: list[_Range]) -> list[_Range]:
        merged: list[_Range] = []
        for each in sorted(ranges, key=lambda r: r.begin):
            if merged and each.begin <= merged[-1].end + _MERGE_GAP_BYTES:
                merged[-1].end = max(merged[-1].end, each.end)
                merged[-1].tensors += each.tensors
                self._of_tensor[id(each.tensors[0])] = merged[-1]
            else:
                merged.append(each)
        return merged

    def persistent_id(self, obj: Any) -> Any:
        """Return torch's persistent id for what stands for a storage."""
        kind = type(obj)
        if kind is _Name:
            return obj.id
        if kind is torch.storage.TypedStorage or kind is torch.UntypedStorage:
            return self._whole_storage(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Pickle plain tensors as views of their range; leave everything else to torch."""
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        kept = self._of_tensor.get(id(obj))
        if kept is None and _is_plain(obj) and obj.numel():
            self._add(obj)  # inside an object that add_ranges cannot look into
            kept = self._of_tensor[id(obj)]
        if kept is None:
            return NotImplemented
        name = kept.name or self._name(kept)
        offset = obj.storage_offset() - kept.begin // obj.element_size()
        shape = tuple(obj.shape)
        view = (name, offset, shape, obj.stride())
        if type(obj) is torch.nn.Parameter:
            plain = _Reduced(_REBUILD, (*view, False, _Reduced(OrderedDict)))
            return _REBUILD_PARAMETER, (plain, obj.requires_grad, _Reduced(OrderedDict))
        return _REBUILD, (*view, obj.requires_grad, _Reduced(OrderedDict))

    def _name(self, kept: _Range) -> _Name:
        tensor = kept.tensors[0]
        is_stable = all(self._is_stable(each) for each in kept.tensors)
        storage = tensor.untyped_storage()
        size = kept.end - kept.begin
        location = torch.serialization.location_tag(storage)
        if is_stable and tensor.device.type == "cpu":
            self.lazy += kept.tensors
            self.records.append(Record(storage, storage.data_ptr() + kept.begin, size))
        else:
            self._copy(storage, kept.begin, size)
        elements = size // tensor.element_size()
        number = len(self.records) - 1
        kept.name = _Name(_STORAGES[tensor.dtype], number, location, elements)
        return kept.name

    def _whole_storage(self, obj: Any) -> Any:
        storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
        if storage._cdata not in self._whole:
            is_typed = storage is not obj
            self._alive.append(storage)
            self._copy(storage, 0, storage.nbytes())
            kind = getattr(torch, obj._pickle_storage_type()) if is_typed else torch.UntypedStorage
            elements = obj._size() if is_typed else storage.nbytes()
            location = torch.serialization.location_tag(storage)
            name = _Name(kind, len(self.records) - 1, location, elements)
            self._whole[storage._cdata] = name
        return self._whole[storage._cdata].id

    def _copy(self, storage: Any, begin: int, size: int) -> None:
        copy = torch.empty(size, dtype=torch.uint8)
        if size:
            view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            copy.copy_(view[begin : begin + size])
        self.eager_bytes += size
        self.records.append(Record(copy, copy.data_ptr(), size))


class _Reduced:
    """Pickles as the result of a call, without making the object first."""

    __slots__ = ("call",)

    def __init__(self, function: Any, arguments: tuple[Any, ...] = ()) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call
