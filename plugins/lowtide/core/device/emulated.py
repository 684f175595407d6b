"""The emulated device: a second memory behind throttled copies, for machines without a GPU."""

from __future__ import annotations

import collections
import functools
import gc
import math
import threading
import time
import weakref
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowtide.core.device.base import Device
from lowtide.core.device.lanes import Action, Lane, Operation, move_bytes
from lowtide.core.errors import DeviceOutOfMemoryError

if TYPE_CHECKING:
    from lowtide.core.telemetry import Telemetry

GRANULE_BYTES = 512  # what torch's CUDA allocator rounds to, so that figures carry over
PACE_S = 0.005  # a throttled copy moves what its link carries in this time, then sleeps
CHUNK_BYTES = (1 << 16, 1 << 22)


class Throttle:
    """One direction of an emulated link, shared by all lanes of a device."""

    def __init__(self, bytes_per_s: float) -> None:
        self.chunk_bytes = int(min(max(bytes_per_s * PACE_S, CHUNK_BYTES[0]), CHUNK_BYTES[1]))
        self._bytes_per_s = bytes_per_s
        self._free_s = -math.inf
        self._lock = threading.Lock()

    def reserve(self, nbytes: int, ready_s: float) -> float:
        """Book the link for `nbytes` and return when they have passed it, perf_counter seconds.

        Booked from when the copy could have begun, not from when its thread woke up: a stream of
        copies keeps the rate although every sleep ends late, and never exceeds it.
        """
        with self._lock:
            self._free_s = max(self._free_s, ready_s) + nbytes / self._bytes_per_s
            return self._free_s


def throttled_move(throttle: Throttle | None, operation: Operation) -> None:
    """Copy the operation's tensors, no faster than `throttle` lets them pass."""
    dst, src = operation.tensors
    chunk = throttle.chunk_bytes if throttle else max(operation.nbytes, 1)
    for begin in range(0, operation.nbytes, chunk):
        size = min(chunk, operation.nbytes - begin)
        move_bytes(dst, src, begin, size)
        if throttle is not None:
            operation.due_s = throttle.reserve(size, operation.ready_s)
            time.sleep(max(0.0, operation.due_s - perf_counter()))


class EmulatedDevice(Device):
    """One host allocation as device memory, behind throttled copies."""

    kind = "emulated"

    def __init__(
        self,
        name: str,
        memory_bytes: int,
        *,
        up_bytes_per_s: float | None,
        down_bytes_per_s: float | None,
        sink: Telemetry | None,
    ) -> None:
        super().__init__(name, memory_bytes, sink)
        self._up = None if up_bytes_per_s is None else Throttle(up_bytes_per_s)
        self._down = None if down_bytes_per_s is None else Throttle(down_bytes_per_s)
        try:
            backing = np.ones(self.memory_bytes + 4096, np.uint8)  # ones: touches every page
        except MemoryError as error:
            raise DeviceOutOfMemoryError(
                f'device "{name}": the host cannot give memory_bytes={self.memory_bytes}; use less'
            ) from error
        start = -backing.ctypes.data % 4096
        self._memory = backing[start : start + self.memory_bytes]
        self._address = self._memory.ctypes.data
        self._blocks: dict[int, int] = {}  # offset -> size of every block in use
        self._dead: collections.deque[int] = collections.deque()  # offsets nobody uses any more

    def free_bytes(self) -> int:
        """Return the free bytes of the arena."""
        with self._lock:
            return sum(size for size, _ in self._gaps())

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Carve a tensor out of the arena, aligned to 512 bytes; as `Device.empty`."""
        wanted = torch.empty(shape, dtype=dtype, device="meta")
        nbytes = wanted.numel() * wanted.element_size()
        # torch holds the array as long as any tensor shares the storage, views included.
        memory = torch.from_numpy(self._allocate(nbytes))
        return memory[:nbytes].view(dtype).view(wanted.shape)

    def owns(self, tensor: Tensor) -> bool:
        """Return whether the tensor's storage lies in the arena."""
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
        return 0 <= tensor.untyped_storage().data_ptr() - self._address < self.memory_bytes

    def _make_lane(self, name: str) -> Lane:
        return Lane(name, self._route, self._sink)

    def _route(self, lane: str, dst: Tensor, src: Tensor) -> Action:
        self._check_direction(lane, dst, src)
        to_device, from_device = self.owns(dst), self.owns(src)
        throttle = None if to_device and from_device else self._up if to_device else self._down
        return functools.partial(throttled_move, throttle)

    def _allocate(self, nbytes: int) -> NDArray[np.uint8]:
        size = max(1, -(-nbytes // GRANULE_BYTES)) * GRANULE_BYTES
        block = self._take(size)
        if block is None:
            gc.collect()  # tensors in reference cycles are dead but not gone
            block = self._take(size)
        if block is None:
            with self._lock:
                sizes = [gap for gap, _ in self._gaps()]
            raise DeviceOutOfMemoryError(
                f'device "{self.name}": cannot allocate {nbytes} bytes: {sum(sizes)} of '
                f"{self.memory_bytes} bytes are free, the largest free block has "
                f"{max(sizes, default=0)}; drop tensors, use smaller pieces, or open the device "
                f"with a larger memory_bytes"
            )
        return block

    def _take(self, size: int) -> NDArray[np.uint8] | None:
        with self._lock:
            self._check_open()
            # Best fit at the lowest address keeps large blocks whole.
            gap, offset = min((gap for gap in self._gaps() if gap[0] >= size), default=(0, -1))
            if gap == 0:
                return None
            self._blocks[offset] = size
        block = self._memory[offset : offset + size]
        # Only an append: a finalizer may run anywhere, also inside this class with the lock held.
        weakref.finalize(block, self._dead.append, offset).atexit = False
        return block

    def _gaps(self) -> list[tuple[int, int]]:
        """Return (size, offset) of every free block; the lock is held."""
        while self._dead:
            del self._blocks[self._dead.popleft()]
        begin, gaps = 0, []
        for offset, size in [*sorted(self._blocks.items()), (self.memory_bytes, 0)]:
            if offset > begin:
                gaps.append((offset - begin, begin))
            begin = offset + size
        return gaps
