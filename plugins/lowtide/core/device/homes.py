"""Which device a tensor lives on, for code that is handed tensors and did not place them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lowtide.core.device.base import Device

if TYPE_CHECKING:
    from lowtide.core.telemetry import Telemetry


class Homes:
    """Finds the device of a tensor. GPUs are opened when a tensor on them is first met.

    Args:
        devices: Devices that are open already, such as an emulated one. Their owner closes them.
        telemetry: Takes the spans of the devices that are opened here.
    """

    def __init__(self, devices: Sequence[Device] = (), telemetry: Telemetry | None = None) -> None:
        self._given = tuple(devices)
        self._telemetry = telemetry
        self._gpus: dict[int, Device] = {}
        self._lock = threading.Lock()

    @property
    def has_given(self) -> bool:
        """Whether there are devices that host memory, as torch sees it, may belong to."""
        return bool(self._given)

    def of(self, tensor: Tensor) -> Device | None:
        """Return the device that holds `tensor`, or None for plain host memory.

        Raises:
            DeviceError: its GPU cannot be opened, or torch keeps it where no device of ours is.
        """
        for device in self._given:
            if device.owns(tensor):
                return device
        if tensor.is_cpu:
            return None
        from lowtide.core.device import open_device

        if not tensor.is_cuda:
            return open_device(tensor.device.type)  # says that there is no such kind
        index = tensor.get_device()
        with self._lock:
            if index not in self._gpus:
                self._gpus[index] = open_device("cuda", index=index, telemetry=self._telemetry)
            return self._gpus[index]

    def close(self, *, timeout_s: float | None = None) -> None:
        """Close the devices that were opened here; what has not begun on them is dropped.

        Raises:
            DeviceError: work still ran after `timeout_s` seconds, or had failed.
        """
        with self._lock:
            gpus, self._gpus = list(self._gpus.values()), {}
        for device in gpus:
            device.close(cancel=True, timeout_s=timeout_s)
