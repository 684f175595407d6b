"""What a plan would take: an event-driven simulation of one update.

Lanes, each doing one thing at a time, in order:

    host      Adam on the host cores                              piece by piece in `host_order`
    downcast  fp32 to 16 bit on the host, where not fused         after the host update
    upload    16-bit weights of host pieces, host to device       after host update (and downcast)
    prefetch  state and gradients of device pieces to the device  `device_order`, needs a slot
    device    Adam on the device                                  `device_order`, needs the load
    flush     state of staged pieces back to the host             after the update; frees the slot

Upload and prefetch share the host-to-device direction evenly; on a half-duplex link all copies
share the link's time evenly. Host update, downcast and copies then share the host's memory
bandwidth by max-min fairness: nobody gets more than it asks for, and what is left is divided
evenly. Rates are constant between two events, so the result is exact up to rounding.

`simulate` uses native code where it is built; `simulate_reference` is the readable definition,
and both take the same steps in the same arithmetic.

Source: own derivation (lane model, memory roofline); `Options.artifact` restates the order of
events of the public artifact of Deep Optimizer States (arXiv 2410.21316).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lowtide.core.errors import ConfigError, NativeUnavailableError
from lowtide.core.native import native
from lowtide.offload.rates import DOWNCAST_BYTES, Rates
from lowtide.offload.schedule import Piece, Plan, check_plan

LANES = ("host", "downcast", "prefetch", "upload", "device", "flush")
HOST, DOWNCAST, PREFETCH, UPLOAD, DEVICE, FLUSH = range(6)


class Span(NamedTuple):
    """One piece on one lane."""

    piece: int
    lane: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How other systems differ from Lowtide's own schedule.

    Attributes:
        is_downcast_background: An unfused downcast runs beside the next host update; otherwise
            the host waits for it.
        is_upload_blocking: The host waits until a piece's 16-bit weights are uploaded.
        is_device_blocking: One loop goes through all pieces by index and waits for each device
            update, as a host thread does that synchronises.
    """

    is_downcast_background: bool = False
    is_upload_blocking: bool = False
    is_device_blocking: bool = False

    @classmethod
    def artifact(cls) -> Options:
        """Return the order of events of the published artifact; its plans have one slot."""
        return cls(is_downcast_background=True, is_device_blocking=True)

    @classmethod
    def stock(cls) -> Options:
        """Return DeepSpeed's own loop: update, downcast and copy one after another."""
        return cls(is_upload_blocking=True, is_device_blocking=True)

    @property
    def flags(self) -> int:
        """Return the options as bits for the native code."""
        return self.is_downcast_background | self.is_upload_blocking << 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What one simulated update took.

    Attributes:
        makespan_s: Until the last lane is done.
        host_end_s: Until the host's pieces are done, with their uploads.
        device_end_s: Until the device's pieces are done, with their flushes.
        busy_s: Seconds in which each lane was at work.
        trace: Every span, in order of its end; empty unless asked for.
        lower_bound_s: No order of this division of pieces can be faster.
    """

    makespan_s: float
    host_end_s: float
    device_end_s: float
    busy_s: dict[str, float]
    trace: tuple[Span, ...] = ()
    lower_bound_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A plan as the simulator wants it: orders, and what must come before what.

    Attributes:
        host_gates: For each place of `host_order`: device updates that must be done before.
        device_gates: For each place of `device_order`: host pieces that must be done before.
    """

    device_order: Sequence[int]
    host_order: Sequence[int]
    residents: Sequence[int]
    slots: int
    release_s: Sequence[float] = ()
    host_gates: Sequence[int] = ()
    device_gates: Sequence[int] = ()
    flags: int = 0


class Outcome(NamedTuple):
    """What both implementations return; `spans` hold (piece, lane number, begin, end)."""

    makespan_s: float
    host_end_s: float
    device_end_s: float
    busy_s: Sequence[float]
    spans: Sequence[tuple[int, int, float, float]]


def simulate(
    pieces: Sequence[Piece],
    plan: Plan,
    rates: Rates,
    *,
    options: Options | None = None,
    release_s: Sequence[float] = (),
    is_traced: bool = True,
) -> Simulation:
    """Simulate one update.

    Args:
        pieces: All pieces of this rank.
        plan: Where and in which order they are updated; only orders, residents and slots count.
        rates: Speeds of the lanes.
        options: How another system's loop differs; None: Lowtide's own schedule.
        release_s: When each piece's gradient is ready, in seconds, one per piece; empty: all at 0.
        is_traced: Whether to return the spans.

    Raises:
        ConfigError: The plan does not fit the pieces, or release times do not.
    """
    job = _checked_job(pieces, plan, options or Options(), release_s)
    outcome = machine(pieces, rates).run(job, is_traced=is_traced)
    return _simulation(pieces, plan, rates, outcome)


def simulate_reference(
    pieces: Sequence[Piece],
    plan: Plan,
    rates: Rates,
    *,
    options: Options | None = None,
    release_s: Sequence[float] = (),
) -> Simulation:
    """Do what `simulate` does, in Python."""
    job = _checked_job(pieces, plan, options or Options(), release_s)
    outcome = ReferenceMachine(pieces, rates).run(job, is_traced=True)
    return _simulation(pieces, plan, rates, outcome)


def machine(pieces: Sequence[Piece], rates: Rates) -> ReferenceMachine | NativeMachine:
    """Return the fastest simulator there is, for many plans of the same pieces and rates."""
    try:
        module = native()
    except NativeUnavailableError:
        return ReferenceMachine(pieces, rates)
    return NativeMachine(module, pieces, rates)


class NativeMachine:
    """csrc/offload/schedule.cpp behind the interface of `ReferenceMachine`."""

    def __init__(self, module: Any, pieces: Sequence[Piece], rates: Rates) -> None:
        self._simulator = module.offload.Simulator(
            [p.numel for p in pieces],
            [p.low_precision_bytes * p.numel for p in pieces],
            [p.gradient_upload_bytes * p.numel for p in pieces],
            _numbers(rates),
        )

    def run(self, job: Job, *, is_traced: bool = False) -> Outcome:
        """Simulate one plan; nothing is checked but what would be out of bounds."""
        return Outcome(
            *self._simulator.run(
                job.device_order,
                job.host_order,
                tuple(job.residents),
                job.slots,
                job.release_s,
                job.host_gates,
                job.device_gates,
                job.flags,
                is_traced,
            )
        )


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
            mask = sum(1 << lane for lane in range(6) if state.piece[lane] >= 0)
            wake_s = state.next_release_s()
            if not mask:
                if math.isinf(wake_s):
                    break
                state.now_s = wake_s
                continue
            if mask not in self._speeds:
                self._speeds[mask] = speeds(self._rates, mask)
            state.advance(self._speeds[mask], wake_s)
        if state.host_done < len(job.host_order) or state.device_done < len(job.device_order):
            raise ConfigError("plan: it can never end: pieces wait for each other")
        spans = tuple(state.spans) if is_traced else ()
        return Outcome(state.now_s, state.host_end_s, state.device_end_s, state.busy_s, spans)


def speeds(rates: Rates, mask: int) -> list[float]:
    """Return how fast each lane goes while exactly the lanes of `mask` are at work.

    Args:
        rates: Each lane's speed alone.
        mask: Bit i stands for lane i of `LANES`.

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
    alone = (rates.host_params_per_s, downcast, inward, inward, 1.0, outward)
    traffic = (
        rates.host_params_per_s * rates.host_update_bytes,
        downcast * DOWNCAST_BYTES,
        inward,
        inward,
        0.0,
        outward,
    )
    found = [alone[lane] if mask >> lane & 1 else 0.0 for lane in range(6)]
    if rates.host_memory_bytes_per_s is None:
        return found
    left = float(rates.host_memory_bytes_per_s)
    waiting = sorted((traffic[lane], lane) for lane in range(6) if found[lane] and traffic[lane])
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
    piece: list[int] = field(default_factory=lambda: [-1] * 6)
    work: list[float] = field(default_factory=lambda: [0.0] * 6)
    begin_s: list[float] = field(default_factory=lambda: [0.0] * 6)
    busy_s: list[float] = field(default_factory=lambda: [0.0] * 6)
    queues: dict[int, deque[int]] = field(
        default_factory=lambda: {lane: deque() for lane in (DOWNCAST, UPLOAD, FLUSH)}
    )
    spans: list[tuple[int, int, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held = set(self.job.residents)

    def load_bytes(self, i: int) -> int:
        """Bytes that go to the device before the update of a device piece."""
        return self.pieces[i].gradient_bytes if i in self.held else self.pieces[i].staged_bytes

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

    def _start_host(self) -> None:
        job, place = self.job, self.host_next
        if self.piece[HOST] >= 0 or self.is_host_held or place >= len(job.host_order):
            return
        i = job.host_order[place]
        is_open = not job.host_gates or job.host_gates[place] <= self.device_done
        if is_open and self.is_released(i):
            self.begin(HOST, i, float(self.pieces[i].numel))
            self.host_next += 1

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
        need = [
            self.work[lane] / speed[lane] if self.piece[lane] >= 0 else math.inf
            for lane in range(6)
        ]
        step_s = min(need)
        is_woken = wake_s - self.now_s < step_s
        step_s = wake_s - self.now_s if is_woken else step_s
        self.now_s = wake_s if is_woken else self.now_s + step_s
        ended = []
        for lane in range(6):
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
        else:
            self.slots_used -= 1
            self.device_end_s = self.now_s

    def _updated(self, i: int) -> None:
        """Go on behind host update and downcast."""
        self.host_end_s = self.now_s
        if self.pieces[i].low_precision_bytes:
            self.queues[UPLOAD].append(i)
            self.is_host_held = self.is_host_held or bool(self.job.flags & 2)


def plan_job(plan: Plan, options: Options, release_s: Sequence[float] = ()) -> Job:
    """Return a plan as the simulator wants it."""
    host_gates: list[int] = []
    device_gates: list[int] = []
    if options.is_device_blocking:
        device, host = sorted(plan.device_order), sorted(plan.host_order)
        host_gates = [sum(d < h for d in device) for h in host]
        device_gates = [sum(h < d for h in host) for d in device]
        plan = Plan(
            residents=plan.residents,
            device_order=tuple(device),
            host_order=tuple(host),
            slots=plan.slots,
        )
    return Job(
        device_order=plan.device_order,
        host_order=plan.host_order,
        residents=plan.residents,
        slots=plan.slots,
        release_s=tuple(float(t) for t in release_s),
        host_gates=host_gates,
        device_gates=device_gates,
        flags=options.flags,
    )


def _checked_job(
    pieces: Sequence[Piece], plan: Plan, options: Options, release_s: Sequence[float]
) -> Job:
    check_plan(pieces, plan)
    if len(release_s) not in (0, len(pieces)) or not all(0 <= t < math.inf for t in release_s):
        raise ConfigError(
            f"release_s: got {len(release_s)} times for {len(pieces)} pieces, allowed is one "
            "finite time >= 0 for each piece, or none"
        )
    return plan_job(plan, options, release_s)


def _numbers(rates: Rates) -> list[float]:
    """Return the rates as csrc/offload/schedule.hpp lists them; 0 stands for None."""
    return [
        rates.host_to_device_bytes_per_s,
        rates.device_to_host_bytes_per_s,
        float(rates.is_duplex),
        rates.host_params_per_s,
        rates.downcast_params_per_s or 0.0,
        rates.device_params_per_s,
        rates.launch_s,
        rates.host_memory_bytes_per_s or 0.0,
        rates.host_update_bytes,
    ]


def _simulation(pieces: Sequence[Piece], plan: Plan, rates: Rates, outcome: Outcome) -> Simulation:
    from lowtide.offload.fluid import division_bound_s

    return Simulation(
        makespan_s=outcome.makespan_s,
        host_end_s=outcome.host_end_s,
        device_end_s=outcome.device_end_s,
        busy_s=dict(zip(LANES, outcome.busy_s, strict=True)),
        trace=tuple(Span(i, LANES[lane], begin, end) for i, lane, begin, end in outcome.spans),
        lower_bound_s=division_bound_s(pieces, plan, rates),
    )
