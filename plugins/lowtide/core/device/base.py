"""What all devices share, and the simplest of them: host memory."""

from __future__ import annotations

import atexit
import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowtide.core.device.lanes import DeviceEvent, Lane, check_copy, host_route
from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError

if TYPE_CHECKING:
    from lowtide.core.telemetry import Telemetry


class Device(ABC):
    """A place with memory and lanes, made by `open_device`. Close it, or use it in ``with``."""

    kind: str  # "cpu", "cuda" or "emulated"
    torch_device = torch.device("cpu")  # where torch says that its tensors are

    def __init__(self, name: str, memory_bytes: int, sink: Telemetry | None) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self._sink = sink
        self._lanes: dict[str, Lane] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        # Daemon threads inside torch can crash an interpreter that goes away under them.
        atexit.register(self.close, cancel=True, timeout_s=5.0)

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the free bytes of device memory; they may be in several pieces."""

    def least_free_bytes(self) -> int:
        """Return how many bytes were free when the most memory was in use, as far as is known."""
        return self.free_bytes()

    @abstractmethod
    def owns(self, tensor: Tensor) -> bool:
        """Return whether `tensor` lives in this device's memory."""

    @abstractmethod
    def _make_lane(self, name: str) -> Lane: ...

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a contiguous tensor in device memory, contents unspecified.

        Its memory returns to the device when the last tensor that views it is gone.

        Raises:
            DeviceOutOfMemoryError: no free block is large enough.
        """
        self._check_open()
        try:
            return torch.empty(shape, dtype=dtype, device=self.torch_device)
        except RuntimeError as error:
            raise DeviceOutOfMemoryError(
                f'device "{self.name}": cannot allocate {shape} of {dtype} with '
                f"{self.free_bytes()} bytes free: {error}"
            ) from error

    def host_empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate a host tensor that is fast to copy from and to: pinned, or at least touched.

        Allocate once and reuse: pinning and first touch cost far more than the later copies.
        """
        return torch.zeros(shape, dtype=dtype)

    def lane(self, name: str) -> Lane:
        """Return the device's queue called `name`, making it at the first call."""
        return self._get_lane(f"{self.name}/{name}", self._make_lane)

    def host_lane(self, name: str) -> Lane:
        """Return a queue served by one host thread, on every kind of device.

        For what host cores do beside the device: an update on the CPU (always on the same thread,
        so with one OpenMP pool), writing a file, copies between host tensors.
        """
        full_name = f"{self.name}/{name} (host)"
        return self._get_lane(full_name, lambda each: Lane(each, host_route, self._sink))

    def record_event(self, label: str = "caller") -> DeviceEvent:
        """Return an event for the device work that the calling thread has issued so far.

        On ``cuda`` a lane must wait for it before it touches what the caller's stream allocated or
        wrote: the lane has a stream of its own, and fresh memory may still be in use on the other.
        """
        event = DeviceEvent(f"{self.name}/caller", label)
        event._settle((perf_counter(),) * 2)  # without a GPU such work is done when it returns
        return event

    def wait_event(self, event: DeviceEvent) -> None:
        """Let the caller's device work go on only after `event`; on ``cuda`` without blocking."""
        event.wait()

    def synchronize(self) -> None:
        """Block until all lanes are idle, then raise the first failure that one of them holds."""
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane._drain()
        for lane in lanes:
            lane.synchronize()

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Finish the lanes' work, end their threads, refuse further use. Safe to call twice.

        Args:
            cancel: Drop what has not begun (its events fail); what runs is always finished.
            timeout_s: Give up after that long; None waits as long as the work takes.

        Raises:
            DeviceError: work still ran at the timeout, or a lane holds a failure that was not
                taken by `Lane.clear`. The device is closed in either case.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            lanes = list(self._lanes.values())
        atexit.unregister(self.close)
        for lane in lanes:  # all are told before one is waited for: they may wait for each other
            lane._begin_close(cancel=cancel)
        end_s = math.inf if timeout_s is None else perf_counter() + timeout_s
        problems: list[DeviceError] = []
        for lane in lanes:
            try:
                lane._end_close(None if timeout_s is None else max(0.0, end_s - perf_counter()))
            except DeviceError as error:
                problems.append(error)
        problems += [lane._failure for lane in lanes if lane._failure]
        if problems:
            raise problems[0].with_traceback(None)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            self.close(cancel=kind is not None)
        except DeviceError:
            if kind is None:  # else the error on its way says more than what it broke here
                raise

    def _get_lane(self, full_name: str, make: Callable[[str], Lane]) -> Lane:
        with self._lock:
            self._check_open()
            if full_name not in self._lanes:
                self._lanes[full_name] = make(full_name)
            return self._lanes[full_name]

    def _check_open(self) -> None:
        if self._is_closed:
            raise DeviceError(f'device "{self.name}": it is closed; open a new one')

    def _check_direction(self, lane: str, dst: Tensor, src: Tensor) -> None:
        check_copy(lane, dst, src, self.torch_device)
        if not (self.owns(dst) or self.owns(src)):
            raise DeviceError(
                f'lane "{lane}": cannot copy: neither tensor lives on {self.name}; allocate one '
                f"with device.empty(), or copy host tensors on a device.host_lane()"
            )


class CpuDevice(Device):
    """Host memory as the device: nothing to move, nothing to overlap, the same interface."""

    kind = "cpu"

    def __init__(self, sink: Telemetry | None) -> None:
        super().__init__("cpu", _ram_bytes("SC_PHYS_PAGES"), sink)

    def free_bytes(self) -> int:
        """Return the unused physical memory; the page cache counts as used."""
        return _ram_bytes("SC_AVPHYS_PAGES")

    def owns(self, tensor: Tensor) -> bool:
        """Return whether torch holds the tensor in host memory."""
        return tensor.device.type == "cpu"

    def _make_lane(self, name: str) -> Lane:
        return Lane(name, host_route, self._sink, threaded=False)


def _ram_bytes(pages: str) -> int:
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
