"""One facade over the places where optimizer state, activations and snapshots can live.

- ``cpu``: device memory is host memory; lanes run their work at once in the calling thread.
- ``emulated``: a second arena in host memory, reached through copies throttled per direction; every
  lane has its own worker thread. Schedules, overlap and races are tested with it, without a GPU.
- ``cuda``: streams, events and pinned memory of one GPU. Not measured by this project yet.

A lane is an in-order queue. A failed operation is kept by its lane: work queued behind it is
cancelled, the error is raised by the next `DeviceEvent.wait` or `Lane.synchronize`, and the lane
refuses new work until `Lane.clear`. Waiting for an event of a failed lane fails the waiting lane as
well, so nothing is computed from data that did not arrive. A lane can only wait for an event that
exists already, hence waits never form a circle.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lowtide.core.device.base import CpuDevice, Device
from lowtide.core.device.emulated import EmulatedDevice
from lowtide.core.device.lanes import DeviceEvent, Lane
from lowtide.core.errors import DeviceError, listed, near

if TYPE_CHECKING:
    from lowtide.core.telemetry import Telemetry

__all__ = ["Device", "DeviceEvent", "Lane", "open_device"]

DEFAULT_MEMORY_BYTES = 1 << 28


def open_device(
    kind: str = "auto",
    *,
    index: int = 0,
    memory_bytes: int | None = None,
    host_to_device_bytes_per_s: float | None = None,
    device_to_host_bytes_per_s: float | None = None,
    telemetry: Telemetry | None = None,
) -> Device:
    """Open a device.

    Args:
        kind: "cpu", "cuda", "emulated", or "auto" for cuda where there is one and cpu elsewhere.
        index: Which GPU. An emulated device only carries it in its name.
        memory_bytes: Size of an emulated device's arena (default 256 MiB, touched at once).
        host_to_device_bytes_per_s: Rate of an emulated device's uploads, all its lanes together;
            None does not throttle. The two directions are independent of each other.
        device_to_host_bytes_per_s: The same for downloads.
        telemetry: Every finished operation becomes a span on its lane here.

    Raises:
        DeviceError: no such kind or device, or an argument that means nothing to it.
        DeviceOutOfMemoryError: the host cannot give an emulated device its memory.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    known = ["auto", "cpu", "cuda", "emulated"]
    if kind not in known:
        raise DeviceError(
            f'unknown device kind "{kind}".{near(kind, known)} Known: {listed(known)}'
        )
    limits = {
        "memory_bytes": memory_bytes,
        "host_to_device_bytes_per_s": host_to_device_bytes_per_s,
        "device_to_host_bytes_per_s": device_to_host_bytes_per_s,
    }
    for name, value in limits.items():
        if value is not None and kind != "emulated":
            raise DeviceError(f'device "{kind}": {name} is only for kind "emulated"; leave it out')
        if value is not None and not 0 < value < math.inf:
            raise DeviceError(f'device "{kind}": {name}={value} must be positive and finite')
    if kind == "cuda":
        from lowtide.core.device.cuda import CudaDevice

        return CudaDevice(index, telemetry)
    if index < 0 or (kind == "cpu" and index):
        raise DeviceError(f'device "{kind}": index {index} does not exist; use 0')
    if kind == "cpu":
        return CpuDevice(telemetry)
    return EmulatedDevice(
        f"emulated:{index}",
        memory_bytes or DEFAULT_MEMORY_BYTES,
        up_bytes_per_s=host_to_device_bytes_per_s,
        down_bytes_per_s=device_to_host_bytes_per_s,
        sink=telemetry,
    )
