"""Who holds the newest copy of each piece of optimizer state: the contract between plugins.

One `StateAuthority` per session (``session.state``). A piece of state has a key, such as
``"subgroup/3"``, and one owner:

- The owner (the offload plugin) registers its keys, publishes where the newest copy is whenever it
  moves or changes, and gives a `drain` that brings newest copies back to the host.
- Readers (checkpoint, exporters, the host's ``state_dict``) call `ensure_host` and then read the
  host copies inside `snapshot`, which raises if one of them changed or moved meanwhile.

The authority moves no data. A key that nobody registered is not its business: its host copy is the
only one there is.

The second half of the contract is about host memory that is read *while training goes on*:

- An owner that overwrites state piece by piece promises so (`promise`): from then on it changes
  that memory only behind `before_overwrite`, and says ahead what comes next (`coming`).
- A reader (`LiveReader`) that reads host memory later registers with `add_reader`. What nobody has
  promised for, it must have read before the update begins; for the rest it will be asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from lowtide.core.errors import LowtideError, StaleStateError, UnknownNameError, listed, near

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

DRAIN_TIMEOUT_S = 300.0

Drain = Callable[[Sequence[str]], object]
Memory: TypeAlias = "NDArray[np.uint64]"  # (n, 2): begin and end of stretches of host memory


class LiveReader(Protocol):
    """Somebody who reads host memory while training goes on."""

    @property
    def is_reading(self) -> bool:
        """Whether there is anything left to be read."""

    def hurry(self, memory: Memory) -> None:
        """Read this before the rest, in this order; returns at once."""

    def is_released(self, memory: Memory) -> bool:
        """Tell whether nobody will read this any more, so that `release` returns at once."""

    def release(self, memory: Memory) -> None:
        """Read this now; returns when nobody will read it any more, in every case."""


def memory_of(tensors: Iterable[torch.Tensor]) -> Memory:
    """Return where contiguous tensors lie, in their order; those that are not on the host do not.

    Raises:
        LowtideError: a tensor has gaps, so that its bytes are not one stretch.
    """
    found = []
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        if not tensor.is_contiguous():
            raise LowtideError(
                f"state: a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is "
                f"to be guarded, allowed are contiguous ones; pass the flat tensor it is part of"
            )
        found.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    return np.array(found, np.uint64).reshape(-1, 2)


def merged(memory: Memory) -> Memory:
    """Return the same memory in ascending stretches that neither touch nor overlap."""
    if not len(memory):
        return memory
    ordered = memory[np.argsort(memory[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ordered[:, 1])
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:, 0] > ends[:-1]
    last = np.append(np.flatnonzero(is_first)[1:] - 1, len(ordered) - 1)
    return np.stack([ordered[is_first, 0], ends[last]], axis=1)


def outside(memory: Memory, covered: Memory) -> Memory:
    """Return those stretches of `memory` that do not lie inside one of `covered` (`merged`)."""
    if not len(covered) or not len(memory):
        return memory
    number = np.searchsorted(covered[:, 0], memory[:, 0], side="right")
    is_inside = (number > 0) & (memory[:, 1] <= covered[np.maximum(number, 1) - 1, 1])
    loose: Memory = memory[~is_inside]
    return loose


class Location(str, Enum):
    """Where the newest copy of a piece of state is."""

    HOST = "host"
    DEVICE = "device"
    BUFFER = "buffer"  # in its owner's staging memory, on the way to a file
    IN_FLIGHT = "in_flight"  # on its way; neither end may be read or written


@dataclass(frozen=True)
class StateEntry:
    """Where the newest copy is, and how often the state has been updated."""

    location: Location
    version: int


@dataclass
class _Record:
    entry: StateEntry
    drain: Drain | None
    moves: int = 0  # how often `entry` changed: tells a round trip from standing still


class StateAuthority:
    """The book of newest copies. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}
        self._changed = threading.Condition(threading.RLock())
        self._draining = threading.RLock()
        self._promises: dict[str, Callable[[], Iterable[torch.Tensor]]] = {}
        self._readers: list[LiveReader] = []

    # -- memory that is read while training goes on -------------------------------------------

    def promise(self, owner: str, find: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Promise that some memory changes only behind `before_overwrite`, until `withdraw`.

        Args:
            owner: Whose promise it is; a later one of the same owner takes its place.
            find: Returns the tensors as they are now; called before each update that a reader is
                there for, by the training thread.
        """
        with self._changed:
            self._promises[owner] = find

    def withdraw(self, owner: str) -> None:
        """Take a promise back; without one, nothing happens. Not during an update."""
        with self._changed:
            self._promises.pop(owner, None)

    def promised(self) -> Memory:
        """Return the memory that is promised now, merged."""
        with self._changed:
            finds = list(self._promises.values())
        return merged(memory_of(tensor for find in finds for tensor in find()))

    def add_reader(self, reader: LiveReader) -> None:
        """Ask `reader` from now on before memory is overwritten."""
        with self._changed:
            self._readers.append(reader)

    def is_read(self) -> bool:
        """Whether somebody still reads live memory; owners may spare themselves the rest."""
        return any(reader.is_reading for reader in self._readers)

    def coming(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say which memory will be overwritten next, in order. Returns at once."""
        self._ask(tensors, lambda reader, memory: reader.hurry(memory))

    def may_overwrite(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Tell whether `before_overwrite` would return at once: an owner may do other work first.

        Does not take the place of that call.
        """
        is_free = True

        def look(reader: LiveReader, memory: Memory) -> None:
            nonlocal is_free
            is_free = is_free and reader.is_released(memory)

        self._ask(tensors, look)
        return is_free

    def before_overwrite(self, tensors: Iterable[torch.Tensor]) -> None:
        """Return when nobody will read the memory of `tensors` any more.

        Called by an owner right before it changes them. A reader has a limit of its own for how
        long that may take, and gives up what it was reading for.
        """
        self._ask(tensors, lambda reader, memory: reader.release(memory))

    def _ask(
        self, tensors: Iterable[torch.Tensor], ask: Callable[[LiveReader, Memory], None]
    ) -> None:
        readers = [reader for reader in self._readers if reader.is_reading]
        memory = memory_of(tensors) if readers else None
        for reader in readers:
            if memory is not None and len(memory):
                ask(reader, memory)

    # -- where the newest copies are ----------------------------------------------------------

    def register(
        self,
        key: str,
        *,
        drain: Drain | None = None,
        location: Location = Location.HOST,
        version: int = 0,
    ) -> None:
        """Take over `key`. Called by its owner, once.

        Args:
            key: Name of the piece of state.
            drain: Called with the keys to bring to the host. It publishes them as ``HOST`` before
                it returns, or as ``IN_FLIGHT`` and as ``HOST`` once they have arrived. Keys that
                share one drain are passed to it in one call, in the thread that asks.
            location: Where the newest copy is now.
            version: Number of updates it has seen.

        Raises:
            LowtideError: the key has an owner already.
        """
        with self._changed:
            if key in self._records:
                raise LowtideError(
                    f'state "{key}": registered already, and a piece of state has one owner; '
                    f"unregister it first or choose another key"
                )
            self._records[key] = _Record(StateEntry(Location(location), version), drain)

    def unregister(self, key: str) -> None:
        """Give up `key`; called by its owner when the host copy is again the only one."""
        with self._changed:
            self._record(key)
            del self._records[key]
            self._changed.notify_all()

    def publish(self, key: str, location: Location, version: int) -> None:
        """Say where the newest copy of `key` is. Called by its owner at every move and update.

        Raises:
            StaleStateError: a newer version has been published.
            UnknownNameError: nobody registered the key.
        """
        entry = StateEntry(Location(location), version)
        with self._changed:
            record = self._record(key)
            if version < record.entry.version:
                raise StaleStateError(
                    f'state "{key}": cannot publish version {version}, version '
                    f"{record.entry.version} on {record.entry.location.value} is newer; publish "
                    f"each update once, in order"
                )
            if entry != record.entry:
                record.entry = entry
                record.moves += 1
                self._changed.notify_all()

    def keys(self) -> list[str]:
        """Return all registered keys, sorted."""
        with self._changed:
            return sorted(self._records)

    def where(self, key: str) -> StateEntry:
        """Return where the newest copy of `key` is.

        Raises:
            UnknownNameError: nobody registered the key.
        """
        with self._changed:
            return self._record(key).entry

    def ensure_host(
        self, keys: Iterable[str] | None = None, *, timeout_s: float = DRAIN_TIMEOUT_S
    ) -> dict[str, int]:
        """Bring the newest copies to the host. Called by readers, before they read.

        Calls the owners' drains for what is elsewhere, then waits for what is in flight.

        Args:
            keys: Which pieces of state; None is all of them.
            timeout_s: How long to wait for arrivals. A drain that blocks is not interrupted.

        Returns:
            The version of each key; at one moment all of them were on the host.

        Raises:
            StaleStateError: a key is not on the host after its drain, or not in time.
            UnknownNameError: nobody registered a key.
        """
        end_s = monotonic() + timeout_s
        wanted = self.keys() if keys is None else list(keys)
        if self._away(wanted):
            # One drain at a time: the second reader finds the work done.
            if not self._draining.acquire(timeout=max(0.0, timeout_s)):
                raise self._stale(wanted, f"another drain did not end within {timeout_s} s")
            try:
                self._drain(wanted)
            finally:
                self._draining.release()
        with self._changed:
            while self._away(wanted):
                stuck = [key for key in self._away(wanted) if not self._is_coming(key)]
                if stuck:
                    raise self._stale(stuck, "they have no drain, or it left them where they were")
                if not self._changed.wait(end_s - monotonic()) and monotonic() >= end_s:
                    raise self._stale(wanted, f"they did not arrive within {timeout_s} s")
            return {key: self._record(key).entry.version for key in wanted}

    @contextmanager
    def snapshot(
        self, keys: Iterable[str] | None = None, *, location: Location | None = Location.HOST
    ) -> Iterator[dict[str, StateEntry]]:
        """Watch over a read: ``with state.snapshot(keys) as entries:`` read the copies there.

        Args:
            keys: Which pieces of state are read; None is all of them.
            location: Where the caller reads. None leaves it to the entries that are handed out.

        Raises:
            StaleStateError: on entry, the newest copy of a key is not there or is in flight; on
                exit, a key moved or was updated in between, so what was read must be discarded.
            UnknownNameError: nobody registered a key.
        """
        with self._changed:
            wanted = self.keys() if keys is None else list(keys)
            before = {key: (self._record(key), self._record(key).moves) for key in wanted}
            entries = {key: record.entry for key, (record, _) in before.items()}
            bad = [key for key, entry in entries.items() if not _is_readable(entry, location)]
            if bad:
                place = "settled" if location is None else f"on {location.value}"
                raise self._stale(bad, f"a snapshot needs them {place}; call ensure_host() first")
        yield entries
        with self._changed:
            # The record is compared too: a key may have been given up and taken over.
            moved = [
                f"{key} (was version {entries[key].version} on {entries[key].location.value})"
                for key, (record, moves) in before.items()
                if self._records.get(key) is not record or record.moves != moves
            ]
        if moved:
            raise StaleStateError(
                f"state changed while it was read: {', '.join(moved)}; discard what was read, and "
                f"take the snapshot where no update or transfer runs"
            )

    def _drain(self, wanted: Sequence[str]) -> None:
        batches: list[tuple[Drain, list[str]]] = []
        with self._changed:
            for key in self._away(wanted):
                drain = self._record(key).drain
                if drain is None:
                    continue
                # Bound methods are equal but not identical, and need not be hashable.
                for known, batch in batches:
                    if known == drain:
                        batch.append(key)
                        break
                else:
                    batches.append((drain, [key]))
        for drain, batch in batches:  # without the lock: drains publish, from any thread
            drain(batch)

    def _away(self, wanted: Iterable[str]) -> list[str]:
        with self._changed:
            return [key for key in wanted if self._record(key).entry.location != Location.HOST]

    def _is_coming(self, key: str) -> bool:
        return self._record(key).entry.location == Location.IN_FLIGHT

    def _record(self, key: str) -> _Record:
        record = self._records.get(key)
        if record is None:
            raise UnknownNameError(
                f'unknown state "{key}".{near(key, self._records)} Known: {listed(self._records)}'
            )
        return record

    def _stale(self, keys: Sequence[str], why: str) -> StaleStateError:
        with self._changed:
            found = [
                f"{key}: version {record.entry.version} is on {record.entry.location.value}"
                for key in keys
                if (record := self._records.get(key)) is not None
            ]
        return StaleStateError(f"stale state ({'; '.join(found[:20])}): {why}")


def _is_readable(entry: StateEntry, location: Location | None) -> bool:
    if location is None:
        return entry.location != Location.IN_FLIGHT
    return entry.location == location
