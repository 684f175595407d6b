"""Lanes and events: in-order queues, served by a worker thread or by the caller itself."""

from __future__ import annotations

import collections
import ctypes
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lowtide.core.errors import DeviceError, DeviceOutOfMemoryError, LowtideError

if TYPE_CHECKING:
    from lowtide.core.telemetry import Telemetry

CREDIT_S = 0.02  # how much of a late wake-up a stream of throttled copies may catch up


class DeviceEvent:
    """The completion of the operation `label` of the lane named `lane`."""

    def __init__(self, lane: str, label: str) -> None:
        self.lane = lane
        self.label = label
        self._settled = threading.Event()
        self._times: tuple[float, float] | None = None
        self._failure: DeviceError | None = None

    def is_done(self) -> bool:
        """Return whether the operation has ended, well or not."""
        return self._settled.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the operation has ended; return False if `timeout_s` passed first.

        Raises:
            DeviceError: the operation failed or was cancelled; the cause is chained.
        """
        if not self._settled.wait(timeout_s):
            return False
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # else it would collect all waiters' frames
        return True

    @property
    def begin_s(self) -> float:
        """Begin of the finished operation, `time.perf_counter` seconds."""
        return self._span()[0]

    @property
    def end_s(self) -> float:
        """End of the finished operation, `time.perf_counter` seconds."""
        return self._span()[1]

    def _span(self) -> tuple[float, float]:
        if self._times is None:
            state = "never ran" if self.is_done() else "is not done; wait() for its event first"
            raise DeviceError(f'lane "{self.lane}": no times of "{self.label}": it {state}')
        return self._times

    def _settle(self, outcome: DeviceError | tuple[float, float] | None) -> None:
        if isinstance(outcome, DeviceError):
            self._failure = outcome
        else:
            self._times = outcome
        self._settled.set()


Action: TypeAlias = "Callable[[Operation], object]"
# (lane, dst, src) -> what copies them; raises DeviceError where the lane cannot.
Route: TypeAlias = "Callable[[str, Tensor, Tensor], Action]"


@dataclass
class Operation:
    """One entry of a lane's queue; `ready_s` and `due_s` pace throttled copies."""

    event: DeviceEvent
    action: Action | None
    tensors: tuple[Tensor, ...] = ()
    nbytes: int = 0
    draws_span: bool = True
    ready_s: float = field(default_factory=perf_counter)  # it could have begun then
    due_s: float | None = None  # it should have ended then; None: when it did end

    def perform(self) -> None:
        """Do the work and let go of it: a finished operation must keep no tensor alive."""
        action, self.action = self.action, None
        if action is not None:
            action(self)


class Lane:
    """An in-order queue of copies and calls on one device; get it from `Device.lane`."""

    _event_class: type[DeviceEvent] = DeviceEvent

    def __init__(
        self, name: str, route: Route, sink: Telemetry | None, *, threaded: bool = True
    ) -> None:
        self.name = name  # "<device>/<lane>", also in the trace
        self._route = route
        self._sink = sink
        self._failure: DeviceError | None = None
        self._is_closed = False
        self._changed = threading.Condition(threading.RLock())
        self._queue: collections.deque[Operation] = collections.deque()
        self._running = ""
        self._free_s = 0.0  # when the operation before should have ended
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._work, name=f"lowtide {name}", daemon=True)
            self._thread.start()

    def copy(self, dst: Tensor, src: Tensor, *, label: str = "copy") -> DeviceEvent:
        """Queue a copy of `src` into `dst`; both are kept alive until it has happened.

        Raises:
            DeviceError: they are not contiguous, differ in dtype or shape (a hidden conversion on
                the way is the stall that lanes exist to avoid), none of them lives on the device,
                or the lane is closed or holds a failure.
        """
        action = self._route(self.name, dst, src)
        return self._submit(label, action, dst, src, nbytes=dst.numel() * dst.element_size())

    def run(self, fn: Callable[..., object], *args: object, label: str = "") -> DeviceEvent:
        """Queue ``fn(*args)``; its result is dropped.

        On ``cpu`` it runs in the calling thread, elsewhere in the lane's own thread; on ``cuda``
        under the lane's stream, where it should launch GPU work and return.

        Raises:
            DeviceError: the lane is closed or holds a failure.
        """
        name = label or str(getattr(fn, "__name__", type(fn).__name__))
        tensors = (item for item in args if isinstance(item, Tensor))
        return self._submit(name, lambda _: fn(*args), *tensors)

    def wait(self, event: DeviceEvent) -> None:
        """Let all that is queued from here on begin only after `event`, of any lane or device."""
        label = f'wait for "{event.label}" of {event.lane}'
        self._submit(label, functools.partial(self._join, event))

    def synchronize(self) -> None:
        """Block until all that is queued has ended.

        Raises:
            DeviceError: an operation failed since the last `clear`.
        """
        self._drain()
        self._raise_failure()

    def clear(self) -> BaseException | None:
        """Return a failed lane to service, and the cause of its failure (None: it had none).

        Work that was queued behind the failure stays cancelled.
        """
        self._drain()  # else the worker would take cancelled work for new work
        failure, self._failure = self._failure, None
        return failure.__cause__ if failure else None

    def _submit(self, label: str, action: Action, *tensors: Tensor, nbytes: int = 0) -> DeviceEvent:
        event = self._event_class(self.name, label)
        operation = Operation(event, action, tensors, nbytes)
        with self._changed:
            if self._is_closed:
                raise DeviceError(f'lane "{self.name}": its device is closed; open a new one')
            self._raise_failure()
            if self._thread is None:
                self._perform(operation)
            else:
                self._queue.append(operation)
                self._changed.notify_all()
        return event

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = ""
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                operation = self._queue.popleft()
                self._running = operation.event.label or "?"
            earliest_s = max(self._free_s, perf_counter() - CREDIT_S)
            operation.ready_s = max(operation.ready_s, earliest_s)
            self._perform(operation)
            self._free_s = perf_counter() if operation.due_s is None else operation.due_s
            del operation  # or it would be kept until the next one comes

    def _perform(self, operation: Operation) -> None:
        """Run one operation now and settle its event. Errors are kept, not raised."""
        if self._failure is not None:
            return self._cancel(operation, f"an earlier operation failed: {self._failure}")
        begin_s = perf_counter()
        try:
            operation.perform()
            end_s = perf_counter()
            self._add_span(operation, begin_s, end_s)
        # SystemExit too: a worker that ends in silence would leave its waiters hanging.
        except BaseException as error:
            self._keep(operation, error)
            if self._thread is None and not isinstance(error, Exception):
                raise  # Ctrl-C: this is the caller's own thread
        else:
            operation.tensors = ()
            operation.event._settle((begin_s, end_s))

    def _join(self, event: DeviceEvent, operation: Operation) -> None:
        operation.draws_span = False
        event.wait()
        operation.due_s = event.end_s

    def _add_span(self, operation: Operation, begin_s: float, end_s: float) -> None:
        if self._sink is not None and operation.draws_span:
            args = {"bytes": operation.nbytes} if operation.nbytes else {}
            self._sink.add_span(operation.event.label, self.name, begin_s, end_s, **args)

    def _keep(self, operation: Operation, error: BaseException) -> None:
        text = str(error) if isinstance(error, LowtideError) else f"{type(error).__name__}: {error}"
        # Callers fall back to the host on exactly this one, so it keeps its type.
        kind = DeviceOutOfMemoryError if isinstance(error, DeviceOutOfMemoryError) else DeviceError
        self._failure = kind(
            f'lane "{self.name}": "{operation.event.label}" failed: {text}; work queued behind it '
            f"was cancelled. Remove the cause and call clear() on the lane to use it again"
        )
        self._failure.__cause__ = error
        operation.tensors = ()
        operation.event._settle(self._failure)

    def _cancel(self, operation: Operation, why: str) -> None:
        operation.action, operation.tensors = None, ()
        error = DeviceError(f'lane "{self.name}": "{operation.event.label}" was cancelled: {why}')
        error.__cause__ = self._failure
        operation.event._settle(error)

    def _drain(self) -> None:
        """Block until nothing is queued or running, without raising the lane's failure."""
        if threading.current_thread() is self._thread:
            raise DeviceError(
                f'lane "{self.name}": "{self._running}" waits for its own lane and would never '
                f"end; synchronize from another thread"
            )
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._running)

    def _begin_close(self, *, cancel: bool) -> None:
        """Take no more work; with `cancel`, drop what has not begun."""
        with self._changed:
            self._is_closed = True
            while cancel and self._queue:
                self._cancel(self._queue.popleft(), "the device was closed")
            self._changed.notify_all()

    def _end_close(self, timeout_s: float | None) -> None:
        """Wait for what `_begin_close` left to do; raise DeviceError at the timeout."""
        if self._thread is None:
            return
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeviceError(
                f'lane "{self.name}": "{self._running}" still runs at the end of close() (timeout '
                f"{timeout_s} s); its thread is left behind, find out what the operation waits for"
            )


def check_copy(lane: str, dst: Tensor, src: Tensor, place: torch.device) -> None:
    """Raise DeviceError unless `src` can be moved into `dst` byte by byte, host and `place`."""
    problem = ""
    if dst.dtype != src.dtype or dst.shape != src.shape:
        problem = (
            f"destination is {tuple(dst.shape)} of {dst.dtype}, source is {tuple(src.shape)} of "
            f"{src.dtype}; a lane converts nothing, convert in Lane.run"
        )
    for role, tensor in (("destination", dst), ("source", src)):
        is_here = tensor.device.type == "cpu" or tensor.device == place
        if tensor.layout != torch.strided or not is_here:
            problem = f"{role} is a {tensor.layout} tensor on {tensor.device}; move it first"
        elif not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            problem = f"{role} has strides {tensor.stride()}; pass plain contiguous memory"
    if problem:
        raise DeviceError(f'lane "{lane}": cannot copy: {problem}')


def move_bytes(dst: Tensor, src: Tensor, begin: int, nbytes: int) -> None:
    """Copy bytes between host tensors by one thread, with the interpreter lock released.

    `Tensor.copy_` would use torch's thread pool and wait for its slowest thread: on a busy machine
    that is several times slower than one plain copy, and it disturbs the training threads.
    """
    ctypes.memmove(dst.data_ptr() + begin, src.data_ptr() + begin, nbytes)


def host_route(lane: str, dst: Tensor, src: Tensor) -> Action:
    """Route of lanes whose copies stay in host memory, at its speed."""
    check_copy(lane, dst, src, torch.device("cpu"))

    def move(operation: Operation) -> None:
        dst, src = operation.tensors
        move_bytes(dst, src, 0, operation.nbytes)

    return move
