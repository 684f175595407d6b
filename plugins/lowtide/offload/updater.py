"""One rank's Adam: flat masters in, one planned update per step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lowtide.core.device import Device
from lowtide.core.errors import StorageError
from lowtide.core.state import StateAuthority
from lowtide.offload.adam import AdamStep
from lowtide.offload.executor import Executor
from lowtide.offload.gradients import Keeper, Source
from lowtide.offload.one_update import Pace, Work
from lowtide.offload.scheduler import Agree, Scheduler
from lowtide.offload.storage.tier import Tier
from lowtide.offload.subgroup import ALIGNMENT, Subgroup, cuts
from lowtide.offload.trace import StepTrace

logger = logging.getLogger("lowtide")

_T = TypeVar("_T")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Gradients(Protocol):
    """Where a master's gradients come from."""

    @property
    def nbytes_each(self) -> int:
        """Bytes per parameter, as a rule."""

    def source(self, scale: float) -> Source:
        """Return the gradient for the coming update."""

    def keeper(self, begin: int, count: int) -> Keeper | None:
        """Return what lets a part accumulate on the device, if that can be."""


@dataclass(eq=False)
class Master:
    """One flat master of the host, with what belongs to it.

    Attributes:
        leaf: Float32, contiguous, on the host; the optimizer's state is keyed by it, has its shape.
        group: Number of its parameter group.
        gradients: Its gradients.
        weights: Where its rounded parameters go, shape (numel,), or None where the host rounds them
            by itself.
        may_move: Whether the leaf's data may be put into other memory. The host may hold views.
    """

    leaf: Tensor
    group: int
    gradients: Gradients
    weights: Tensor | None
    may_move: bool = True


class Rule(Protocol):
    """The host's optimizer: its state and settings stay the ones in charge."""

    def state_of(self, master: Master) -> MutableMapping[str, Any]:
        """Return the optimizer's state of a master: ``step``, ``exp_avg``, ``exp_avg_sq``."""

    def first_step(self) -> Any:
        """Return what the state's ``step`` is before the first update."""

    def advance(
        self, master: Master, tails: tuple[Tensor, Tensor, Tensor], gradient: Tensor
    ) -> AdamStep:
        """Count the step of a master, update its last elements, and return the step's scalars.

        Args:
            master: All of them in turn, in each update.
            tails: What of master and moments fills no vector: float32, less than `ALIGNMENT`
                elements, perhaps none; updated in place by the host's own kernel.
            gradient: Theirs; float32, scaled.
        """


class Updater:
    """Updates all masters of one rank, by plan, with the bits of the host's own optimizer.

    Args:
        masters: In the host's order.
        rule: The host's optimizer.
        device: Where subgroups may be updated beside the host.
        scheduler: Makes the plans.
        authority: Told where the newest copies are.
        subgroup_params: Larger masters are cut into pieces of about this size.
        pace: Slows an emulated device down.
        tier: Where state that does not fit in memory lives. Masters are moved there at once.
        together: Finds the smallest numbers over all ranks, so that they fail together; None: each
            fails alone. Storage asks for it.
    """

    def __init__(
        self,
        masters: Sequence[Master],
        rule: Rule,
        *,
        device: Device,
        scheduler: Scheduler,
        authority: StateAuthority,
        subgroup_params: int,
        pace: Pace | None = None,
        tier: Tier | None = None,
        together: Agree | None = None,
    ) -> None:
        self.masters = list(masters)
        self.scheduler = scheduler
        self._rule = rule
        self._device = device
        self._authority = authority
        self._subgroup_params = subgroup_params
        self._pace = pace
        self.tier = tier
        self._join = together
        self._unmoved: set[int] = set()  # stored masters whose moments are still zeros
        self._arena: dict[tuple[int, str], Tensor] = {}
        self._executor: Executor | None = None
        self._known: list[int] = []  # addresses of the state that the executor works on
        self.steps = 0
        for number, master in enumerate(self.masters):
            if self._is_stored(number):
                self._store(number, master, {})
                self._unmoved.add(number)

    @property
    def trace(self) -> StepTrace:
        """What the last update did."""
        return StepTrace() if self._executor is None else self._executor.trace

    def update(self, scale: float) -> None:
        """Do one step of Adam on everything.

        Args:
            scale: What gradients are multiplied by first, as float32.

        Raises:
            DeviceError: state was lost on the device.
            StorageError: state was lost in storage, here or on another rank. Collective where
                there is storage, so that no rank waits for one that has given up.
        """
        if self._join is None:
            self._update(self._ready_executor(), scale)
            return
        # Twice, because planning is collective too: nobody may be in another collective call.
        executor = self._together(self._join, self._ready_executor)
        self._together(self._join, lambda: self._update(executor, scale))

    @staticmethod
    def _together(join: Agree, action: Callable[[], _T]) -> _T:
        """Do something on all ranks, or raise on all ranks. Collective."""
        found, failure = outcome_of(action)
        try:
            is_well = join([float(failure is None)])[0] > 0.0
        except Exception:  # the others may be gone; this rank's own failure says more
            if failure is None:
                raise
        if failure is not None:
            raise failure
        if not is_well:
            raise StorageError(
                "offload.storage: another rank has failed in its update, and its log says why; "
                "start again from the last checkpoint"
            )
        return cast(_T, found)

    def _update(self, executor: Executor, scale: float) -> None:
        # Plans may fail, on their collective or a device; so nothing has been changed before.
        plan = self.scheduler.next_plan(executor)
        sources = [master.gradients.source(scale) for master in self.masters]
        if self._authority.is_read():
            self._authority.before_overwrite(map(_tail, self.overwritten()))
        steps = [
            self._advance(master, source.flat, source.scale)
            for master, source in zip(self.masters, sources, strict=True)
        ]
        works = []
        for subgroup in executor.subgroups:
            source, step = sources[subgroup.flat], steps[subgroup.flat]
            part = subgroup.part_of(source.flat)
            works.append(Work(part, source.scale, step, is_accumulated=source.is_accumulated))
        trace = executor.run(plan, works)
        self.scheduler.observe(trace)
        self.steps += 1

    def overwritten(self) -> list[Tensor]:
        """Return what `update` overwrites, and asks the authority before; flat tensors.

        Nothing before the first update, which still moves things.
        """
        if self._executor is None:
            return []
        found: list[Tensor] = []
        for master in self.masters:
            found += self._tensors_of(master)
            if master.weights is not None:
                found.append(master.weights)
        return found

    def drain(self, *, may_write: bool = True) -> None:
        """Bring the newest state to the host's own tensors.

        Args:
            may_write: Whether it may be changed there until the next update.
        """
        if self._executor is not None:
            self._executor.drain(may_write=may_write)
        elif self.tier is not None:
            self.tier.drain(may_write=may_write)

    def release_gradients(self) -> None:
        """Let gradients accumulate on the host until the next update."""
        if self._executor is not None:
            self._executor.release_gradients()

    def replace_masters(self, masters: Sequence[Master]) -> None:
        """Go on with masters that the host has made anew, as after loading a checkpoint."""
        self.close()
        self.masters = list(masters)

    def close(self) -> None:
        """Bring everything home, for good."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None  # only now: it may hold the only copy of something

    def end(self) -> None:
        """Bring everything home and let go of storage: the host's tensors hold all there is."""
        self.close()
        tier, self.tier = self.tier, None
        if tier is not None:
            tier.close()

    # -- state ------------------------------------------------------------------------------

    def _advance(self, master: Master, gradient: Tensor, factor: float) -> AdamStep:
        """Count the step of a master and return its scalars.

        The last elements, which fill no vector, are left to the host's own kernel: how it rounds
        them depends on the compiler that built it.
        """
        master_, exp_avg, exp_avg_sq = (_tail(each) for each in self._tensors_of(master))
        step = self._rule.advance(
            master, (master_, exp_avg, exp_avg_sq), _tail(gradient).float() * factor
        )
        if master.weights is not None and master_.numel():
            _tail(master.weights).copy_(master_)
        return step

    def _ready_executor(self) -> Executor:
        """Return the executor for the state as it is: loading a checkpoint replaces tensors."""
        for number, master in enumerate(self.masters):
            self._adopt(number, master)
        known = [
            tensor.data_ptr()
            for master in self.masters
            for tensor in (*self._tensors_of(master), master.weights)
            if tensor is not None
        ]
        if self._executor is None or known != self._known:
            self.close()
            self._executor = Executor(
                self._device, self._cut(), self._authority, self._pace, self.tier,
                self.scheduler.most_bytes,
            )  # fmt: skip
            self._known = known
        return self._executor

    def _adopt(self, number: int, master: Master) -> None:
        state = self._rule.state_of(master)
        if "step" not in state:
            state["step"] = self._rule.first_step()
        if self._is_stored(number):
            self._store(number, master, state)
            for name, known in zip(_MOMENTS, self._maps(number)[1:], strict=True):
                state[name] = known.view(master.leaf.shape)
            return
        for name in _MOMENTS:
            if name not in state:
                state[name] = self._memory(number, name, master.leaf, torch.zeros_like)
            elif master.may_move and self._is_foreign(number, name, state[name]):
                state[name] = self._move(number, name, state[name])
        if master.may_move and self._is_foreign(number, "master", master.leaf):
            master.leaf.data = self._move(number, "master", master.leaf.data)

    def _is_stored(self, number: int) -> bool:
        return self.tier is not None and number in self.tier.ranges

    def _maps(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.tier is None:
            raise AssertionError("unreachable: nothing is stored")
        return self.tier.tensors(number)

    def _store(self, number: int, master: Master, state: Mapping[str, Any]) -> None:
        """Move what is not in storage there, and let the master be a map of it."""
        maps = self._maps(number)
        found = [master.leaf.data, *(state.get(name) for name in _MOMENTS)]
        is_there = [
            each is not None and each.data_ptr() == known.data_ptr()
            for each, known in zip(found, maps, strict=True)
        ]
        are_zeros = number in self._unmoved and is_there[0] and found[1:] == [None, None]
        if self.tier is not None and not all(is_there) and not are_zeros:
            self.tier.take(number, found)
        self._unmoved.discard(number)
        if not is_there[0]:
            master.leaf.data = maps[0].view(master.leaf.shape)

    def _memory(
        self, number: int, name: str, like: Tensor, make: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return memory that the device can copy from and to at full speed."""
        if self._device.kind == "cpu":
            return make(like.data)
        memory = self._arena.get((number, name))
        if memory is None:
            try:
                memory = self._device.host_empty(like.numel(), like.dtype)
            except RuntimeError as error:  # pinned memory is limited; other memory is only slower
                logger.warning("offload: no pinned memory for optimizer state: %s", error)
                memory = torch.empty(like.numel(), dtype=like.dtype)
            memory = memory.view(like.shape)
            self._arena[number, name] = memory
        return memory.zero_()

    def _is_foreign(self, number: int, name: str, tensor: Tensor) -> bool:
        if self._device.kind == "cpu" or tensor.is_pinned():
            return False
        memory = self._arena.get((number, name))
        return memory is None or memory.data_ptr() != tensor.data_ptr()

    def _move(self, number: int, name: str, tensor: Tensor) -> Tensor:
        return self._memory(number, name, tensor, torch.empty_like).copy_(tensor)

    def _tensors_of(self, master: Master) -> tuple[Tensor, Tensor, Tensor]:
        state = self._rule.state_of(master)
        tensors = (master.leaf.data, state["exp_avg"], state["exp_avg_sq"])
        master_, exp_avg, exp_avg_sq = (each.view(-1) for each in tensors)
        return master_, exp_avg, exp_avg_sq

    def _cut(self) -> list[Subgroup]:
        found = []
        for number, master in enumerate(self.masters):
            whole = master.leaf.numel() // ALIGNMENT * ALIGNMENT
            pieces = self._pieces_of(number, whole)
            for turn, (begin, count, stored) in enumerate(pieces):
                key = f"subgroup/{number}" + (f"/{turn}" if len(pieces) > 1 else "")
                master_, exp_avg, exp_avg_sq = (
                    each.narrow(0, begin, count) for each in self._tensors_of(master)
                )
                weights = master.weights
                found.append(
                    Subgroup(
                        key=key,
                        group=master.group,
                        flat=number,
                        begin=begin,
                        master=master_,
                        exp_avg=exp_avg,
                        exp_avg_sq=exp_avg_sq,
                        weights=None if weights is None else weights.narrow(0, begin, count),
                        gradient_bytes=master.gradients.nbytes_each,
                        stored=stored,
                        may_travel=not self._is_stored(number),
                        keeper=None
                        if stored is not None
                        else master.gradients.keeper(begin, count),
                    )
                )
        return found

    def _pieces_of(self, number: int, whole: int) -> list[tuple[int, int, int | None]]:
        """Return (begin, count, number in storage) of a master's pieces."""
        if self.tier is None or not self._is_stored(number):
            return [(begin, count, None) for begin, count in cuts(whole, self._subgroup_params)]
        of_extent = {id(each.extent): n for n, each in enumerate(self.tier.pieces)}
        return [
            (each.begin, each.numel, of_extent.get(id(each)))
            for each in self.tier.layout.extents
            if each.flat == number and each.numel
        ]


def outcome_of(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """Return what an action returns, or what it raises."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - raised once the other ranks know
        return None, error


def _tail(flat: Tensor) -> Tensor:
    """Return the last elements that fill no vector of the host's kernel; contiguous, detached."""
    return flat.detach()[flat.numel() // ALIGNMENT * ALIGNMENT :]
