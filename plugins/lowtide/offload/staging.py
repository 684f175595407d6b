"""Device memory that an update borrows: staging slots, and residents that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.core.device import Device, DeviceEvent
from lowtide.offload.subgroup import Subgroup


@dataclass
class Slot:
    """Room on the device for the state and the gradient of one subgroup at a time."""

    state: tuple[Tensor, Tensor, Tensor]  # float32, shape (largest numel,)
    gradient: Tensor  # bytes, large enough for float32
    is_free: DeviceEvent | None = None  # once the state of the last user is back on the host

    def state_of(self, numel: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return master and moments of a subgroup of `numel` elements."""
        master, exp_avg, exp_avg_sq = self.state
        return master[:numel], exp_avg[:numel], exp_avg_sq[:numel]

    def gradient_of(self, like: Tensor) -> Tensor:
        """Return room for a gradient of that size and type."""
        return self.gradient[: like.numel() * like.element_size()].view(like.dtype)


def make_slots(device: Device, subgroups: Sequence[Subgroup], count: int) -> list[Slot]:
    """Allocate `count` slots that fit each of `subgroups`.

    Raises:
        DeviceOutOfMemoryError: they do not fit; nothing stays allocated.
    """
    numel = max((each.numel for each in subgroups), default=0)
    if numel == 0:
        return []
    return [
        Slot(_state(device, numel), device.empty(4 * numel, torch.uint8)) for _ in range(count)
    ]


@dataclass
class Resident:
    """A subgroup whose newest state is on the device from one update to the next.

    Attributes:
        state: Master and moments on the device.
        gradient: Room for the gradient.
        is_newest: Whether `state` is the newest copy; otherwise that is the host's. Bringing it
            home makes it so: whoever asked for it may write there, and torch does not tell.
    """

    state: tuple[Tensor, Tensor, Tensor]
    gradient: Tensor
    is_newest: bool = False


def make_resident(device: Device, subgroup: Subgroup, gradient: Tensor) -> Resident:
    """Allocate device memory for a resident; its contents are still to be copied.

    Raises:
        DeviceOutOfMemoryError: it does not fit.
    """
    return Resident(_state(device, subgroup.numel), device.empty(gradient.shape, gradient.dtype))


def _state(device: Device, numel: int) -> tuple[Tensor, Tensor, Tensor]:
    master, exp_avg, exp_avg_sq = (device.empty(numel, torch.float32) for _ in range(3))
    return master, exp_avg, exp_avg_sq
