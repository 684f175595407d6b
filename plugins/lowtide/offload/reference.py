"""The lane simulator in readable Python; csrc/offload/schedule.cpp takes the same steps.

Lanes, each doing one thing at a time, in order:

    host      Adam on the host cores                              piece by piece in `host_order`
    downcast  fp32 to 16 bit on the host, where not fused         after the host update
    upload    16-bit weights of host pieces, host to device       after host update (and downcast)
    prefetch  state and gradients of device pieces to the device  `device_order`, needs a slot
    device    Adam on the device                                  `device_order`, needs the load
    flush     state of staged pieces back to the host             after the update; frees the slot
    read0     state of stored pieces from the first path          `stored_order`, needs a buffer
    write0    and back                                            after the update; frees the buffer

There is a read and a write lane for each path. Whenever the host is free, it takes the next piece
of `stored_order` if that has arrived, else the next of `host_order`. The first `carried` pieces are
in buffers at the begin, and the last `carried` stay there: the next update goes the other way.

Upload and prefetch share the host-to-device direction evenly; on a half-duplex link all copies
share the link's time evenly. Host update, downcast, copies, reads and writes share the memory's
bandwidth by max-min fairness: nobody gets more than it asks for, and what is left is divided
evenly. Reads and writes of one path do not disturb each other: their rates are those of both at
work. Rates are constant between two events, so the result is exact up to rounding.

Source: own derivation (lane model, memory roofline).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lowtide.core.errors import ConfigError
from lowtide.offload.rates import DOWNCAST_BYTES, Rates
from lowtide.offload.schedule import Piece

LANES = ("host", "downcast", "prefetch", "upload", "device", "flush")
HOST, DOWNCAST, PREFETCH, UPLOAD, DEVICE, FLUSH = range(6)


def lane_names(paths: int) -> tuple[str, ...]:
    """Return the names of all lanes where there are so many storage paths."""
    return (*LANES, *(f"{kind}{j}" for j in range(paths) for kind in ("read", "write")))


@dataclass(frozen=True, slots=True)
class Job:
    """A plan as the simulator wants it: orders, and what must come before what.

    Attributes:
        host_gates: For each place of `host_order`: device updates that must be done before.
        device_gates: For each place of `device_order`: host pieces that must be done before.
        stored_order: Stored pieces in the order of their updates.
        buffers: Staging buffers, one stored piece each.
        carried: How many of the first are in buffers already, and of the last stay there.
    """

    device_order: Sequence[int]
    host_order: Sequence[int]
    residents: Sequence[int]
    slots: int
    release_s: Sequence[float] = ()
    host_gates: Sequence[int] = ()
    device_gates: Sequence[int] = ()
    flags: int = 0
    stored_order: Sequence[int] = ()
    buffers: int = 0
    carried: int = 0


class Outcome(NamedTuple):
    """What both implementations return; `spans` hold (piece, lane number, begin, end)."""

    makespan_s: float
    host_end_s: float
    device_end_s: float
    busy_s: Sequence[float]
    spans: Sequence[tuple[int, int, float, float]]


class ReferenceMachine:
    """The simulator, readable; see the module's text for its rules."""

    def __init__(self, pieces: Sequence[Piece], rates: Rates) -> None:
        self._pieces = pieces
        self._rates = rates
        self._speeds: dict[int, list[float]] = {}

    def run(self, job: Job, *, is_traced: bool = False) -> Outcome:
        """Simulate one plan; nothing is checked."""
        state = _State(self._pieces, self._rates, job)
        while True:
            state.start()
            mask = sum(1 << lane for lane, piece in enumerate(state.piece) if piece >= 0)
            wake_s = state.next_release_s()
            if not mask:
                if math.isinf(wake_s):
                    break
                state.now_s = wake_s
                continue
            if mask not in self._speeds:
                self._speeds[mask] = speeds(self._rates, mask)
            state.advance(self._speeds[mask], wake_s)
        if (
            state.host_done < len(job.host_order)
            or state.device_done < len(job.device_order)
            or state.stored_done < len(job.stored_order)
        ):
            raise ConfigError("plan: it can never end: pieces wait for each other")
        spans = tuple(state.spans) if is_traced else ()
        return Outcome(state.now_s, state.host_end_s, state.device_end_s, state.busy_s, spans)


def speeds(rates: Rates, mask: int) -> list[float]:
    """Return how fast each lane goes while exactly the lanes of `mask` are at work.

    Args:
        rates: Each lane's speed alone.
        mask: Bit i stands for lane i of `lane_names`.

    Returns:
        Parameters a second for host and downcast, bytes a second for copies, and 1 for the
        device, whose work is counted in seconds. Idle lanes have 0.
    """
    to_device = (mask >> PREFETCH & 1) + (mask >> UPLOAD & 1)
    from_device = mask >> FLUSH & 1
    sharing_in = to_device if rates.is_duplex else to_device + from_device
    sharing_out = from_device if rates.is_duplex else to_device + from_device
    inward = rates.host_to_device_bytes_per_s / max(sharing_in, 1)
    outward = rates.device_to_host_bytes_per_s / max(sharing_out, 1)
    downcast = rates.downcast_params_per_s or 0.0
    storage = [r for p in rates.paths for r in (p.read_bytes_per_s, p.write_bytes_per_s)]
    alone = (rates.host_params_per_s, downcast, inward, inward, 1.0, outward, *storage)
    traffic = (
        rates.host_params_per_s * rates.host_update_bytes,
        downcast * DOWNCAST_BYTES,
        inward,
        inward,
        0.0,
        outward,
        *storage,
    )
    found = [rate if mask >> lane & 1 else 0.0 for lane, rate in enumerate(alone)]
    if rates.host_memory_bytes_per_s is None:
        return found
    left = float(rates.host_memory_bytes_per_s)
    waiting = sorted((wanted, i) for i, wanted in enumerate(traffic) if found[i] and wanted)
    for place, (wanted, lane) in enumerate(waiting):
        fair = left / (len(waiting) - place)
        if wanted > fair:
            found[lane] = alone[lane] * (fair / wanted)
            wanted = fair
        left -= wanted
    return found


@dataclass(slots=True)
class _State:
    """Where a simulation stands."""

    pieces: Sequence[Piece]
    rates: Rates
    job: Job
    now_s: float = 0.0
    host_next: int = 0  # places in the orders: next to start ...
    load_next: int = 0
    device_next: int = 0
    host_done: int = 0  # ... and how many are over
    device_done: int = 0
    is_host_held: bool = False  # by its own downcast or upload
    slots_used: int = 0
    host_end_s: float = 0.0
    device_end_s: float = 0.0
    held: set[int] = field(default_factory=set)
    loaded: set[int] = field(default_factory=set)
    stored_next: int = 0  # places in `stored_order`: next to be updated ...
    stored_done: int = 0
    read_next: int = 0  # ... and next to be read
    buffers_free: int = 0
    arrived: set[int] = field(default_factory=set)
    staying: set[int] = field(default_factory=set)
    piece: list[int] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    begin_s: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    queues: dict[int, deque[int]] = field(default_factory=dict)
    spans: list[tuple[int, int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        job, lanes = self.job, range(6 + 2 * len(self.rates.paths))
        self.held = set(job.residents)
        self.piece = [-1] * len(lanes)
        self.work, self.begin_s, self.busy_s = ([0.0] * len(lanes) for _ in range(3))
        self.queues = {lane: deque() for lane in (DOWNCAST, UPLOAD, FLUSH, *lanes[6:])}
        carried = min(job.carried, job.buffers, len(job.stored_order))
        self.read_next, self.buffers_free = carried, job.buffers - carried
        self.arrived = set(job.stored_order[:carried])
        self.staying = set(job.stored_order[len(job.stored_order) - carried :])

    def path(self, i: int) -> int:
        """Return the path of a stored piece."""
        return self.pieces[i].path or 0

    def load_bytes(self, i: int) -> int:
        """Bytes that go to the device before the update of a device piece."""
        piece = self.pieces[i]
        return piece.resident_load_bytes if i in self.held else piece.staged_bytes

    def is_released(self, i: int) -> bool:
        """Whether the gradient of a piece is ready."""
        return not self.job.release_s or self.job.release_s[i] <= self.now_s

    def next_release_s(self) -> float:
        """Return when the next gradient becomes ready."""
        return min((t for t in self.job.release_s if t > self.now_s), default=math.inf)

    def begin(self, lane: int, i: int, work: float) -> None:
        """Put piece `i` on an idle lane."""
        self.piece[lane], self.work[lane], self.begin_s[lane] = i, work, self.now_s

    def start(self) -> None:
        """Start everything that can start now."""
        self._start_host()
        for lane in (DOWNCAST, UPLOAD, FLUSH):
            if self.piece[lane] < 0 and self.queues[lane]:
                i = self.queues[lane].popleft()
                piece = self.pieces[i]
                upload = piece.low_precision_bytes * piece.numel
                work = {DOWNCAST: piece.numel, UPLOAD: upload, FLUSH: piece.state_bytes}[lane]
                self.begin(lane, i, float(work))
        self._start_device()  # before the prefetch: it may need no load at all
        self._start_prefetch()
        self._start_storage()

    def _start_host(self) -> None:
        job, place = self.job, self.host_next
        if self.piece[HOST] >= 0 or self.is_host_held:
            return
        if self.stored_next < len(job.stored_order):
            i = job.stored_order[self.stored_next]
            if i in self.arrived and self.is_released(i):
                self.begin(HOST, i, float(self.pieces[i].numel))
                self.stored_next += 1
                return
        if place >= len(job.host_order):
            return
        i = job.host_order[place]
        is_open = not job.host_gates or job.host_gates[place] <= self.device_done
        if is_open and self.is_released(i):
            self.begin(HOST, i, float(self.pieces[i].numel))
            self.host_next += 1

    def _start_storage(self) -> None:
        order = self.job.stored_order
        while self.read_next < len(order) and self.buffers_free:
            i = order[self.read_next]
            self.queues[6 + 2 * self.path(i)].append(i)
            self.buffers_free -= 1
            self.read_next += 1
        for lane in range(6, len(self.piece)):
            if self.piece[lane] < 0 and self.queues[lane]:
                i = self.queues[lane].popleft()
                self.begin(lane, i, float(self.pieces[i].state_bytes))

    def _start_prefetch(self) -> None:
        order = self.job.device_order
        while self.load_next < len(order) and self.load_bytes(order[self.load_next]) == 0:
            self.load_next += 1
        if self.piece[PREFETCH] >= 0 or self.load_next >= len(order):
            return
        i = order[self.load_next]
        if self.slots_used < self.job.slots and self.is_released(i):
            self.begin(PREFETCH, i, float(self.load_bytes(i)))
            self.slots_used += 1
            self.load_next += 1

    def _start_device(self) -> None:
        job, place = self.job, self.device_next
        if self.piece[DEVICE] >= 0 or place >= len(job.device_order):
            return
        i = job.device_order[place]
        is_ready = i in self.loaded or (self.load_bytes(i) == 0 and self.is_released(i))
        if is_ready and (not job.device_gates or job.device_gates[place] <= self.host_done):
            rates = self.rates
            self.begin(DEVICE, i, self.pieces[i].numel / rates.device_params_per_s + rates.launch_s)
            self.device_next += 1

    def advance(self, speed: list[float], wake_s: float) -> None:
        """Go on to the next end of a span, or to the next release if that comes first."""
        lanes = range(len(self.piece))
        need = [
            self.work[lane] / speed[lane] if self.piece[lane] >= 0 else math.inf for lane in lanes
        ]
        step_s = min(need)
        is_woken = wake_s - self.now_s < step_s
        step_s = wake_s - self.now_s if is_woken else step_s
        self.now_s = wake_s if is_woken else self.now_s + step_s
        ended = []
        for lane in lanes:
            if self.piece[lane] < 0:
                continue
            if need[lane] <= step_s:
                ended.append(lane)
            else:
                self.work[lane] -= speed[lane] * step_s
        for lane in ended:
            i, self.piece[lane] = self.piece[lane], -1
            self.busy_s[lane] += self.now_s - self.begin_s[lane]
            self.spans.append((i, lane, self.begin_s[lane], self.now_s))
            self._end(lane, i)

    def _end(self, lane: int, i: int) -> None:
        flags = self.job.flags
        if lane == HOST:
            if i in self.arrived:
                self.stored_done += 1
                if i not in self.staying:
                    self.queues[7 + 2 * self.path(i)].append(i)
            else:
                self.host_done += 1
            if self.rates.downcast_params_per_s is None:
                self._updated(i)
            else:
                self.queues[DOWNCAST].append(i)
                self.is_host_held = not flags & 1
        elif lane == DOWNCAST:
            self.is_host_held = self.is_host_held and bool(flags & 1)
            self._updated(i)
        elif lane == UPLOAD:
            self.is_host_held = self.is_host_held and not flags & 2
            self.host_end_s = self.now_s
        elif lane == PREFETCH:
            self.loaded.add(i)
        elif lane == DEVICE:
            self.device_done += 1
            self.device_end_s = self.now_s
            if i not in self.held:
                self.queues[FLUSH].append(i)
            elif self.load_bytes(i):
                self.slots_used -= 1
        elif lane == FLUSH:
            self.slots_used -= 1
            self.device_end_s = self.now_s
        elif lane % 2 == 0:
            self.arrived.add(i)
        else:
            self.buffers_free += 1

    def _updated(self, i: int) -> None:
        """Go on behind host update and downcast."""
        self.host_end_s = self.now_s
        if self.pieces[i].low_precision_bytes:
            self.queues[UPLOAD].append(i)
            self.is_host_held = self.is_host_held or bool(self.job.flags & 2)
