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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide.checkpoint.files import opcodes
from lowtide.checkpoint.files.archive import Archive
from lowtide.checkpoint.files.memo import Memo
from lowtide.checkpoint.files.ranges import Ranges, is_plain
from lowtide.checkpoint.writer.plan import LITERAL, FilePlan
from lowtide.core.device.homes import Homes
from lowtide.core.state import Memory

_PROTOCOL = b"\x80\x02"
_MOST_KEPT_BYTES = 16 << 20  # of a pickle: much more is a script's own objects, not tensors


@dataclass(kw_only=True)
class TorchFile:
    """A state laid out.

    Attributes:
        plan: What the writer is told.
        lazy: Tensors whose memory the plan reads later.
        versions: How often each had been changed, as PyTorch counts, when it was laid out.
        eager_bytes: Bytes that were copied at once.
        copied: The entries of the plan that these are.
    """

    plan: FilePlan
    lazy: list[torch.Tensor]
    versions: list[int]
    eager_bytes: int
    copied: list[int]

    def live_memory(self) -> Memory:
        """Return the host memory that is read later, in the order of the file."""
        plan = self.plan
        not_live = np.array([LITERAL, *self.copied, *plan.elsewhere], np.int32)
        is_live = ~np.isin(plan.entries, not_live)
        begin = plan.addresses[is_live]
        return np.stack([begin, begin + plan.lengths[is_live]], axis=1)


class Layout:
    """A state on its way to become a torch file: first its tensors, then what describes them.

    Args:
        state: What would be given to `torch.save`.
        path: The file that the plan names.
        is_stable: Whether a tensor's memory stays as it is until the plan has been captured. What
            is not stable is copied here and now.
        homes: Where tensors live. What is stable on a device is then named in the plan
            (`FilePlan.elsewhere`); without it, that is copied here and now too.
        memo: Of the file that was laid out for this name before: what is still the same goes
            faster. Is changed.
    """

    def __init__(
        self,
        state: Any,
        path: Path,
        *,
        is_stable: Callable[[torch.Tensor], bool],
        homes: Homes | None = None,
        memo: Memo | None = None,
    ) -> None:
        self._state = state
        self._archive = Archive(path)
        self._memo = Memo() if memo is None else memo
        self._ranges = Ranges(is_stable, homes, self._memo)
        self._batches = self._ranges.scan(state)
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
        ranges = self._ranges
        with _no_collection():
            for _ in self._batches:
                pass
            pickled = _StatePickler(ranges, self._memo).dump_bytes(self._state)
            self._put_records()
            self._archive.close(pickled)
            self._memo.forget_behind(len(ranges.tensors))
            plan = self._plan()
            self._memo.size_bytes = plan.size_bytes
        return TorchFile(
            plan=plan, lazy=ranges.lazy, versions=ranges.versions,
            eager_bytes=ranges.eager_bytes, copied=ranges.copied,
        )  # fmt: skip

    def _plan(self) -> FilePlan:
        plan = self._archive.plan()
        plan.elsewhere = dict(self._ranges.elsewhere)
        plan.expected_bytes = self._memo.size_bytes  # of the file before; nothing better is known
        return plan

    def _put_records(self) -> None:
        self._archive.add_records(self._ranges.records[self._put :])
        self._put = len(self._ranges.records)


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


def _mark(name: str) -> None:
    """Stand in the stream for a tensor, until its opcodes are put there. Never called."""


class _StatePickler(pickle.Pickler):
    """Writes torch's pickle; plain tensors are views of `Ranges`, all else is left to torch.

    Tensors are written as marks first, which are then replaced by their opcodes.
    """

    def __init__(self, ranges: Ranges, memo: Memo) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=2)
        self._ranges = ranges
        self._memo = memo
        self._marks = memo.marks_for(len(ranges.tensors), _mark)
        self._pushed = [*ranges.opcodes]  # by the numbers of the marks
        known = zip(ranges.tensors, self._marks, ranges.opcodes, strict=False)
        self._ready = {id(tensor): mark for tensor, mark, pushing in known if pushing}
        self._uses = 0  # of marks in the stream
        # Storages that are kept as they are, each as what it is seen as.
        self._whole: dict[tuple[int, torch.dtype | None], bytes] = {}
        self._alive: list[Any] = opcodes.learn(self)  # ids must stay taken while they are keys
        self._get_mark = b"h%c" % len(self._alive)  # the memo number that this gives it:
        self.dump(_mark)

    def dump_bytes(self, state: Any) -> bytes:
        """Return the pickle of `state`."""
        begin = self._buffer.tell()
        self.dump(state)
        stream, memo = self._buffer.getvalue()[begin + len(_PROTOCOL) :], self._memo
        if stream == memo.stream and self._pushed == memo.pushed:
            return memo.pickled
        pickled = opcodes.HEAD + self._unmarked(stream)
        if len(pickled) <= _MOST_KEPT_BYTES:
            memo.stream, memo.pushed, memo.pickled = stream, self._pushed, pickled
        return pickled

    def _unmarked(self, stream: bytes) -> bytes:
        """Put the tensors' opcodes where their marks are."""
        memo = rb"(?:q.|r.{4})"
        mark = rb"%sX.{4}%s([0-9a-f]{8})%s\x85%sR" % (
            *(re.escape(self._get_mark), self._memo.token.encode()),
            *(memo, memo),
        )
        parts = re.split(mark, stream, flags=re.DOTALL)  # between two of them a mark's number
        if len(parts) // 2 != self._uses:
            raise pickle.PicklingError(
                f"{len(parts) // 2} of {self._uses} tensors and storages were "
                f"found again in the pickle, which must be all; please report what the state holds"
            )
        parts[1::2] = [self._pushed[int(number, 16)] for number in parts[1::2]]
        return b"".join(parts)

    def reducer_override(self, obj: Any) -> Any:
        """Pickle plain tensors as views of their range; leave everything else to torch."""
        ready = self._ready.get(id(obj))
        if ready is not None:
            self._uses += 1
            return ready
        kept = self._ranges.of_tensor.get(id(obj))
        kind = type(obj)
        if kept is None or id(obj) in self._ranges.odd:
            if kind is torch.storage.TypedStorage or kind is torch.UntypedStorage:
                return self._marking(self._whole_storage(obj))
            if not isinstance(obj, torch.Tensor) or not is_plain(obj):
                return NotImplemented
            self._alive.append(obj)
            kept = self._ranges.find(obj)
        dtype, grad = obj.dtype, obj.requires_grad
        item = dtype.itemsize
        head, tail = opcodes.around_number(
            *(dtype, kept.location, (kept.end - kept.begin) // item),
            *(obj.storage_offset() - kept.begin // item, obj.shape, obj.stride()),
            *(grad, kind is torch.nn.Parameter),
        )
        return self._marking(opcodes.numbered(head, kept.number, tail))

    def _marking(self, pushing: bytes) -> Any:
        self._uses += 1
        self._pushed.append(pushing)
        return self._memo.marks_for(len(self._pushed), _mark)[len(self._pushed) - 1]

    def _whole_storage(self, obj: Any) -> bytes:
        storage = obj._untyped_storage if isinstance(obj, torch.storage.TypedStorage) else obj
        is_typed = storage is not obj
        key = (storage._cdata, obj.dtype if is_typed else None)
        if key not in self._whole:
            self._alive.append(storage)
            shared = self._ranges.whole(storage, obj.dtype) if is_typed else None
            if shared is None:
                number = self._ranges.copy(storage, 0, storage.nbytes())
            else:
                number = shared.number
            kind = getattr(torch, obj._pickle_storage_type()) if is_typed else torch.UntypedStorage
            elements = obj._size() if is_typed else storage.nbytes()
            location = torch.serialization.location_tag(storage)
            self._whole[key] = opcodes.whole_storage(kind, number, location, elements)
        return self._whole[key]
