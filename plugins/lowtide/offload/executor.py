"""Carries out plans, one update after the other, and knows where the newest state is."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from operator import itemgetter
from time import perf_counter

from torch import Tensor

from lowtide.core.device import Device
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError, StorageError
from lowtide.core.state import Location, StateAuthority
from lowtide.offload.adam import AdamStep
from lowtide.offload.one_update import OneUpdate, Pace, Work, update_there
from lowtide.offload.rates import STATE_BYTES, PathRates
from lowtide.offload.schedule import Piece, Plan
from lowtide.offload.staging import Landings, Place, make_resident, make_slots
from lowtide.offload.storage.flow import Flow
from lowtide.offload.storage.tier import Tier
from lowtide.offload.subgroup import Subgroup
from lowtide.offload.trace import StepTrace

logger = logging.getLogger("lowtide")

HABIT = 3  # updates in a row in which gradients came otherwise, until plans count on that


class Executor:
    """Updates the subgroups of one rank.

    Args:
        device: Where staged subgroups and residents are updated.
        subgroups: All of this rank's, in the host's order.
        authority: Told where the newest copies are.
        pace: Slows updates down to given rates, on an emulated device.
        tier: Where stored subgroups are.
        memory_bytes: Device memory for slots and residents; whatever an update needs, it takes no
            more.
    """

    def __init__(
        self,
        device: Device,
        subgroups: Sequence[Subgroup],
        authority: StateAuthority,
        pace: Pace | None = None,
        tier: Tier | None = None,
        memory_bytes: float = math.inf,
    ) -> None:
        self.device = device
        self._memory_bytes = memory_bytes
        self.subgroups = list(subgroups)
        self.failure: DeviceError | None = None  # why the device is not used any more
        self.trace = StepTrace()
        self._tier = tier
        self._index_of = {
            each.stored: index
            for index, each in enumerate(self.subgroups)
            if each.stored is not None
        }
        self._place = Place(device, self.subgroups, Landings(device), tier=tier)
        self._pace = pace or Pace()
        self._authority = authority
        self._version = 0
        self._wide: set[int] = set()  # whose gradients come in float32 and from the host, each time
        self._surprises = [0] * len(self.subgroups)  # updates in a row in which that was not so
        for each in self.subgroups:
            authority.register(each.key, drain=self._drain_keys)

    def close(self) -> None:
        """Bring everything to the host and give up the keys."""
        try:
            self.drain()
        except StorageError as error:  # raised already, or by the next update
            logger.error("offload: %s", error)
        self.release_gradients()
        for each in self.subgroups:
            self._authority.unregister(each.key)
        self._place.residents.clear()
        self._place.landings.clear()

    def run(self, plan: Plan, works: Sequence[Work]) -> StepTrace:
        """Update every subgroup once; all state and all rounded parameters are there on return.

        Args:
            plan: Which subgroups are updated where, and in which order.
            works: One per subgroup.

        Raises:
            DeviceError: a failure on the device took state with it that was only there.
            StorageError: stored state cannot be read back, or a path hangs.
        """
        begin_s = perf_counter()
        self._version += 1
        on_device = self._make_room(plan)
        is_degraded = len(on_device) < len(plan.device_order)
        on_device, count, nbytes = self._within_memory(plan, on_device, works)
        try:
            slots = make_slots(self.device, count, nbytes)
        except DeviceOutOfMemoryError as error:
            logger.warning("offload: no room to stage, so the host updates all: %s", error)
            slots, on_device, is_degraded = [], [], True
            self._send_home(self._place.residents)
        on_host = [*plan.host_order, *(i for i in plan.device_order if i not in set(on_device))]
        update = OneUpdate(
            self._place, works, self._pace, self._ask, slots, may_upload=self.failure is None
        )
        self.trace = update.trace
        update.trace.begin_s = begin_s
        update.trace.is_degraded = is_degraded
        is_as_told = [self._is_as_told(i, work) for i, work in enumerate(works)]
        update.trace.is_typical = all(is_as_told[i] for i in plan.device_order)
        flow = self._flow(plan, update.trace)
        try:
            self._announce(on_device, on_host, flow)
            self._updates(update, on_device, on_host, flow)
        except BaseException:  # lost storage, or Ctrl-C, after which many a script saves
            # Nothing may be under way when the caller gives up, and who saves what there is must
            # learn where that is.
            if flow is not None:
                flow.stop()
            with contextlib.suppress(DeviceError):
                self.failure = self.failure or update.finish()
            self._publish()
            raise
        self.failure = self.failure or update.finish()
        if self.failure is None:
            for index, resident in self._place.residents.items():
                if resident.is_newest:  # not where the host had to do it
                    resident.keep(self.subgroups[index].keeper)
        self._learn(is_as_told)
        update.trace.end_s = perf_counter()
        self._publish()
        return update.trace

    def _flow(self, plan: Plan, trace: StepTrace) -> Flow | None:
        """Begin to read stored state."""
        tier = self._tier
        if tier is None:
            return None

        def note(number: int, lane: str, nbytes: int, begin_s: float, end_s: float) -> None:
            key = self.subgroups[self._index_of[number]].key
            trace.add_transfer(key, lane, nbytes, begin_s, end_s)

        tier.noted = note
        order = [n for i in plan.stored_order if (n := self.subgroups[i].stored) is not None]
        # Back and forth: what is updated last is in memory, and comes first the next time.
        return Flow(tier, order[:: 1 if self._version % 2 else -1], plan.carried)

    def _announce(
        self, on_device: Iterable[int], on_host: Sequence[int], flow: Flow | None
    ) -> None:
        """Tell who still reads state in which order it will be overwritten."""
        if not self._authority.is_read():
            return
        stored = [] if flow is None else [self._index_of[number] for number in flow.order]
        there = [self._overwritten_by_device(index) for index in on_device]
        lanes = [there, self._overwritten(stored), self._overwritten(on_host)]
        # All of them end at about the same time.
        turns = [(i / len(lane), group) for lane in lanes for i, group in enumerate(lane)]
        turns.sort(key=itemgetter(0))
        self._authority.coming(t for _, group in turns for t in group)

    def _overwritten(self, indices: Iterable[int]) -> list[Iterable[Tensor]]:
        return [self.subgroups[index].overwritten() for index in indices]

    def _ask(self, indices: Iterable[int]) -> None:
        """Wait until nobody reads what an update of these overwrites."""
        self._authority.before_overwrite(t for group in self._overwritten(indices) for t in group)

    def _overwritten_by_device(self, index: int) -> Iterable[Tensor]:
        """Return what an update on the device overwrites on the host: of residents no state."""
        subgroup = self.subgroups[index]
        if index not in self._place.residents:
            return subgroup.overwritten()
        return [] if subgroup.weights is None else [subgroup.weights]

    def _queue(self, update: OneUpdate, waiting: deque[int], *, may_wait: bool) -> None:
        """Queue updates on the device, in order, as far as nobody reads what they overwrite."""
        while waiting:
            tensors = list(self._overwritten_by_device(waiting[0]))
            if not may_wait and not self._authority.may_overwrite(tensors):
                return
            self._authority.before_overwrite(tensors)
            update.queue(waiting.popleft())

    def _updates(
        self,
        update: OneUpdate,
        on_device: Sequence[int],
        on_host: Sequence[int],
        flow: Flow | None,
    ) -> None:
        """Update stored subgroups as they arrive, and others of the host in the time between."""
        rest, waiting = deque(on_host), deque(on_device)
        self._queue(update, waiting, may_wait=False)
        while rest or (flow is not None and not flow.is_over):
            found = None
            if flow is not None and not flow.is_over:
                found = flow.take(wait=not rest)
            if flow is not None and found is not None:
                number, state = found
                self._ask([self._index_of[number]])  # its file is what the tensors map
                update.on_host(self._index_of[number], state)
                flow.done(number)
            elif rest:
                self._ask([rest[0]])
                update.on_host(rest.popleft())
            self._queue(update, waiting, may_wait=False)
        self._queue(update, waiting, may_wait=True)
        if flow is not None:
            flow.finish()

    def drain(self, indices: Iterable[int] | None = None, *, may_write: bool = True) -> None:
        """Bring state to the host's own tensors, which have the newest copy from then on.

        Args:
            indices: Which subgroups; None: all.
            may_write: Whether somebody may change it there.
        """
        residents = self._place.residents
        indices = None if indices is None else list(indices)
        if self._tier is not None:
            chosen = range(len(self.subgroups)) if indices is None else indices
            numbers = [n for i in chosen if (n := self.subgroups[i].stored) is not None]
            self._tier.drain(numbers, may_write=may_write)
            for number in numbers:
                key = self.subgroups[self._index_of[number]].key
                self._authority.publish(key, Location.HOST, self._version)
        away = residents if indices is None else [i for i in indices if i in residents]
        self._ask(i for i in away if residents[i].is_newest)  # their host copies may be read yet
        for index in self._place.bring_home(away):
            self._authority.publish(self.subgroups[index].key, Location.HOST, self._version)

    def release_gradients(self) -> None:
        """Bring gradients that accumulate on the device to the host, and let them do so there."""
        self._place.release_gradients(self._place.residents)

    # -- for planning -------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """Return what a planner needs to know about the subgroups."""
        return [
            Piece(
                numel=each.numel,
                low_precision_bytes=self._upload_bytes(each.weights),
                gradient_upload_bytes=self._gradient_bytes(index),
                is_movable=self._is_movable(each),
                keeps_gradient=self._keeps_gradient(index),
                path=self._path_of(each),
            )
            for index, each in enumerate(self.subgroups)
        ]

    def _gradient_bytes(self, index: int) -> int:
        return 4 if index in self._wide else self.subgroups[index].gradient_bytes

    def _keeps_gradient(self, index: int) -> bool:
        return index not in self._wide and self.subgroups[index].keeper is not None

    def _is_movable(self, each: Subgroup) -> bool:
        if each.stored is not None:  # also one that had to stay in memory: a plan stays valid
            return False
        if self.device.kind != "cuda":
            return True
        # A GPU's kernel writes the rounded parameters itself, into its own memory.
        return each.may_travel and (each.weights is None or self.device.owns(each.weights))

    def _path_of(self, each: Subgroup) -> int | None:
        if self._tier is None or each.stored is None:
            return None
        # One that no path takes any more is still updated by the flow of stored ones.
        return self._tier.pieces[each.stored].path or 0

    def _upload_bytes(self, weights: Tensor | None) -> int:
        is_far = weights is not None and self._place.landings.is_far(weights)
        return weights.element_size() if weights is not None and is_far else 0

    @property
    def tier(self) -> Tier | None:
        """Where stored subgroups are."""
        return self._tier

    @property
    def buffers(self) -> int:
        """Staging buffers for stored subgroups, at least 1."""
        return 1 if self._tier is None else max(1, self._tier.layout.buffers)

    def path_rates(self) -> tuple[PathRates, ...]:
        """Return how fast the storage paths are."""
        return () if self._tier is None else tuple(self._tier.rates)

    def resident_bytes(self) -> int:
        """Return the device memory of residents: state, and gradients that stay there."""
        tensors = (
            tensor
            for each in self._place.residents.values()
            for tensor in (*each.state, each.gradient)
            if tensor is not None
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def try_update(self, where: str, tensors: Sequence[Tensor], step: AdamStep) -> None:
        """Update scratch tensors (master, gradient, two moments) as ``"host"`` or ``"device"``."""
        param, gradient, exp_avg, exp_avg_sq = tensors
        work = Work(gradient, 1.0, step)
        update_there(where, self.device, self._pace, (param, exp_avg, exp_avg_sq), work, gradient)

    # -- inside -------------------------------------------------------------------------------

    def _make_room(self, plan: Plan) -> list[int]:
        """Send home who is no resident any more, make room for new ones; return who may run."""
        residents = self._place.residents
        wanted = set(plan.residents) if self.failure is None else set()
        # Also who has room for gradients there and needs none any more, or the other way round.
        gone = [
            i
            for i, each in residents.items()
            if i not in wanted or (each.gradient is not None) != self._keeps_gradient(i)
        ]
        self._send_home(gone)
        for index in gone:
            del residents[index]
        for index in sorted(wanted - set(residents)):
            try:
                residents[index] = make_resident(
                    self.device, self.subgroups[index], keeps_gradient=self._keeps_gradient(index)
                )
            except DeviceOutOfMemoryError as error:
                logger.warning("offload: fewer residents than planned: %s", error)
                break
        refused = wanted - set(residents)
        return [i for i in plan.device_order if i not in refused and self.failure is None]

    def _within_memory(
        self, plan: Plan, on_device: Sequence[int], works: Sequence[Work]
    ) -> tuple[list[int], int, int]:
        """Return who of `on_device` may run there, how many slots that takes, and their size.

        A plan counts on gradients as they are as a rule. Float32 ones take more: a larger slot,
        or one where a gradient would have stayed. Where that is too much, the host does it.
        """
        residents = self._place.residents
        loads = {
            i: works[i].gradient.nbytes
            + (0 if i in residents else STATE_BYTES * self.subgroups[i].numel)
            for i in on_device
            if self._place.kept_gradient(i, works[i].is_accumulated) is None
        }
        if not loads:
            return list(on_device), 0, 0
        left = self._memory_bytes - self.resident_bytes()
        nbytes = max(loads.values())
        if nbytes > left:
            refused = {i for i, load in loads.items() if load > left}
            self._send_home(refused & residents.keys())
            return self._within_memory(plan, [i for i in on_device if i not in refused], works)
        return list(on_device), int(min(max(plan.slots, 1), left / nbytes)), nbytes

    def _is_as_told(self, index: int, work: Work) -> bool:
        """Return whether a gradient has the size and the place that `pieces` tells planners."""
        has_size = work.gradient.element_size() == self._gradient_bytes(index)
        has_keeper = self.subgroups[index].keeper is not None
        return has_size and (not has_keeper or work.is_accumulated == self._keeps_gradient(index))

    def _learn(self, is_as_told: Sequence[bool]) -> None:
        """Tell planners otherwise where gradients have come otherwise for a while.

        A parameter that never has gradients makes those of its whole subgroup float32 ones, on the
        host, in every update; a layer that is left out now and then does not.
        """
        for index, is_so in enumerate(is_as_told):
            self._surprises[index] = 0 if is_so else self._surprises[index] + 1
            if self._surprises[index] == HABIT:
                self._surprises[index] = 0
                self._wide ^= {index}

    def _send_home(self, indices: Iterable[int]) -> None:
        """Let the host update residents: bring their state there, and their gradients."""
        indices = list(indices)
        self.drain(indices)
        self._place.release_gradients(indices)

    def _publish(self) -> None:
        for index, each in enumerate(self.subgroups):
            resident = self._place.residents.get(index)
            is_away = resident is not None and resident.is_newest
            where = Location.DEVICE if is_away else Location.HOST
            if self._tier is not None and each.stored in self._tier.dirty:
                where = Location.BUFFER
            self._authority.publish(each.key, where, self._version)

    def _drain_keys(self, keys: Sequence[str]) -> None:
        wanted = set(keys)
        self.drain(
            [i for i, each in enumerate(self.subgroups) if each.key in wanted], may_write=False
        )
