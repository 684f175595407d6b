"""One GPU through torch. Nothing in this file has been measured, or run on a GPU, yet."""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor

from lowtide.core.device.base import Device
from lowtide.core.device.lanes import Action, DeviceEvent, Lane, Operation, Route
from lowtide.core.device.pinned import pinned_empty
from lowtide.core.errors import DeviceError

if TYPE_CHECKING:
    from lowtide.core.telemetry import Telemetry

ANCHOR_S = 60.0  # CUDA times are float32 milliseconds and lose precision as they grow
POLL_S = 5e-5

Marks: TypeAlias = "tuple[torch.cuda.Event, torch.cuda.Event]"
Anchor: TypeAlias = "tuple[torch.cuda.Event, float]"


class CudaEvent(DeviceEvent):
    """Done when the GPU has passed the second mark; settled once both are on the stream."""

    marks: Marks
    anchor: Anchor  # an event of the past and its perf_counter time

    def is_done(self) -> bool:
        """Return whether the GPU has done the operation, or it failed."""
        return self._settled.is_set() and (self._failure is not None or _has_passed(self.marks[1]))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the GPU has done the operation; as `DeviceEvent.wait`."""
        end_s = math.inf if timeout_s is None else perf_counter() + timeout_s
        if not super().wait(timeout_s):
            return False
        while not _has_passed(self.marks[1]):
            if perf_counter() > end_s:
                return False
            time.sleep(POLL_S)
        return True

    def _span(self) -> tuple[float, float]:
        if self._failure is None and self.is_done():
            mark, mark_s = self.anchor
            begin_s, end_s = (mark_s + mark.elapsed_time(each) / 1e3 for each in self.marks)
            self._times = (begin_s, end_s)
        return super()._span()


class CudaLane(Lane):
    """One stream. Its worker only issues, so waiting for a host event blocks no caller."""

    _event_class = CudaEvent

    def __init__(
        self,
        name: str,
        route: Route,
        sink: Telemetry | None,
        *,
        clock: Callable[[], Anchor],
        stream: torch.cuda.Stream,
    ) -> None:
        self._clock = clock
        self._stream = stream
        self._issued: collections.deque[Operation] = collections.deque()
        super().__init__(name, route, sink)

    def _perform(self, operation: Operation) -> None:
        if self._failure is not None:
            return super()._perform(operation)
        event = cast("CudaEvent", operation.event)
        try:
            self._retire()
            with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
                event.anchor, event.marks = self._clock(), new_marks()
                event.marks[0].record()
                for tensor in operation.tensors:
                    if tensor.is_cuda:  # its memory may be reused only after this stream's work
                        tensor.record_stream(self._stream)
                operation.perform()
                event.marks[1].record()
        except BaseException as error:  # noqa: BLE001 - as in Lane._perform
            self._keep(operation, error)
        else:
            self._issued.append(operation)  # holds host tensors until the copy engine is through
            event._settle(None)

    def _join(self, event: DeviceEvent, operation: Operation) -> None:
        operation.draws_span = False
        if isinstance(event, CudaEvent):
            DeviceEvent.wait(event)  # until it is on its stream; from there on streams wait
            self._stream.wait_event(event.marks[1])
        else:
            event.wait()

    def _drain(self) -> None:
        super()._drain()
        self._stream.synchronize()
        self._retire()

    def _end_close(self, timeout_s: float | None) -> None:
        super()._end_close(timeout_s)
        self._drain()

    def _retire(self) -> None:
        with self._changed:
            while self._issued and self._issued[0].event.is_done():
                operation = self._issued.popleft()
                self._add_span(operation, *operation.event._span())


def _has_passed(mark: torch.cuda.Event) -> bool:
    return bool(mark.query())  # type: ignore[no-untyped-call]


def new_marks() -> Marks:
    """Return two timing events, for begin and end."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return begin, end


def copy_async(operation: Operation) -> None:
    """Put a copy on the current stream."""
    dst, src = operation.tensors
    with torch.no_grad():
        dst.copy_(src, non_blocking=True)


class CudaDevice(Device):
    """One GPU. Nothing here has been measured by this project yet."""

    kind = "cuda"

    def __init__(self, index: int, sink: Telemetry | None) -> None:
        if not torch.cuda.is_available() or not 0 <= index < torch.cuda.device_count():
            raise DeviceError(
                f'device "cuda:{index}": torch {torch.__version__} (built for CUDA: '
                f"{torch.version.cuda}) sees {torch.cuda.device_count()} GPUs; install a CUDA "
                f'build and a driver, check CUDA_VISIBLE_DEVICES, or use kind "cpu" or "emulated"'
            )
        self.torch_device = torch.device("cuda", index)
        total = torch.cuda.get_device_properties(index).total_memory
        super().__init__(f"cuda:{index}", total, sink)
        self._clock_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._anchor: Anchor | None = None

    def free_bytes(self) -> int:
        """Return what the driver can give and what torch's allocator holds unused."""
        cached = torch.cuda.memory_reserved(self.torch_device)
        cached -= torch.cuda.memory_allocated(self.torch_device)
        return int(torch.cuda.mem_get_info(self.torch_device)[0]) + cached

    def least_free_bytes(self) -> int:
        """Return what is free beside torch's peak since its statistics were last reset."""
        now = torch.cuda.memory_allocated(self.torch_device)
        peak = torch.cuda.max_memory_allocated(self.torch_device)
        return max(0, self.free_bytes() - (peak - now))

    def host_empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
        """Allocate pinned memory of exactly that size; raises RuntimeError where CUDA refuses."""
        return pinned_empty(shape, dtype)

    def owns(self, tensor: Tensor) -> bool:
        """Return whether the tensor is on this GPU."""
        return tensor.device == self.torch_device

    def record_event(self, label: str = "caller") -> DeviceEvent:
        """Return an event for the work on the caller's current stream so far."""
        event = CudaEvent(f"{self.name}/caller", label)
        event.anchor, event.marks = self._clock(), new_marks()
        for mark in event.marks:
            mark.record(torch.cuda.current_stream(self.torch_device))
        event._settle(None)
        return event

    def wait_event(self, event: DeviceEvent) -> None:
        """Let the caller's current stream wait; an event of a host lane blocks the caller."""
        DeviceEvent.wait(event)
        if isinstance(event, CudaEvent):
            torch.cuda.current_stream(self.torch_device).wait_event(event.marks[1])

    def _make_lane(self, name: str) -> Lane:
        stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        return CudaLane(name, self._route, self._sink, clock=self._clock, stream=stream)

    def _route(self, lane: str, dst: Tensor, src: Tensor) -> Action:
        self._check_direction(lane, dst, src)
        return copy_async

    def _clock(self) -> Anchor:
        """Return a recent event and its time: what maps times of the GPU to perf_counter."""
        with self._lock:
            if self._anchor is None or perf_counter() - self._anchor[1] > ANCHOR_S:
                mark = new_marks()[0]
                mark.record(self._clock_stream)
                mark.synchronize()
                self._anchor = (mark, perf_counter())
            return self._anchor
