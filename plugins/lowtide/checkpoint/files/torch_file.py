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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.files import opcodes
from lowtide.checkpoint.files.archive import PAGE_BYTES, Archive, Record
from lowtide.checkpoint.writer.plan import DeviceBytes, FilePlan
from lowtide.core.device import Device
from lowtide.core.device.homes import Homes
from lowtide.core.errors import DeviceError

_PROTOCOL = b"\x80\x02"
_FIRST_BATCH_BYTES = 32 << 20  # of tensors; in a smaller file it gains nothing
_BATCH_GROWTH = 3  # laying out is about as many times faster than disks are
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
    tensors: list[torch.Tensor]
    number: int = -1  # of its record, once it has one
    is_lazy: bool = False  # then its memory is read later
    opcodes: bytes | None = None  # that push it


class Layout:
    """A state on its way to become a torch file: first its tensors, then what describes them.

    Args:
        state: What would be given to `torch.save`.
        path: The file that the plan names.
        is_stable: Whether a tensor's memory stays as it is until the plan has been captured. What
            is not stable is copied here and now.
        homes: Where tensors live. What is stable on a device is then named in the plan
            (`FilePlan.elsewhere`); without it, that is copied here and now too.
    """

    def __init__(
        self,
        state: Any,
        path: Path,
        *,
        is_stable: Callable[[torch.Tensor], bool],
        homes: Homes | None = None,
    ) -> None:
        self._state = state
        self._archive = Archive(path)
        self._pickler = _StatePickler(is_stable, homes)
        self._batches = self._pickler.batches(state)
        self._put = 0  # records that the archive has

    def beginnings(self) -> Iterator[FilePlan]:
        """Lay the tensors out; plans of what there is so far come whenever that is much more.

        Each is the beginning of the file, and of the plans after it. A small file has none.
        """
        while True:
            with _no_collection():
                if next(self._batches, None) is None:
                    return
                self._put_records()
                plan = self._plan()
            yield plan

    def finish(self) -> TorchFile:
        """Lay the rest out.

        Raises:
            pickle.PicklingError, TypeError: the state holds something that cannot be pickled.
        """
        pickler = self._pickler
        with _no_collection():
            for _ in self._batches:
                pass
            pickled = pickler.dump_bytes(self._state)
            self._put_records()
            self._archive.close(pickled)
            plan = self._plan()
        return TorchFile(plan=plan, lazy=pickler.lazy, eager_bytes=pickler.eager_bytes)

    def _plan(self) -> FilePlan:
        plan = self._archive.plan()
        plan.elsewhere = dict(self._pickler.elsewhere)
        return plan

    def _put_records(self) -> None:
        self._archive.add_records(self._pickler.records[self._put :])
        self._put = len(self._pickler.records)


def lay_out(state: Any, path: Path, *, is_stable: Callable[[torch.Tensor], bool]) -> TorchFile:
    """Lay `state` out as the torch file `path`; the arguments are those of `Layout`.

    Raises:
        pickle.PicklingError, TypeError: `state` holds something that cannot be pickled.
    """
    return Layout(state, path, is_stable=is_stable).finish()


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


def _tensors(state: Any) -> dict[int, torch.Tensor]:
    """Find the tensors in nested dicts, lists and tuples, by id; others the pickler will find."""
    waiting: list[Any] = [(state,)]
    seen: set[int] = set()
    found: dict[int, torch.Tensor] = {}
    while waiting:
        for value in waiting.pop():
            if isinstance(value, torch.Tensor):
                found[id(value)] = value
            elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value.values() if isinstance(value, dict) else value)
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether dtype, storage, offset, size and stride are all there is to a tensor."""
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype in opcodes.STORAGES
        and (tensor.is_cpu or tensor.is_cuda)
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
        return begin, begin + tensor.nbytes
    steps = sum(int((n - 1) * s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (steps + 1) * item


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _mark(name: str) -> None:
    """Stand in the stream for a tensor, until its opcodes are put there. Never called."""


class _StatePickler(pickle.Pickler):
    """Writes torch's pickle; collects the bytes of the storages it names.

    Tensors are written as marks first, which are then replaced by their opcodes.
    """

    def __init__(self, is_stable: Callable[[torch.Tensor], bool], homes: Homes | None) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=2)
        self._is_stable = is_stable
        self._homes = homes
        self._ranges: dict[tuple[int, torch.dtype], list[_Range]] = {}
        self._of_tensor: dict[int, _Range] = {}
        self._whole: dict[int, bytes] = {}  # storages that are kept as they are
        self._alive: list[Any] = opcodes.learn(self)  # ids must stay taken while they are keys
        self._token = secrets.token_hex(8)
        self._marked: list[bytes] = []
        self.records: list[Record] = []
        self.lazy: list[torch.Tensor] = []
        self.elsewhere: dict[int, DeviceBytes] = {}
        self.eager_bytes = 0
        self.recorded_bytes = 0

    def batches(self, state: Any) -> Iterator[int]:
        """Look at all tensors first: which part of which storage will be needed.

        Gives the bytes of the records made so far, whenever that is worth a look.
        """
        due = _FIRST_BATCH_BYTES
        for tensor in _tensors(state).values():
            if tensor.numel() and _is_plain(tensor):
                self._add(tensor)
                if self.recorded_bytes >= due:
                    due = _BATCH_GROWTH * self.recorded_bytes
                    yield self.recorded_bytes
        for key, ranges in self._ranges.items():
            if len(ranges) > 1:
                self._ranges[key] = ranges = self._merge(ranges)
            for each in ranges:
                if each.number < 0:
                    self._record(each)
        if self.recorded_bytes >= _FIRST_BATCH_BYTES:
            yield self.recorded_bytes

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
        begin, end = _extent(tensor)
        ranges = self._ranges.setdefault((storage._cdata, tensor.dtype), [])
        if ranges and ranges[0].number >= 0 and ranges[0].begin <= begin and end <= ranges[0].end:
            found = ranges[0]
            found.tensors.append(tensor)
            if found.is_lazy:
                self.lazy.append(tensor)
        else:
            found = _Range(storage, begin, end, [tensor])
            is_whole = begin == 0 and end == storage.nbytes()
            ranges.insert(0 if is_whole else len(ranges), found)
            if is_whole:  # it cannot grow any more
                self._record(found)
        self._of_tensor[id(tensor)] = found
        return found

    def _known(self, tensor: torch.Tensor) -> _Range | None:
        """Return the range that holds all of `tensor` already, if there is one."""
        begin, end = _extent(tensor)
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        ranges = self._ranges.get(key, [])
        return next((r for r in ranges if r.begin <= begin and end <= r.end), None)

    def _merge(self, ranges: list[_Range]) -> list[_Range]:
        merged: list[_Range] = []
        # What has a record already is a whole storage, and takes in all that follows.
        for each in sorted(ranges, key=lambda r: (r.begin, r.number < 0)):
            if merged and each.begin <= merged[-1].end + _MERGE_GAP_BYTES:
                merged[-1].end = max(merged[-1].end, each.end)
                merged[-1].tensors += each.tensors
                self._of_tensor |= dict.fromkeys(map(id, each.tensors), merged[-1])
                if merged[-1].is_lazy:
                    self.lazy += each.tensors
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
        of = kept.opcodes or self._pushing(kept)
        offset = int(obj.storage_offset()) - kept.begin // obj.element_size()
        grad, is_parameter = obj.requires_grad, kind is torch.nn.Parameter
        pushing = opcodes.tensor(of, offset, obj.shape, obj.stride(), grad and not is_parameter)
        return self._marking(opcodes.parameter(pushing, grad) if is_parameter else pushing)

    def _marking(self, pushing: bytes) -> Any:
        self._marked.append(pushing)
        return _mark, (f"{self._token}{len(self._marked) - 1:08x}",)

    def _record(self, kept: _Range) -> None:
        """Give a range its record."""
        tensor, storage = kept.tensors[0], kept.storage
        kept.number = len(self.records)
        size = kept.end - kept.begin
        self.recorded_bytes += size
        is_stable = self._is_stable(tensor)  # so are the others: they are in one storage
        device = self._device_of(tensor) if is_stable else None
        kept.is_lazy = device is not None or (is_stable and tensor.is_cpu)
        if kept.is_lazy:
            self.lazy += kept.tensors
        if device is not None:
            memory = _bytes_of(storage)[kept.begin : kept.end]
            self.elsewhere[kept.number] = DeviceBytes(device, memory)
            # It will lie in a slot, as it does in its chunk of the file; page by page if large.
            self.records.append(Record(storage, PAGE_BYTES, size))
        elif kept.is_lazy:
            self.records.append(Record(storage, storage.data_ptr() + kept.begin, size))
        else:
            self._copy(storage, kept.begin, size)

    def _device_of(self, tensor: torch.Tensor) -> Device | None:
        if self._homes is None:
            return None
        try:
            return self._homes.of(tensor)
        except DeviceError:  # torch can read it all the same
            return None

    def _pushing(self, kept: _Range) -> bytes:
        """Return the opcodes that push a range."""
        if kept.number < 0:
            self._record(kept)
        tensor = kept.tensors[0]
        location = "cpu" if tensor.is_cpu else torch.serialization.location_tag(kept.storage)
        elements = (kept.end - kept.begin) // tensor.element_size()
        kept.opcodes = opcodes.storage_of(tensor.dtype, kept.number, location, elements)
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
            copy.copy_(_bytes_of(storage)[begin : begin + size])
        self.eager_bytes += size
        self.records.append(Record(copy, copy.data_ptr(), size))
