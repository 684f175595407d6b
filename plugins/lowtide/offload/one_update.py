"""One update of all subgroups: copies and updates on a device's lanes, beside those on the host.

What the device does is queued before the first update on the host begins, as far as no checkpoint
still reads what it overwrites; events between the lanes do the rest, and the calling thread is free
for the host's share:

    prefetch   state and gradient of a subgroup to its slot, once the slot is free
    device     update in the slot; writes the rounded parameters where the model reads them
    flush      state back to the host
    host       update on the host's cores, in the calling thread, with its pool of threads
    upload     parameters that the host has rounded, to the device
    read0      state of stored subgroups to host memory, one lane per path (storage/flow.py)
    write0     and back

A failure on the device loses nothing. State leaves the host only as a copy, and comes back after
its update is complete; so whatever did not come back is updated on the host, from the copy there.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from lowtide.core.device import Device, DeviceEvent, Lane
from lowtide.core.errors import DeviceError
from lowtide.offload.adam import AdamStep, update, update_cuda
from lowtide.offload.staging import Landings, Place, Slot
from lowtide.offload.trace import StepTrace

logger = logging.getLogger("lowtide")

State = tuple[Tensor, Tensor, Tensor]  # master, first moment, second moment
_PARTS = 3
_LANES = ("prefetch", "device", "flush", "upload")


@dataclass(frozen=True)
class Work:
    """What one subgroup's update needs beside its state.

    Attributes:
        gradient: Float32, bfloat16 or float16, shape (numel,), on the host.
        is_accumulated: Whether it is where the host accumulates; of a resident, the rest of it may
            be on the device.
        scale: What the gradient is multiplied by first; a float32 number.
        step: Scalars of the update.
    """

    gradient: Tensor
    scale: float
    step: AdamStep
    is_accumulated: bool = False


@dataclass(frozen=True)
class Pace:
    """Rates of an emulated device's updates, parameters per second; None does not slow down."""

    device: float | None = None
    host: float | None = None


@dataclass
class _Staged:
    """How far a staged subgroup has been queued."""

    slot: Slot
    updated: DeviceEvent
    flushed: list[DeviceEvent] = field(default_factory=list)

    def is_home(self) -> bool:
        """Whether its new state has come back whole."""
        return len(self.flushed) == _PARTS and all(map(_is_well, self.flushed))


class OneUpdate:
    """One call of `Executor.run`.

    Args:
        place: Device, subgroups, residents.
        works: One per subgroup.
        pace: Slows updates down.
        ask: Waits until nobody reads the state of these subgroups any more.
        slots: What staged subgroups go through.
        may_upload: False: the device has failed, rounded parameters get there by plain copies.
    """

    def __init__(
        self,
        place: Place,
        works: Sequence[Work],
        pace: Pace,
        ask: Callable[[Iterable[int]], None],
        slots: Sequence[Slot],
        *,
        may_upload: bool,
    ) -> None:
        self.trace = StepTrace()
        self._place = place
        self._works = works
        self._pace = pace
        self._ask = ask
        self._slots = itertools.cycle(slots)
        self._may_upload = may_upload
        self._order: list[int] = []  # of what the device was to update
        self._failure: DeviceError | None = None  # then the rest of it is for the host
        self._staged: dict[int, _Staged] = {}
        self._resident: dict[int, DeviceEvent] = {}
        self._begun: set[int] = set()  # updates on the device that may have changed something
        self._landed: list[DeviceEvent | None] = [None] * Landings.COUNT
        self._turn = 0
        self._has_uploaded = False

    # -- device -----------------------------------------------------------------------------

    def queue(self, index: int) -> None:
        """Queue all that the device does for one subgroup; residents must have been made."""
        ready = None if self._order else self._place.device.record_event("gradients")
        self._order.append(index)
        if self._failure is not None:
            return  # no slot is used again: it may hold the only copy
        try:
            if ready is not None:
                for name in _LANES:
                    self._lane(name).wait(ready)
            kept = self._place.kept_gradient(index, self._works[index].is_accumulated)
            slot = None if kept is not None else next(self._slots)
            if index in self._place.residents:
                self._queue_resident(index, slot, kept)
            elif slot is not None:
                self._queue_staged(index, slot)
        except DeviceError as error:  # `finish` makes it good
            self._failure = error

    def _queue_staged(self, index: int, slot: Slot) -> None:
        subgroup, source = self._place.subgroups[index], self._works[index].gradient
        there = slot.state_of(subgroup.numel)
        gradient = slot.gradient_of(source, behind=subgroup.numel)
        pairs = [*zip(there, subgroup.state(), strict=True), (gradient, source)]
        self._fetch(subgroup.key, slot, pairs)
        updated = self._update_on_device(index, there, gradient)
        staged = self._staged[index] = _Staged(slot, updated)
        flush = self._lane("flush")
        flush.wait(updated)
        for pair in zip(subgroup.state(), there, strict=True):
            staged.flushed.append(self._copy(flush, subgroup.key, *pair))
        slot.is_free = staged.flushed[-1]

    def _queue_resident(self, index: int, slot: Slot | None, kept: Tensor | None) -> None:
        subgroup, resident = self._place.subgroups[index], self._place.residents[index]
        source = self._works[index].gradient
        state = zip(resident.state, subgroup.state(), strict=True)
        pairs = [] if resident.is_newest else list(state)
        if kept is not None:
            gradient, loads = kept, resident.loads
            for part in [(0, subgroup.numel)] if loads is None else loads:
                pairs.append((kept.narrow(0, *part), source.narrow(0, *part)))
        elif slot is not None:
            gradient = slot.gradient_of(source)
            pairs.append((gradient, source))
        self._fetch(subgroup.key, slot, pairs)
        self._resident[index] = self._update_on_device(index, resident.state, gradient)
        if slot is not None:
            slot.is_free = self._resident[index]

    def _fetch(self, key: str, slot: Slot | None, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Queue copies to the device, and let the update there wait for them."""
        prefetch = self._lane("prefetch")
        if slot is not None and slot.is_free is not None:
            prefetch.wait(slot.is_free)
        copies = [self._copy(prefetch, key, *pair) for pair in pairs]
        if copies:
            self._lane("device").wait(copies[-1])

    def _update_on_device(self, index: int, state: State, gradient: Tensor) -> DeviceEvent:
        place, work = self._place, self._works[index]
        subgroup = place.subgroups[index]

        def run(*_tensors: Tensor) -> None:
            self._begun.add(index)
            update_there(
                "device", place.device, self._pace, state, work, gradient, subgroup.weights
            )

        # The tensors are named once more so that the lane keeps them and knows their stream.
        named = [*state, gradient, *([] if subgroup.weights is None else [subgroup.weights])]
        event = self._lane("device").run(run, *named, label=subgroup.key)
        self.trace.add_event(subgroup.key, "device", event, params=subgroup.numel)
        return event

    def _copy(self, lane: Lane, key: str, dst: Tensor, src: Tensor) -> DeviceEvent:
        event = lane.copy(dst, src, label=key)
        name = lane.name.rpartition("/")[2]
        self.trace.add_event(key, name, event, nbytes=src.numel() * src.element_size())
        return event

    def _lane(self, name: str) -> Lane:
        return self._place.device.lane(name)

    # -- host -------------------------------------------------------------------------------

    def on_host(self, index: int, state: State | None = None) -> None:
        """Update a subgroup in the calling thread, from its host copy or from `state`."""
        place, work = self._place, self._works[index]
        subgroup = place.subgroups[index]
        weights, landings = subgroup.weights, place.landings
        rounded = weights
        is_far = weights is not None and landings.is_far(weights)
        if weights is not None and is_far:
            landed = self._landed[self._turn % Landings.COUNT]
            if landed is not None:
                _is_well(landed)  # only waits: `finish` sees what failed
            rounded = landings.of(self._turn, weights)
        begin_s = perf_counter()
        update_there(
            "host", place.device, self._pace, subgroup.state() if state is None else state, work,
            work.gradient, rounded,
        )  # fmt: skip
        self.trace.add(subgroup.key, subgroup.numel, begin_s, perf_counter())
        if weights is None or rounded is None or not is_far:
            return
        turn, self._turn = self._turn % Landings.COUNT, self._turn + 1
        self._landed[turn] = None
        try:
            if self._may_upload and place.device.kind != "cpu":
                self._has_uploaded = True
                self._landed[turn] = self._upload(subgroup.key, weights, rounded)
        except DeviceError:  # a lane has failed, or an emulated device is full
            pass
        if self._landed[turn] is None:
            weights.copy_(rounded)

    def _upload(self, key: str, weights: Tensor, rounded: Tensor) -> DeviceEvent:
        lane = self._lane("upload")
        if self._place.device.owns(weights):
            return self._copy(lane, key, weights, rounded)
        # An emulated device holds no model: the bytes take the way over its link all the same.
        there = self._place.landings.far_side(weights)
        self._copy(lane, key, there, rounded)
        return lane.run(weights.copy_, there, label=key)

    # -- the end ------------------------------------------------------------------------------

    def finish(self) -> DeviceError | None:
        """Wait for the device; make good on the host what failed there, and return that failure.

        Raises:
            DeviceError: state was lost that was only on the device.
        """
        if not self._order and not self._has_uploaded:
            return None
        lanes = [self._lane(name) for name in _LANES]
        failure = self._failure
        for lane in lanes:
            try:
                lane.synchronize()
            except DeviceError as error:
                failure = failure or error
        if failure is None:
            for index in self._resident:
                self._place.residents[index].is_newest = True
            return None
        for lane in lanes:
            lane.clear()
        self.trace.is_degraded = True
        self._may_upload = False
        self._make_good(failure)
        logger.warning(
            "offload: the device failed; nothing is lost, and all updates run on the host from "
            "now on: %s", failure,
        )  # fmt: skip
        return failure

    def _make_good(self, failure: DeviceError) -> None:
        place = self._place
        self._ask(place.residents)
        for index, updated in self._resident.items():
            resident = place.residents[index]
            if _is_well(updated):
                resident.is_newest = True
            elif index in self._begun and resident.is_newest:
                raise DeviceError(
                    f'subgroup "{place.subgroups[index].key}": its state was only on '
                    f"{place.device.name}, and its update there failed half way; load the last "
                    f"checkpoint ({failure})"
                )
        place.bring_home(place.residents)
        place.release_gradients(place.residents)
        for index in self._order:
            staged, subgroup = self._staged.get(index), place.subgroups[index]
            found = self._resident.get(index) if staged is None else staged.updated
            if found is None or not _is_well(found):
                self.on_host(index)  # from the host's copy, which nobody has touched
            elif staged is not None and not staged.is_home():
                # The slot still holds it: the next subgroup waits for this one's way back.
                flush, there = self._lane("flush"), staged.slot.state_of(subgroup.numel)
                for host, new in zip(subgroup.state(), there, strict=True):
                    flush.copy(host, new, label=subgroup.key)
                flush.synchronize()
        for index, subgroup in enumerate(place.subgroups):
            if subgroup.weights is not None:  # what the host had rounded may not have got through
                subgroup.weights.copy_(place.newest_on_host(index)[0])


def update_there(
    where: str,
    device: Device,
    pace: Pace,
    state: State,
    work: Work,
    gradient: Tensor,
    rounded: Tensor | None = None,
) -> None:
    """Update `state` on the ``"host"`` or the ``"device"``, where all tensors are."""
    begin_s = perf_counter()
    is_on_host = where == "host"
    kernel = update_cuda if device.kind == "cuda" and not is_on_host else update
    master, exp_avg, exp_avg_sq = state
    kernel(
        master, gradient, exp_avg, exp_avg_sq, work.step,
        grad_scale=work.scale, low_precision=rounded,
    )  # fmt: skip
    rate = pace.host if is_on_host else pace.device
    if rate is not None:
        time.sleep(max(0.0, begin_s + master.numel() / rate - perf_counter()))


def _is_well(event: DeviceEvent) -> bool:
    """Wait until an operation has ended; return whether it was done."""
    try:
        event.wait()
    except DeviceError:
        return False
    return True
