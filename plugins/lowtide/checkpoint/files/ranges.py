"""Which bytes of which storages a state needs, and the records of a torch file they become."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowtide.checkpoint.files import opcodes
from lowtide.checkpoint.files.archive import PAGE_BYTES, Record
from lowtide.checkpoint.files.memo import Memo, Metadata, has_own_storage, look_at, versions
from lowtide.checkpoint.writer.plan import DeviceBytes
from lowtide.core.device import Device
from lowtide.core.device.homes import Homes
from lowtide.core.errors import DeviceError

FIRST_BATCH_BYTES = 16 << 20  # of tensors; in a smaller file it gains nothing
BATCH_GROWTH = 2  # less than laying out is faster than disks are, so that none waits
BLOCK = 256  # tensors that are looked at together
_MERGE_GAP_BYTES = 512  # slices this close in one storage are kept as one range

_STORAGE, _ADDRESS, _SIZE = map(operator.itemgetter, (7, 8, 9))  # of `Facts`


@dataclass(slots=True)
class Range:
    """A stretch of one storage that becomes one record of the archive."""

    storage: torch.UntypedStorage
    begin: int  # bytes, in the storage
    end: int
    tensors: list[torch.Tensor]
    number: int = -1  # of its record, once it has one
    is_lazy: bool = False  # then its memory is read later
    location: str = "cpu"  # where torch is to bring it when it loads the file


class Ranges:
    """Collects the memory of a state's tensors: each byte once, overlapping ones together.

    Args:
        is_stable: Whether a tensor's memory stays as it is until the file has been captured. What
            is not stable is copied here and now.
        homes: Where tensors live; None leaves nothing on a device.
        memo: Of the file that was laid out before, or a new one. Is changed.
    """

    def __init__(
        self, is_stable: Callable[[torch.Tensor], bool], homes: Homes | None, memo: Memo
    ) -> None:
        self._is_stable = is_stable
        self._homes = homes
        self._has_given = homes is not None and homes.has_given
        self._memo = memo
        self._ranges: dict[tuple[int, torch.dtype], list[Range]] = {}
        self._own: dict[int, int] = {}  # storages of tensors that were taken together: positions
        self._alive: list[Any] = []  # ids must stay taken while they are keys
        self.tensors: list[torch.Tensor] = []  # that were found
        self.opcodes: list[bytes] = []  # that push them; empty if that is not known yet
        self.of_tensor: dict[int, Range] = {}  # by id
        self.odd: set[int] = set()  # ids of those in it that are more than their memory
        self.records: list[Record] = []
        self.lazy: list[torch.Tensor] = []
        self.versions: list[int] = []  # of these, when they were looked at
        self.elsewhere: dict[int, DeviceBytes] = {}
        self.eager_bytes = 0
        self.copied: list[int] = []  # records of which that is the size
        self.recorded_bytes = 0

    def scan(self, state: Any) -> Iterator[int]:
        """Look at all tensors first: which part of which storage will be needed.

        Gives the bytes of the records made so far, whenever that is worth a look.
        """
        due = FIRST_BATCH_BYTES
        tensors = self.tensors = list(_tensors(state).values())
        self.opcodes = [b""] * len(tensors)
        self._memo.make_room(len(tensors))
        for begin in range(0, len(tensors), BLOCK):
            self._take(begin, tensors[begin : begin + BLOCK])
            if self.recorded_bytes >= due:
                due = BATCH_GROWTH * self.recorded_bytes
                yield self.recorded_bytes
        for key, ranges in self._ranges.items():
            if len(ranges) > 1:
                self._ranges[key] = ranges = self._merge(ranges)
            for each in ranges:
                if each.number < 0:
                    self._record(each)
        if self.recorded_bytes >= FIRST_BATCH_BYTES:
            yield self.recorded_bytes

    def _take(self, begin: int, tensors: list[torch.Tensor]) -> None:
        """Look at some tensors, which are at `begin` and behind it among all of them."""
        seen = look_at(tensors)
        if seen is None:
            for tensor in tensors:
                self._add_any(tensor)
            self._memo.forget(begin, len(tensors))
        elif not self._take_all(begin, tensors, *seen):
            self._memo.forget(begin, len(tensors))  # what is not noted again is not so any more
            rows = zip(tensors, *seen, strict=True)
            for position, (tensor, storage, facts) in enumerate(rows, begin):
                if has_own_storage(facts) and not self._ranges_of(_key(facts)):
                    self._add_own(position, tensor, storage, facts)
                else:
                    self._add_any(tensor)

    def _take_all(
        self, begin: int, tensors: list[torch.Tensor], storages: list[Any], facts: list[Any]
    ) -> bool:
        """Take tensors that all have storages for themselves, at once; tell whether they do."""
        number, end, memo = len(self.records), begin + len(tensors), self._memo
        keys = list(map(_STORAGE, facts))
        is_same = memo.fits(begin, facts, number)  # as they were in the file before
        if (
            not (is_same or all(map(has_own_storage, facts)))
            or self._has_given
            or not all(map(self._is_stable, tensors))
            or len(set(keys)) < len(keys)  # what shares memory must come into one record
            or not self._own.keys().isdisjoint(keys)
            or not self._ranges.keys().isdisjoint(map(_key, facts) if self._ranges else ())
        ):
            return False
        numbers = range(number, number + len(tensors))
        if not is_same:
            memo.note(begin, facts, numbers, _pushing(facts, numbers))
        self._own.update(zip(keys, range(begin, end), strict=True))
        self.opcodes[begin:end] = memo.opcodes[begin:end]
        self._watch(tensors)
        sizes = list(map(_SIZE, facts))
        rows = zip(storages, map(_ADDRESS, facts), sizes, strict=True)
        self.records += map(tuple.__new__, itertools.repeat(Record), rows)  # as Record(*row)
        self.recorded_bytes += sum(sizes)
        return True

    def _add_own(self, position: int, tensor: torch.Tensor, storage: Any, facts: Any) -> None:
        """Add a tensor that has a storage for itself, among others that have not."""
        kept = Range(storage, 0, _SIZE(facts), [tensor])
        self._ranges[_key(facts)] = [kept]
        self._record(kept)
        pushing = _pushing([facts], [kept.number])
        self.opcodes[position] = pushing[0]
        if kept.is_lazy and kept.number not in self.elsewhere:
            self._memo.note(position, [facts], [kept.number], pushing)

    def _add_any(self, tensor: torch.Tensor) -> None:
        if not is_plain(tensor):
            self._add_odd(tensor)
        elif tensor.numel():
            self._add(tensor)

    def _ranges_of(self, key: tuple[int, torch.dtype]) -> list[Range]:
        """Return the ranges that there are of a storage as one dtype."""
        storage, dtype = key
        position = self._own.get(storage)
        if position is not None and (tensor := self.tensors[position]).dtype is dtype:
            del self._own[storage]
            number = self._memo.numbers[position]
            owner, _, size = self.records[number]
            self._ranges[key] = [Range(owner, 0, size, [tensor], number, is_lazy=True)]
        return self._ranges.get(key, [])

    def find(self, tensor: torch.Tensor) -> Range:
        """Return the range of a plain tensor that `scan` may not have seen, with its record."""
        # It is empty, or inside an object that `scan` cannot look into.
        found = self._known(tensor) or self._add(tensor)
        if found.number < 0:
            self._record(found)
        return found

    def whole(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Range | None:
        """Return the range that is all of `storage` as `dtype`, if there is one."""
        ranges = self._ranges_of((storage._cdata, dtype))
        size = storage.nbytes()
        return next((r for r in ranges if r.begin == 0 and r.end == size and size), None)

    def copy(self, storage: torch.UntypedStorage, begin: int, size: int) -> int:
        """Copy bytes of a storage here and now; returns the number of their record."""
        copy = torch.empty(size, dtype=torch.uint8)
        if size:
            copy.copy_(_bytes_of(storage)[begin : begin + size])
        self.eager_bytes += size
        self.records.append(Record(copy, copy.data_ptr(), size))
        self.copied.append(len(self.records) - 1)
        return len(self.records) - 1

    def _add(self, tensor: torch.Tensor) -> Range:
        return self._add_bytes(tensor, *_extent(tensor))

    def _add_odd(self, tensor: torch.Tensor) -> None:
        """Note the memory of a tensor that is more than its memory, as torch will ask for it.

        A parameter's is pickled as the plain tensor inside, any other one's as a whole storage.
        What shares that memory must come into the same record.
        """
        if not (_has_plain_memory(tensor) and tensor.numel()):
            return
        self.odd.add(id(tensor))
        if isinstance(tensor, torch.nn.Parameter):
            self._add(tensor)
        elif type(tensor) is torch.Tensor:
            self._add_bytes(tensor, 0, tensor.untyped_storage().nbytes())

    def _add_bytes(self, tensor: torch.Tensor, begin: int, end: int) -> Range:
        self._alive.append(tensor)
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.dtype)
        ranges = self._ranges_of(key)
        if ranges and ranges[0].number >= 0 and ranges[0].begin <= begin and end <= ranges[0].end:
            found = ranges[0]
            found.tensors.append(tensor)
            if found.is_lazy:
                self._watch([tensor])
        else:
            found = Range(storage, begin, end, [tensor])
            is_whole = begin == 0 and end == storage.nbytes()
            ranges.insert(0 if is_whole else len(ranges), found)
            self._ranges[key] = ranges
            if is_whole:  # it cannot grow any more
                self._record(found)
        self.of_tensor[id(tensor)] = found
        return found

    def _known(self, tensor: torch.Tensor) -> Range | None:
        """Return the range that holds all of `tensor` already, if there is one."""
        begin, end = _extent(tensor)
        key = (tensor.untyped_storage()._cdata, tensor.dtype)
        ranges = self._ranges_of(key)
        return next((r for r in ranges if r.begin <= begin and end <= r.end), None)

    def _merge(self, ranges: list[Range]) -> list[Range]:
        merged: list[Range] = []
        # What has a record already is a whole storage, and takes in all that follows.
        for each in sorted(ranges, key=lambda r: (r.begin, r.number < 0)):
            if merged and each.begin <= merged[-1].end + _MERGE_GAP_BYTES:
                merged[-1].end = max(merged[-1].end, each.end)
                merged[-1].tensors += each.tensors
                self.of_tensor |= dict.fromkeys(map(id, each.tensors), merged[-1])
                if merged[-1].is_lazy:
                    self._watch(each.tensors)
            else:
                merged.append(each)
        return merged

    def _record(self, kept: Range) -> None:
        """Give a range its record."""
        tensor, storage = kept.tensors[0], kept.storage
        size = kept.end - kept.begin
        self.recorded_bytes += size
        kept.number = len(self.records)
        is_stable = self._is_stable(tensor)  # so are the others: they are in one storage
        is_host = tensor.is_cpu
        if not is_host:
            kept.location = torch.serialization.location_tag(storage)
        may_be_elsewhere = self._has_given or not is_host
        device = self._device_of(tensor) if is_stable and may_be_elsewhere else None
        kept.is_lazy = device is not None or (is_stable and is_host)
        if kept.is_lazy:
            self._watch(kept.tensors)
        if device is not None:
            memory = _bytes_of(storage)[kept.begin : kept.end]
            self.elsewhere[kept.number] = DeviceBytes(device, memory)
            # It will lie in a slot, as it does in its chunk of the file; page by page if large.
            self.records.append(Record(storage, PAGE_BYTES, size))
        elif kept.is_lazy:
            self.records.append(Record(storage, storage.data_ptr() + kept.begin, size))
        else:
            self.copy(storage, kept.begin, size)

    def _watch(self, tensors: list[torch.Tensor]) -> None:
        """Note tensors whose memory is read later, and how often each has been changed."""
        self.lazy += tensors
        self.versions += versions(tensors)

    def _device_of(self, tensor: torch.Tensor) -> Device | None:
        if self._homes is None:
            return None
        try:
            return self._homes.of(tensor)
        except DeviceError:  # torch can read it all the same
            return None


def _key(facts: Any) -> tuple[int, torch.dtype]:
    return _STORAGE(facts), facts[1][0]


def _pushing(facts: list[Any], numbers: Sequence[int]) -> list[bytes]:
    """Return the opcodes that push tensors which have storages of the host for themselves."""
    kinds, metadata, strides, offsets = itertools.islice(zip(*facts, strict=True), 4)
    heads, tails = zip(*map(_around, kinds, metadata, strides, offsets), strict=True)
    return list(map(opcodes.numbered, heads, numbers, tails))


@functools.lru_cache(8192)
def _around(
    kind: type, metadata: Metadata, stride: tuple[int, ...], offset: int
) -> tuple[bytes, bytes]:
    dtype, shape, grad, _, _, size = metadata
    return opcodes.around_number(
        *(dtype, "cpu", size // dtype.itemsize, offset, shape, stride, grad),
        kind is torch.nn.Parameter,
    )


def is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether dtype, storage, offset, size and stride are all there is to a tensor."""
    kind = type(tensor)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and not getattr(tensor, "__dict__", None)
        and not tensor._backward_hooks
        and not (kind is torch.Tensor and tensor.grad_fn is not None)
        and _has_plain_memory(tensor)
    )


def _has_plain_memory(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.dtype in opcodes.STORAGES
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_neg()
    )


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
