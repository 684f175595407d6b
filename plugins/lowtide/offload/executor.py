"""Carries out a plan: copies and updates on the lanes of a device, beside updates on the host.

Everything for the device is queued before the first update on the host begins; events between the
lanes do the rest, and the calling thread is free for the host's share:

    prefetch   state and gradient of a staged subgroup to its slot, once the slot is free
    device     update in the slot; writes the rounded parameters where the model reads them
    flush      state back to the host
    host       update on the host's cores, in the calling thread, with its pool of threads
    upload     parameters that the host has rounded, to the device

A failure on the device loses nothing. State leaves the host only as a copy, and comes back after
its update is complete; so whatever did not come back is updated on the host, from the copy there.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from lowtide.core.device import Device, DeviceEvent, Lane
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError
from lowtide.core.state import Location, StateAuthority
from lowtide.offload.adam import AdamStep, update, update_cuda
from lowtide.offload.rates import STATE_BYTES
from lowtide.offload.schedule import Piece, Plan
from lowtide.offload.staging import Resident, Slot, make_resident, make_slots
from lowtide.offload.subgroup import Subgroup
from lowtide.offload.trace import StepTrace

logger = logging.getLogger("lowtide")

LANDINGS = 2  # host buffers of rounded parameters on their way to the device


@dataclass(frozen=True)
class Work:
    """What one subgroup's update needs beside its state.

    Attributes:
        gradient: Float32, bfloat16 or float16, shape (numel,), on the host.
        scale: What the gradient is multiplied by first; a float32 number.
        step: Scalars of the update.
    """

    gradient: Tensor
    scale: float
    step: AdamStep


@dataclass(frozen=True)
class Pace:
    """Rates of an emulated device's updates, parameters per second; None does not slow down."""

    device_params_per_s: float | None = None
    host_params_per_s: float | None = None


class Executor:
    """Updates the subgroups of one rank.

    Args:
        device: Where staged subgroups and residents are updated.
        subgroups: All of this rank's, in the host's order.
        authority: Told where the newest copies are.
        pace: Slows updates down to given rates, on an emulated device.
    """

    def __init__(
        self,
        device: Device,
        subgroups: Sequence[Subgroup],
        authority: StateAuthority,
        pace: Pace | None = None,
    ) -> None:
        self.device = device
        self.subgroups = list(subgroups)
        self._authority = authority
        self._pace = pace or Pace()
        self._residents: dict[int, Resident] = {}
        self._buffers: dict[str, Tensor] = {}
        self._version = 0
        self.failure: DeviceError | None = None  # why the device is not used any more
        self.trace = StepTrace()
        for each in self.subgroups:
            authority.register(each.key, drain=self._drain_keys)

    def close(self) -> None:
        """Bring everything to the host and give up the keys."""
        self.drain()
        for each in self.subgroups:
            self._authority.unregister(each.key)
        self._buffers.clear()

    # -- one update -------------------------------------------------------------------------

    def run(self, plan: Plan, works: Sequence[Work]) -> StepTrace:
        """Update every subgroup once; all state and all rounded parameters are there on return.

        Args:
            plan: Which subgroups are updated where, and in which order.
            works: One per subgroup.

        Raises:
            DeviceError: a failure on the device took state with it that was only there.
        """
        step = _Step(self, works)
        self.trace = step.trace
        step.trace.begin_s = perf_counter()
        self._version += 1
        on_device = self._make_room(plan, works)
        staged = [self.subgroups[i] for i in on_device if i not in self._residents]
        try:
            slots = make_slots(self.device, staged, plan.slots)
        except DeviceOutOfMemoryError as error:
            logger.warning("offload: no room to stage, so the host takes its share: %s", error)
            slots, on_device = [], [i for i in on_device if i in self._residents]
        on_host = [*plan.host_order, *(i for i in plan.device_order if i not in set(on_device))]
        step.trace.is_degraded = len(on_device) < len(plan.device_order)
        if on_device:
            step.queue(on_device, slots)
        for index in on_host:
            step.update_on_host(index)
        step.finish()
        step.trace.end_s = perf_counter()
        self._publish()
        return step.trace

    def _make_room(self, plan: Plan, works: Sequence[Work]) -> list[int]:
        """Send home who is no resident any more, make room for new ones; return who may run."""
        wanted = set(plan.residents) if self.failure is None else set()
        gone = [i for i in self._residents if i not in wanted]
        self.drain(gone)
        for index in gone:
            del self._residents[index]
        refused = set()
        for index in sorted(wanted - set(self._residents)):
            try:
                self._residents[index] = make_resident(
                    self.device, self.subgroups[index], works[index].gradient
                )
            except DeviceOutOfMemoryError as error:
                logger.warning("offload: fewer residents than planned: %s", error)
                refused = wanted - set(self._residents)
                break
        if self.failure is not None:
            return []
        return [i for i in plan.device_order if i not in refused]

    def _publish(self) -> None:
        for index, each in enumerate(self.subgroups):
            resident = self._residents.get(index)
            is_away = resident is not None and resident.is_newest
            place = Location.DEVICE if is_away else Location.HOST
            self._authority.publish(each.key, place, self._version)

    # -- for planning -------------------------------------------------------------------------

    def pieces(self, works: Sequence[Work]) -> list[Piece]:
        """Return what a planner needs to know about the subgroups."""
        return [
            Piece(
                numel=each.numel,
                low_precision_bytes=(
                    each.weights.element_size()
                    if each.weights is not None and self._is_far(each.weights)
                    else 0
                ),
                gradient_upload_bytes=work.gradient.element_size(),
            )
            for each, work in zip(self.subgroups, works, strict=True)
        ]

    def resident_bytes(self) -> int:
        """Return the device memory of residents' state."""
        return sum(STATE_BYTES * each.state[0].numel() for each in self._residents.values())

    def try_update(self, place: str, tensors: Sequence[Tensor], step: AdamStep) -> None:
        """Update scratch tensors (master, gradient, moments) as ``"host"`` or ``"device"`` would.

        For measurements.
        """
        begin_s = perf_counter()
        is_cuda = place == "device" and self.device.kind == "cuda"
        (update_cuda if is_cuda else update)(*tensors, step)
        pace = self._pace
        rate = pace.host_params_per_s if place == "host" else pace.device_params_per_s
        _keep_pace(tensors[0].numel(), rate, begin_s)

    # -- the way of rounded parameters to the device -------------------------------------------

    def _is_far(self, weights: Tensor) -> bool:
        return self.device.kind != "cpu" and (
            self.device.kind == "emulated" or self.device.owns(weights)
        )

    def _landing_of(self, turn: int, weights: Tensor) -> Tensor:
        """Return the host buffer of one turn, for parameters such as `weights`."""
        return self._buffer(f"landing {turn}", weights, self.device.host_empty)

    def _far_side(self, weights: Tensor) -> Tensor:
        """Return the emulated device's stand-in for the model's own memory."""
        return self._buffer("far side", weights, self.device.empty)

    def _buffer(self, name: str, like: Tensor, make: Callable[[int, torch.dtype], Tensor]) -> Tensor:
        found = self._buffers.get(name)
        if found is None or found.dtype != like.dtype or found.numel() < like.numel():
            found = self._buffers[name] = make(like.numel(), like.dtype)
        return found[: like.numel()]

    # -- bringing newest copies home ----------------------------------------------------------

    def drain(self, indices: Iterable[int] | None = None) -> None:
        """Copy residents' state to the host, which has the newest copy from then on."""
        wanted = self._residents if indices is None else indices
        away = [i for i in wanted if self._residents[i].is_newest]
        if not away:
            return
        lane = self.device.lane("flush")
        for index in away:
            subgroup = self.subgroups[index]
            for host, there in zip(subgroup.state(), self._residents[index].state, strict=True):
                lane.copy(host, there, label=subgroup.key)
        lane.synchronize()
        for index in away:
            self._residents[index].is_newest = False
            self._authority.publish(self.subgroups[index].key, Location.HOST, self._version)

    def _drain_keys(self, keys: Sequence[str]) -> None:
        wanted = set(keys)
        self.drain([i for i in self._residents if self.subgroups[i].key in wanted])


@dataclass
class _Staged:
    """How far a staged subgroup has been queued."""

    slot: Slot
    updated: DeviceEvent
    flushed: list[DeviceEvent] = field(default_factory=list)

    def is_home(self) -> bool:
        """Whether its new state has come back whole."""
        return len(self.flushed) == len(self.slot.state) and all(map(_is_well, self.flushed))


class _Step:
    """One call of `Executor.run`."""

    def __init__(self, executor: Executor, works: Sequence[Work]) -> None:
        self.trace = StepTrace()
        self._of = executor
        self.device = executor.device
        self._works = works
        self._order: list[int] = []
        self._staged: dict[int, _Staged] = {}
        self._resident: dict[int, DeviceEvent] = {}
        self._begun: set[int] = set()  # updates on the device that may have changed something
        self._landed: list[DeviceEvent | None] = [None] * LANDINGS
        self._landing = 0

    # -- device -----------------------------------------------------------------------------

    def queue(self, order: list[int], slots: list[Slot]) -> None:
        """Queue all that the device does in this step, in this order."""
        ready = self.device.record_event("gradients")
        for lane in map(self._lane, ("prefetch", "device", "flush", "upload")):
            lane.wait(ready)
        self._order = order
        turn = 0
        with contextlib.suppress(DeviceError):  # a lane failed already; `finish` will see it
            for index in order:
                if index in self._of._residents:
                    self._queue_resident(index)
                else:
                    self._queue_staged(index, slots[turn % len(slots)])
                    turn += 1

    def _queue_staged(self, index: int, slot: Slot) -> None:
        subgroup, work = self._of.subgroups[index], self._works[index]
        prefetch, compute, flush = map(self._lane, ("prefetch", "device", "flush"))
        there, gradient = slot.state_of(subgroup.numel), slot.gradient_of(work.gradient)
        if slot.is_free is not None:
            prefetch.wait(slot.is_free)
        pairs = [*zip(there, subgroup.state(), strict=True), (gradient, work.gradient)]
        compute.wait([self._copy(prefetch, subgroup.key, *pair) for pair in pairs][-1])
        updated = self._update_on_device(index, there, gradient)
        staged = self._staged[index] = _Staged(slot, updated)
        flush.wait(updated)
        for pair in zip(subgroup.state(), there, strict=True):
            staged.flushed.append(self._copy(flush, subgroup.key, *pair))
        slot.is_free = staged.flushed[-1]

    def _queue_resident(self, index: int) -> None:
        subgroup, work = self._of.subgroups[index], self._works[index]
        resident = self._of._residents[index]
        prefetch, compute = self._lane("prefetch"), self._lane("device")
        pairs = [(resident.gradient, work.gradient)]
        if not resident.is_newest:
            pairs += zip(resident.state, subgroup.state(), strict=True)
        compute.wait([self._copy(prefetch, subgroup.key, *pair) for pair in pairs][-1])
        updated = self._update_on_device(index, resident.state, resident.gradient)
        self._resident[index] = updated

    def _update_on_device(
        self, index: int, state: tuple[Tensor, Tensor, Tensor], gradient: Tensor
    ) -> DeviceEvent:
        subgroup, work = self._of.subgroups[index], self._works[index]
        kernel = update_cuda if self.device.kind == "cuda" else update

        def run(*_tensors: Tensor) -> None:
            begin_s = perf_counter()
            self._begun.add(index)
            kernel(
                state[0], gradient, state[1], state[2], work.step,
                grad_scale=work.scale, low_precision=subgroup.weights,
            )  # fmt: skip
            _keep_pace(subgroup.numel, self._of._pace.device_params_per_s, begin_s)

        # The tensors are named once more so that the lane keeps them and knows their stream.
        tensors = [*state, gradient, *([] if subgroup.weights is None else [subgroup.weights])]
        event = self._lane("device").run(run, *tensors, label=subgroup.key)
        self.trace.add_event(subgroup.key, "device", event, params=subgroup.numel)
        return event

    def _copy(self, lane: Lane, key: str, dst: Tensor, src: Tensor) -> DeviceEvent:
        event = lane.copy(dst, src, label=key)
        name = lane.name.rpartition("/")[2]
        self.trace.add_event(key, name, event, nbytes=src.numel() * src.element_size())
        return event

    def _lane(self, name: str) -> Lane:
        return self.device.lane(name)

    # -- host -------------------------------------------------------------------------------

    def update_on_host(self, index: int) -> None:
        """Update a subgroup from its host copy, in the calling thread."""
        subgroup, work = self._of.subgroups[index], self._works[index]
        weights, turn = subgroup.weights, self._landing % LANDINGS
        rounded = weights
        is_far = weights is not None and self._of._is_far(weights)
        if weights is not None and is_far:
            self._landing += 1
            landed = self._landed[turn]
            if landed is not None:
                _is_well(landed)  # only waits: `finish` sees what failed
            rounded = self._of._landing_of(turn, weights)
        begin_s = perf_counter()
        update(
            subgroup.master, work.gradient, subgroup.exp_avg, subgroup.exp_avg_sq, work.step,
            grad_scale=work.scale, low_precision=rounded,
        )  # fmt: skip
        _keep_pace(subgroup.numel, self._of._pace.host_params_per_s, begin_s)
        self.trace.add(subgroup.key, subgroup.numel, begin_s, perf_counter())
        if weights is None or rounded is None or not is_far:
            return
        if self._of.failure is not None:
            weights.copy_(rounded)
            return
        with contextlib.suppress(DeviceError):  # a lane failed already; `finish` will see it
            self._landed[turn] = self._upload(subgroup.key, weights, rounded)

    def _upload(self, key: str, weights: Tensor, rounded: Tensor) -> DeviceEvent:
        lane = self._lane("upload")
        if self.device.owns(weights):
            return self._copy(lane, key, weights, rounded)
        # An emulated device holds no model: the bytes take the way over its link all the same.
        there = self._of._far_side(weights)
        self._copy(lane, key, there, rounded)
        return lane.run(weights.copy_, there, label=key)

    # -- the end ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Wait for the device; make good on the host what failed there."""
        if not self._order and not any(self._landed):
            return
        lanes = [self._lane(name) for name in ("prefetch", "device", "flush", "upload")]
        failures: list[DeviceError] = []
        for lane in lanes:
            try:
                lane.synchronize()
            except DeviceError as error:
                failures.append(error)
        if not failures:
            for index in self._resident:
                self._of._residents[index].is_newest = True
            return
        for lane in lanes:
            lane.clear()
        self._of.failure = failures[0]
        self.trace.is_degraded = True
        logger.warning(
            "offload: the device failed, nothing is lost, and all updates run on the host from "
            "now on: %s", failures[0],
        )  # fmt: skip
        self._make_good()

    def _make_good(self) -> None:
        for index, updated in self._resident.items():
            resident = self._of._residents[index]
            if _is_well(updated):
                resident.is_newest = True
            elif index in self._begun and resident.is_newest:
                raise DeviceError(
                    f'subgroup "{self._of.subgroups[index].key}": its state was only on '
                    f"{self.device.name}, and its update there failed half way; load the last "
                    f"checkpoint ({self._of.failure})"
                )
        self._of.drain()
        for index in self._order:
            staged, subgroup = self._staged.get(index), self._of.subgroups[index]
            updated = self._resident.get(index) if staged is None else staged.updated
            if updated is None or not _is_well(updated):
                self.update_on_host(index)  # from the host's copy, which nobody has touched
            elif staged is not None and not staged.is_home():
                # The slot still holds it: the next subgroup waits for this one's way back.
                there = staged.slot.state_of(subgroup.numel)
                for host, new in zip(subgroup.state(), there, strict=True):
                    self._lane("flush").copy(host, new, label=subgroup.key)
                self._lane("flush").synchronize()
        # What the host had rounded may not have got through.
        for index in range(len(self._works)):
            subgroup = self._of.subgroups[index]
            if subgroup.weights is not None:
                subgroup.weights.copy_(subgroup.master)


def _is_well(event: DeviceEvent) -> bool:
    """Whether a settled event stands for an operation that was done."""
    try:
        event.wait()
    except DeviceError:
        return False
    return True


def _keep_pace(numel: int, params_per_s: float | None, begin_s: float) -> None:
    if params_per_s is not None:
        time.sleep(max(0.0, begin_s + numel / params_per_s - perf_counter()))
