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

import contextlib
import gc
import io
import pickle
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.files import opcodes
from lowtide.checkpoint.files.archive import Archive, Record
from lowtide.checkpoint.writer.plan import FilePlan

_PROTOCOL = b"\x80\x02"
_MERGE_GAP_BYTES = 512  # slices this close in one storage are kept as one range


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


@dataclass(slots=True)
class _Range:
    """A stretch of one storage that becomes one record of the archive."""

    storage: torch.UntypedStorage
    begin: int  # bytes, in the storage
    end: int
    tensors: list[torch.Tensor] = field(default_factory=list)
    opcodes: bytes | None = None  # that push it; once it has a record


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
    with _no_collection():
        pickler = _StatePickler(is_stable)
        pickler.add_ranges(state)
        pickled = pickler.dump_bytes(state)
        plan = Archive(path, pickled, pickler.records).plan()
    return TorchFile(plan=plan, lazy=pickler.lazy, eager_bytes=pickler.eager_bytes)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for cycles among the many small objects that are made meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Find the tensors in nested dicts, lists and tuples; others are found by the pickler."""
    waiting, seen = [state], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
            continue
        if not isinstance(value, (dict, list, tuple)) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting.extend(value.values())
        else:
            waiting.extend(value)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether dtype, storage, offset, size and stride are all there is to a tensor."""
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype in opcodes.STORAGES
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


def _mark(name: str) -> None:
    """Stand in the stream for a tensor, until its opcodes are put there. Never called."""


class _StatePickler(pickle.Pickler):
    """Writes torch's pickle; collects the bytes of the storages it names.

    Tensors are written as marks first, which are then replaced by their opcodes.
    """

    def __init__(self, is_stable: Callable[[torch.Tensor], bool]) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=2)
        self._is_stable = is_stable
        self._ranges: dict[tuple[int, torch.dtype], list[_Range]] = {}
        self._of_tensor: dict[int, _Range] = {}
        self._whole: dict[int, bytes] = {}  # storages that are kept as they are
        self._alive: list[Any] = opcodes.learn(self)  # ids must stay taken while they are keys
        self._token = secrets.token_hex(8)
        self._marked: list[bytes] = []
        self.records: list[Record] = []
        self.lazy: list[torch.Tensor] = []
        self.eager_bytes = 0

    def add_ranges(self, state: Any) -> None:
        """Look at all tensors first: which part of which storage will be needed."""
        for tensor in _tensors(state):
            if id(tensor) not in self._of_tensor and tensor.numel() and _is_plain(tensor):
                self._add(tensor)
        for key, ranges in self._ranges.items():
            if len(ranges) > 1:
                self._ranges[key] = self._merge(ranges)

    def dump_bytes(self, state: Any) -> bytes:
        """Return the pickle of `state`."""
        begin = self._buffer.tell()
        self.dump(state)
        stream = self._buffer.getvalue()[begin + len(_PROTOCOL) :]
        return opcodes.HEAD + self._unmarked(stream)

    def _unmarked(self, stream: bytes) -> bytes:
        """Put the tensors' opcodes where their marks are."""
        module, name = _mark.__module__.encode(), _mark.__qualname__.encode()
        first = b"c%s\n%s\n" % (module, name)
        found = stream.find(first)
        if found < 0:
            return stream
        # The function's memo number follows its first use; every other use asks for it.
        put = stream[found + len(first) :][:5]
        get = b"h" + put[1:2] if put[:1] == b"q" else b"j" + put[1:5]
        memo = rb"(?:q.|r.{4})"
        mark = rb"(?:%s%s|%s)X.{4}%s([0-9a-f]{8})%s\x85%sR" % (
            *(re.escape(first), memo, re.escape(get)),
            *(self._token.encode(), memo, memo),
        )
        return re.sub(mark, lambda match: self._marked[int(match[1], 16)], stream, flags=re.DOTALL)

    def _add(self, tensor: torch.Tensor) -> _Range:
        self._alive.append(tensor)
        storage = tensor.untyped_storage()
        found = _Range(storage, *_extent(tensor), [tensor])
        self._of_tensor[id(tensor)] = found
        key = (storage._cdata, tensor.dtype)
        self._ranges.setdefault(key, []).append(found)
        return found

    def _known(self, tensor: torch.Tensor) -> _Range | None:
        """Return the range that holds all of `tensor` already, if there is one."""
        begin, end = _extent(tensor)
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        ranges = self._ranges.get(key, [])
        return next((r for r in ranges if r.begin <= begin and end <= r.end), None)

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

    def reducer_override(self, obj: Any) -> Any:
        """Pickle plain tensors as views of their range; leave everything else to torch."""
        kind = type(obj)
        if kind is torch.storage.TypedStorage or kind is torch.UntypedStorage:
            return self._marking(self._whole_storage(obj))
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        kept = self._of_tensor.get(id(obj))
        if kept is None:
            if not _is_plain(obj):
                return NotImplemented
            # Empty, or inside an object that add_ranges cannot look into.
            kept = self._known(obj) or self._add(obj)
        of = kept.opcodes or self._record(kept)
        offset = int(obj.storage_offset()) - kept.begin // obj.element_size()
        grad = obj.requires_grad
        if kind is torch.nn.Parameter:
            data = opcodes.tensor(of, offset, tuple(obj.shape), obj.stride(), grad=False)
            return self._marking(opcodes.parameter(data, grad=grad))
        return self._marking(opcodes.tensor(of, offset, tuple(obj.shape), obj.stride(), grad=grad))

    def _marking(self, pushing: bytes) -> Any:
        self._marked.append(pushing)
        return _mark, (f"{self._token}{len(self._marked) - 1:08x}",)

    def _record(self, kept: _Range) -> bytes:
        tensor, storage = kept.tensors[0], kept.storage
        is_stable = self._is_stable(tensor)  # the others lie in the same storage
        size = kept.end - kept.begin
        if is_stable and tensor.device.type == "cpu":
            self.lazy += kept.tensors
            self.records.append(Record(storage, storage.data_ptr() + kept.begin, size))
        else:
            self._copy(storage, kept.begin, size)
        location = torch.serialization.location_tag(storage)
        elements = size // tensor.element_size()
        number = len(self.records) - 1
        kept.opcodes = opcodes.storage_of(tensor.dtype, number, location, elements)
        return kept.opcodes

    def _whole_storage(self, obj: Any) -> bytes:
        storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
        if storage._cdata not in self._whole:
            is_typed = storage is not obj
            self._alive.append(storage)
            self._copy(storage, 0, storage.nbytes())
            kind = getattr(torch, obj._pickle_storage_type()) if is_typed else torch.UntypedStorage
            elements = obj._size() if is_typed else storage.nbytes()
            location = torch.serialization.location_tag(storage)
            number = len(self.records) - 1
            self._whole[storage._cdata] = opcodes.whole_storage(kind, number, location, elements)
        return self._whole[storage._cdata]

    def _copy(self, storage: Any, begin: int, size: int) -> None:
        copy = torch.empty(size, dtype=torch.uint8)
        if size:
            view = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            copy.copy_(view[begin : begin + size])
        self.eager_bytes += size
        self.records.append(Record(copy, copy.data_ptr(), size))
