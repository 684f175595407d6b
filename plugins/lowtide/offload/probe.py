"""How fast the lanes are here: a short measurement before the first plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowtide.core.errors import DeviceOutOfMemoryError
from lowtide.offload.adam import adam_step
from lowtide.offload.rates import HOST_UPDATE_BYTES, Rates
from lowtide.offload.subgroup import ALIGNMENT

if TYPE_CHECKING:
    from lowtide.offload.executor import Executor

SAMPLE_PARAMS = 1 << 22
LEAST_PARAMS = 1 << 12
LEAST_S = 0.1  # of each measurement
SLOWDOWN = 0.05  # beyond this, lanes disturb each other


class _HostSamples:
    """Scratch memory on the host, and a timed update there."""

    def __init__(self, executor: Executor, numel: int = 0) -> None:
        self.executor, self.device = executor, executor.device
        largest = max((each.numel for each in executor.subgroups), default=0)
        self.numel = numel or max(ALIGNMENT, min(SAMPLE_PARAMS, largest))
        self.here = [self.device.host_empty(self.numel, torch.float32) for _ in range(8)]
        for tensor in self.here:
            tensor.zero_()
        # All zeros: nothing overflows however often it is repeated.
        self.step = adam_step((0.9, 0.95), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def host(self) -> int:
        """Update on the host; return parameters."""
        self.executor.try_update("host", self.here[4:8], self.step)
        return self.numel


class _Samples(_HostSamples):
    """Scratch memory on both sides, and one timed operation for each lane."""

    def __init__(self, executor: Executor) -> None:
        self.device = executor.device
        largest = max((each.numel for each in executor.subgroups), default=0)
        numel = max(ALIGNMENT, min(SAMPLE_PARAMS, largest))
        while True:
            try:
                self.there = [self.device.empty(numel, torch.float32) for _ in range(4)]
                break
            except DeviceOutOfMemoryError:
                if numel <= LEAST_PARAMS:
                    raise
                numel //= 4
        super().__init__(executor, numel)

    def up(self) -> int:
        """Copy to the device; return bytes."""
        return self._copy("prefetch", self.there[0], self.here[0])

    def down(self) -> int:
        """Copy from the device; return bytes."""
        return self._copy("flush", self.here[1], self.there[1])

    def device_update(self) -> int:
        """Update on the device; return parameters."""
        lane = self.device.lane("device")
        lane.run(self.executor.try_update, "device", self.there, self.step).wait()
        return self.numel

    def launch(self) -> int:
        """Update as little as possible on the device; return 1."""
        lane, tiny = self.device.lane("device"), [each[:ALIGNMENT] for each in self.there]
        lane.run(self.executor.try_update, "device", tiny, self.step).wait()
        return 1

    def _copy(self, lane: str, dst: Tensor, src: Tensor) -> int:
        self.device.lane(lane).copy(dst, src).wait()
        return 4 * self.numel


def measure_host(executor: Executor) -> float:
    """Measure how many parameters a second the host updates, alone; takes a tenth of a second."""
    samples = _HostSamples(executor)
    return _rate(samples.host)


def measure(executor: Executor) -> Rates:
    """Measure the rates of one rank's lanes, each alone and then together; takes about a second.

    Raises:
        DeviceOutOfMemoryError: the device has no room for 64 KiB.
    """
    samples = _Samples(executor)
    device = samples.device
    samples.device.synchronize()
    up, down = _rate(samples.up), _rate(samples.down)
    host, on_device = _rate(samples.host), _rate(samples.device_update)
    both = _together([samples.up, samples.down])
    is_duplex = both[0] / up + both[1] / down > 1.5
    loaded = _together([samples.up, samples.down, samples.host])
    traffic = loaded[0] + loaded[1] + HOST_UPDATE_BYTES * loaded[2]
    is_disturbed = loaded[2] < (1 - SLOWDOWN) * host
    device.synchronize()
    return Rates(
        host_to_device_bytes_per_s=up,
        device_to_host_bytes_per_s=down,
        is_duplex=is_duplex,
        host_params_per_s=host,
        device_params_per_s=on_device,
        launch_s=1.0 / _rate(samples.launch),
        host_memory_bytes_per_s=traffic if is_disturbed else None,
    )


def _rate(operation: Callable[[], int], until: Callable[[], bool] | None = None) -> float:
    operation()  # the first one pays for threads, streams and pages
    begin_s, done = perf_counter(), 0
    while True:
        done += operation()
        passed_s = perf_counter() - begin_s
        if passed_s >= LEAST_S and (until is None or until()):
            return done / passed_s


def _together(operations: Sequence[Callable[[], int]]) -> list[float]:
    """Run operations at once, each in a thread but the last one; return their rates."""
    rates = [0.0] * len(operations)
    is_over = threading.Event()

    def run(turn: int) -> None:
        rates[turn] = _rate(operations[turn], is_over.is_set)

    threads = [threading.Thread(target=run, args=[i]) for i in range(len(operations) - 1)]
    for thread in threads:
        thread.start()
    try:
        rates[-1] = _rate(operations[-1])
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    return rates
