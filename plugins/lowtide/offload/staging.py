"""Memory that updates use on the device and on the way there: slots, residents, landings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowtide.core.device import Device, DeviceEvent
from lowtide.core.errors import DeviceError
from lowtide.offload.gradients import Keeper
from lowtide.offload.rates import STATE_BYTES
from lowtide.offload.storage.tier import Tier
from lowtide.offload.subgroup import Subgroup

logger = logging.getLogger("lowtide")


@dataclass
class Slot:
    """Room on the device for what one subgroup at a time has to bring there.

    Attributes:
        memory: Bytes: master and moments of a staged subgroup, then its gradient.
        is_free: The last user's last operation here.
    """

    memory: Tensor
    is_free: DeviceEvent | None = None

    def state_of(self, numel: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return master and moments of a subgroup of `numel` elements, float32."""
        master, exp_avg, exp_avg_sq = (
            self.memory[: STATE_BYTES * numel].view(torch.float32).split(numel)
        )
        return master, exp_avg, exp_avg_sq

    def gradient_of(self, like: Tensor, *, behind: int = 0) -> Tensor:
        """Return room for a gradient of that size and type, behind the state of some elements."""
        begin = STATE_BYTES * behind
        return self.memory[begin : begin + like.nbytes].view(like.dtype)


def make_slots(device: Device, count: int, nbytes: int) -> list[Slot]:
    """Allocate slots of `nbytes` each.

    Raises:
        DeviceOutOfMemoryError: they do not fit; nothing stays allocated.
    """
    return [Slot(device.empty(nbytes, torch.uint8)) for _ in range(count)]


@dataclass
class Resident:
    """A subgroup whose newest state is on the device from one update to the next.

    Attributes:
        state: Master and moments on the device.
        is_newest: Whether `state` is the newest copy; otherwise that is the host's. Bringing it
            home makes it so: whoever asked for it may write there, and torch does not tell.
        gradient: Where its gradients accumulate, shape (numel,); None: on the host.
        loads: (begin, count) of what of `gradient` is on the host all the same; None: all of it.
    """

    state: tuple[Tensor, Tensor, Tensor]
    is_newest: bool = False
    gradient: Tensor | None = None
    loads: list[tuple[int, int]] | None = None

    def keep(self, keeper: Keeper | None) -> None:
        """Let gradients accumulate on the device from now on."""
        if keeper is not None and self.gradient is not None and self.loads is None:
            self.loads = keeper.keep(self.gradient)

    def release(self, keeper: Keeper | None) -> None:
        """Let them accumulate on the host again, and bring them there."""
        if keeper is not None and self.loads is not None:
            keeper.release()
            self.loads = None


def make_resident(device: Device, subgroup: Subgroup, *, keeps_gradient: bool) -> Resident:
    """Allocate device memory for a resident; its contents are still to be copied.

    Args:
        device: Where.
        subgroup: Whose state it will hold.
        keeps_gradient: Whether there is to be room for its gradients too.

    Raises:
        DeviceOutOfMemoryError: it does not fit.
    """
    keeper = subgroup.keeper if keeps_gradient else None
    gradient = None if keeper is None else device.empty(subgroup.numel, keeper.dtype)
    return Resident(_state(device, subgroup.numel), gradient=gradient)


def _state(device: Device, numel: int) -> tuple[Tensor, Tensor, Tensor]:
    master, exp_avg, exp_avg_sq = (device.empty(numel, torch.float32) for _ in range(3))
    return master, exp_avg, exp_avg_sq


class Landings:
    """Host buffers for parameters that the host has rounded, on their way to the device."""

    COUNT = 2  # one is filled while another one travels

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def is_far(self, weights: Tensor) -> bool:
        """Whether `weights` are on the device. An emulated one holds no model, but acts so."""
        return self._device.kind == "emulated" or weights.device.type != "cpu"

    def of(self, turn: int, weights: Tensor) -> Tensor:
        """Return the buffer of one turn, with the size and type of `weights`."""
        return self._buffer(f"landing {turn % self.COUNT}", weights, self._device.host_empty)

    def far_side(self, weights: Tensor) -> Tensor:
        """Return the emulated device's stand-in for the model's own memory."""
        return self._buffer("far side", weights, self._device.empty)

    def clear(self) -> None:
        """Give all buffers up."""
        self._buffers.clear()

    def _buffer(
        self, name: str, like: Tensor, make: Callable[[int, torch.dtype], Tensor]
    ) -> Tensor:
        found = self._buffers.get(name)
        if found is None or found.dtype != like.dtype or found.numel() < like.numel():
            found = self._buffers[name] = make(like.numel(), like.dtype)
        return found[: like.numel()]


@dataclass
class Place:
    """What the updates of one rank work with.

    Attributes:
        device: Where subgroups may be updated beside the host.
        subgroups: All of this rank's, in the host's order.
        residents: Those that are on the device, by number.
        landings: Buffers for rounded parameters.
        tier: Where the stored ones are.
    """

    device: Device
    subgroups: list[Subgroup]
    landings: Landings
    residents: dict[int, Resident] = field(default_factory=dict)
    tier: Tier | None = None

    def newest_on_host(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a subgroup's state on the host, which may be in a staging buffer."""
        subgroup = self.subgroups[index]
        if self.tier is None or subgroup.stored is None:
            return subgroup.state()
        return self.tier.newest(subgroup.stored)

    def kept_gradient(self, index: int, is_accumulated: bool) -> Tensor | None:
        """Return a resident's own room for its gradient, if that is what the update reads."""
        resident = self.residents.get(index)
        return None if resident is None or not is_accumulated else resident.gradient

    def release_gradients(self, indices: Iterable[int]) -> None:
        """Bring gradients that accumulate on the device to the host, and let them do so there."""
        for index in indices:
            self.residents[index].release(self.subgroups[index].keeper)

    def bring_home(self, indices: Iterable[int]) -> list[int]:
        """Copy residents whose newest state is on the device to the host; return which."""
        away = [i for i in indices if self.residents[i].is_newest]
        if not away:
            return away
        try:
            self._copy_home(away)
        except DeviceError as error:  # the device's copies are whole: once more
            logger.warning("offload: bringing state home failed, trying again: %s", error)
            self.device.lane("flush").clear()
            self._copy_home(away)
        for index in away:
            self.residents[index].is_newest = False
        return away

    def _copy_home(self, indices: Sequence[int]) -> None:
        lane = self.device.lane("flush")
        for index in indices:
            subgroup = self.subgroups[index]
            for host, there in zip(subgroup.state(), self.residents[index].state, strict=True):
                lane.copy(host, there, label=subgroup.key)
        lane.synchronize()
