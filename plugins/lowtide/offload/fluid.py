"""Lane times as if the state were a fluid: the optimum that planning starts from, and bounds.

Per update, with N parameters, r of them resident, x staged, the rest on the host, the lanes need

    host      (N - x - r) (1 / U_c + 1 / D_c)                    D_c where the downcast is apart
    device    (x + r) / U_g + n t_0
    inward    (12 x + g (x + r) + l (N - x - r)) / B_h
    outward   12 x / B_d                                         half duplex: added to inward
    memory    ((b_C + l) (N - x - r) + 24 x + g (x + r)) / M

and an update cannot take less than the slowest. All are linear in x and r, so the best division is
a small linear program.

Source: own derivation. The memory lane, a rational instead of a strided x, and full duplex go
beyond the model of Deep Optimizer States as far as its artifact shows it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lowtide.offload.rates import DOWNCAST_BYTES, STATE_BYTES, Rates
from lowtide.offload.schedule import Piece, Plan

Kinds: TypeAlias = dict[tuple[int, int, bool], int]
"""(bytes per parameter of 16-bit weights, of gradient, is it movable) -> parameters."""

_ROUNDING = 1.0 - 1e-12  # a bound must stay one when sums are rounded


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do on each side, in parameters and bytes.

    Attributes:
        host: Parameters updated on the host.
        upload: Bytes of 16-bit weights from the host.
        staged: Parameters that travel both ways.
        device: Parameters updated on the device, residents among them.
        gradient: Bytes of gradient that go to the device.
        launches: Device updates.
    """

    host: float
    upload: float
    staged: float
    device: float
    gradient: float
    launches: int = 0


def lane_times_s(work: Work, rates: Rates) -> dict[str, float]:
    """Return the least time each resource needs for `work`.

    Returns:
        Seconds for "host", "device", "inward", "outward", "memory"; on a half-duplex link
        "inward" holds both directions.
    """
    downcast = rates.downcast_params_per_s
    inward = STATE_BYTES * work.staged + work.gradient + work.upload
    outward = STATE_BYTES * work.staged
    memory = inward + outward + work.host * rates.host_update_bytes
    memory += work.host * DOWNCAST_BYTES if downcast else 0.0
    limit = rates.host_memory_bytes_per_s
    inward_s = inward / rates.host_to_device_bytes_per_s
    outward_s = outward / rates.device_to_host_bytes_per_s
    return {
        "host": work.host / rates.host_params_per_s + (work.host / downcast if downcast else 0.0),
        "device": work.device / rates.device_params_per_s + work.launches * rates.launch_s,
        "inward": inward_s if rates.is_duplex else inward_s + outward_s,
        "outward": outward_s,
        "memory": memory / limit if limit else 0.0,
    }


def division_bound_s(pieces: Sequence[Piece], plan: Plan, rates: Rates) -> float:
    """Return what no order of this division into host, staged and resident can undercut.

    A background downcast may run beside the host update, so only the slower of them counts.
    """
    held = set(plan.residents)
    host = [pieces[i] for i in plan.host_order]
    device = [pieces[i] for i in plan.device_order]
    work = Work(
        host=sum(p.numel for p in host),
        upload=sum(p.low_precision_bytes * p.numel for p in host),
        staged=sum(pieces[i].numel for i in plan.device_order if i not in held),
        device=sum(p.numel for p in device),
        gradient=sum(p.gradient_bytes for p in device),
        launches=len(device),
    )
    times = lane_times_s(work, rates)
    if rates.downcast_params_per_s:
        slower = min(rates.host_params_per_s, rates.downcast_params_per_s)
        times["host"] = work.host / slower
    return max(times.values()) * _ROUNDING


def kinds_of(pieces: Sequence[Piece]) -> Kinds:
    """Return how many parameters there are of each kind; kinds are few where pieces are many."""
    kinds: Kinds = {}
    for p in pieces:
        kind = (p.low_precision_bytes, p.gradient_upload_bytes, p.is_movable)
        kinds[kind] = kinds.get(kind, 0) + p.numel
    return kinds


@dataclass(frozen=True, slots=True)
class Fluid:
    """The pieces as a fluid.

    Attributes:
        total: All parameters.
        movable: Those that the device may update.
        upload_bytes: Bytes per parameter of 16-bit weights.
        gradient_bytes: Bytes per parameter of gradient to upload.
    """

    total: float
    movable: float
    upload_bytes: float
    gradient_bytes: float

    @classmethod
    def of(cls, kinds: Kinds, *, is_bound: bool = False) -> Fluid:
        """Return the pieces' averages, or for a bound the smallest values."""
        total = sum(kinds.values())
        movable = {kind: numel for kind, numel in kinds.items() if kind[2]}
        moving = sum(movable.values())
        if is_bound:
            upload: float = min(kind[0] for kind in kinds)
            gradient: float = min((kind[1] for kind in movable), default=0)
        else:
            upload = sum(kind[0] * numel for kind, numel in kinds.items()) / total
            gradient = sum(kind[1] * n for kind, n in movable.items()) / max(moving, 1)
        return cls(total, moving, upload, gradient)

    def work(self, staged: float, resident: float) -> Work:
        """Return what there is to do in this division, without launches."""
        device = staged + resident
        host = self.total - device
        return Work(
            host=host,
            upload=self.upload_bytes * host,
            staged=staged,
            device=device,
            gradient=self.gradient_bytes * device,
        )


def best_staged(fluid: Fluid, rates: Rates, resident: float, *, slots: int) -> tuple[float, float]:
    """Return (parameters to stage, seconds) of the best division for a fixed resident part.

    Args:
        fluid: The pieces.
        rates: Speeds of the lanes.
        resident: Parameters that stay on the device.
        slots: Staging slots; each goes through load, update and flush in turn, so the three
            together take at least 1 / slots of their sum. 0: nothing is staged.
    """
    most = max(fluid.movable - resident, 0.0) if slots else 0.0

    def lines(staged: float) -> list[float]:
        times = lane_times_s(fluid.work(staged, resident), rates)
        load_s = (STATE_BYTES + fluid.gradient_bytes) / rates.host_to_device_bytes_per_s
        flush_s = STATE_BYTES / rates.device_to_host_bytes_per_s
        chain_s = load_s + flush_s + 1.0 / rates.device_params_per_s
        return [*times.values(), staged * chain_s / max(slots, 1)]

    left, right = lines(0.0), lines(most)
    candidates = {0.0, most}
    for a, b in itertools.combinations(range(len(left)), 2):
        before, after = left[a] - left[b], right[a] - right[b]
        if before * after < 0:  # they cross in between
            candidates.add(most * before / (before - after))
    # The least time; among equals the least traffic.
    seconds, staged = min((max(lines(staged)), staged) for staged in candidates)
    return staged, seconds


def lower_bound_s(kinds: Kinds, rates: Rates, *, memory_bytes: float) -> float:
    """Return a time that no plan within `memory_bytes` of device memory can undercut.

    Any division, any order, any number of slots; a small piece of fluid needs no slot memory.
    """
    fluid = Fluid.of(kinds, is_bound=True)
    slots = 1 << 30 if memory_bytes > 0 else 0
    most = min(fluid.movable, memory_bytes / STATE_BYTES)

    def seconds(resident: float) -> float:
        return best_staged(fluid, rates, resident, slots=slots)[1]

    best = seconds(most)
    # Convex in the resident part: if fewer residents do not help a little, they do not at all.
    if seconds(most * (1.0 - 1e-6)) >= best:
        return best * _ROUNDING
    low, high = 0.0, most
    for _ in range(120):  # ternary search
        third = (high - low) / 3
        if seconds(low + third) <= seconds(high - third):
            high -= third
        else:
            low += third
    return min(best, seconds(low), seconds(high)) * _ROUNDING
