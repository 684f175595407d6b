"""What a plan would take: an event-driven simulation of one update.

`simulate` uses native code where it is built. `lowtide.offload.reference` has the rules and is the
readable definition; both take the same steps in the same arithmetic.

Source: own derivation; `Options.artifact` restates the order of events of the public artifact of
Deep Optimizer States (arXiv 2410.21316).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowtide.core.errors import ConfigError, NativeUnavailableError
from lowtide.core.native import native
from lowtide.offload.fluid import division_bound_s
from lowtide.offload.rates import Rates
from lowtide.offload.reference import Job, Outcome, ReferenceMachine, lane_names
from lowtide.offload.schedule import Piece, Plan, check_plan


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
    job = _checked_job(pieces, plan, rates, options or Options(), release_s)
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
    job = _checked_job(pieces, plan, rates, options or Options(), release_s)
    outcome = ReferenceMachine(pieces, rates).run(job, is_traced=True)
    return _simulation(pieces, plan, rates, outcome)


def machine(pieces: Sequence[Piece], rates: Rates) -> ReferenceMachine | NativeMachine:
    """Return the fastest simulator there is, for many plans of the same pieces and rates."""
    try:
        return NativeMachine(native().offload, pieces, rates)
    except (NativeUnavailableError, AttributeError):  # not built, or built before it was there
        return ReferenceMachine(pieces, rates)


class NativeMachine:
    """csrc/offload/schedule.cpp behind the interface of `ReferenceMachine`."""

    def __init__(self, module: Any, pieces: Sequence[Piece], rates: Rates) -> None:
        self._simulator = module.Simulator(
            [p.numel for p in pieces],
            [p.low_precision_bytes * p.numel for p in pieces],
            [p.gradient_bytes for p in pieces],
            [p.resident_load_bytes for p in pieces],
            [-1 if p.path is None else p.path for p in pieces] if rates.paths else [],
            _numbers(rates),
            [(p.read_bytes_per_s, p.write_bytes_per_s) for p in rates.paths],
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
                job.stored_order,
                job.buffers,
                job.carried,
                is_traced,
            )
        )


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
            stored_order=plan.stored_order,
            buffers=plan.buffers,
            carried=plan.carried,
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
        stored_order=plan.stored_order,
        buffers=plan.buffers,
        carried=plan.carried,
    )


def _checked_job(
    pieces: Sequence[Piece],
    plan: Plan,
    rates: Rates,
    options: Options,
    release_s: Sequence[float],
) -> Job:
    check_plan(pieces, plan)
    check_paths(pieces, rates)
    if len(release_s) not in (0, len(pieces)) or not all(0 <= t < math.inf for t in release_s):
        raise ConfigError(
            f"release_s: got {len(release_s)} times for {len(pieces)} pieces, allowed is one "
            "finite time >= 0 for each piece, or none"
        )
    return plan_job(plan, options, release_s)


def check_paths(pieces: Sequence[Piece], rates: Rates) -> None:
    """Make sure that there are rates for the path of every stored piece.

    Raises:
        ConfigError: there are none for one of them.
    """
    most = max((p.path for p in pieces if p.path is not None), default=-1)
    if most >= len(rates.paths):
        raise ConfigError(
            f"rates.paths: got {len(rates.paths)} paths, and a piece is stored on path {most}; "
            f"allowed is at least {most + 1}"
        )


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
    names = lane_names(len(rates.paths))
    return Simulation(
        makespan_s=outcome.makespan_s,
        host_end_s=outcome.host_end_s,
        device_end_s=outcome.device_end_s,
        busy_s=dict(zip(names, outcome.busy_s, strict=True)),
        trace=tuple(Span(i, names[lane], begin, end) for i, lane, begin, end in outcome.spans),
        lower_bound_s=division_bound_s(pieces, plan, rates),
    )
