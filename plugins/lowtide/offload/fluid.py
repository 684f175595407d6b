"""Lane times as if the state were a fluid: the optimum that planning starts from, and bounds.

Per update, with N parameters, r of them resident, x staged, the rest on the host, the lanes need

    host      (N - x - r) (1 / U_c + 1 / D_c)                    D_c where the downcast is apart
    device    (x + r) / U_g + n t_0
    inward    (12 x + g x + h r + l (N - x - r)) / B_h           h = 0 where gradients stay, else g
    outward   12 x / B_d                                         half duplex: added to inward
    memory    ((b_C + l) (N - x - r) + 24 x + g x + h r) / M

and an update cannot take less than the slowest. All are linear in x and r, so the best division is
a small linear program.

Source: own derivation. The memory lane, a rational instead of a strided x, and full duplex go
beyond the model of Deep Optimizer States as far as its artifact shows it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lowtide.offload.rates import DOWNCAST_BYTES, STATE_BYTES, Rates
from lowtide.offload.reference import DOWNCAST, HOST, speeds
from lowtide.offload.schedule import Piece, Plan

Kind: TypeAlias = tuple[int, int, bool, bool]
Kinds: TypeAlias = dict[Kind, tuple[int, int, int]]
"""(bytes per parameter of 16-bit weights, of gradient, is it movable, does a resident keep its
gradient) -> pieces, their parameters, those of the largest piece."""

_ROUNDING = 1.0 - 1e-9  # a bound must stay one when sums are rounded


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
    launches: float


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


def fair_memory_s(work: Work, rates: Rates) -> float:
    """Return the least time for `work` where the host's memory is shared fairly.

    The host gets at least its fair share, so it is over after t_1 at the latest, and the copies
    alone cannot use all of the memory's bandwidth M, only that of the link, m. What is to be moved
    is at most M t_1 + m (T - t_1). Counts where there is more bandwidth than the link takes. It
    holds for every order and division, and for a host that pauses; only one that worked at a lower
    rate all along, so that memory and link were both full all the time, could undercut it, and
    there is nothing in a plan that would make it do so.
    """
    limit, link, host_s = _fairness(rates)
    if link >= limit:
        return 0.0
    inward = STATE_BYTES * work.staged + work.gradient + work.upload
    memory = inward + STATE_BYTES * work.staged + work.host * rates.host_update_bytes
    memory += work.host * DOWNCAST_BYTES if rates.downcast_params_per_s else 0.0
    return (memory - (limit - link) * host_s * work.host) / link


@functools.lru_cache(maxsize=64)
def _fairness(rates: Rates) -> tuple[float, float, float]:
    """Return memory bandwidth, link bandwidth, and the longest host time per parameter."""
    limit = rates.host_memory_bytes_per_s
    if limit is None:
        return 0.0, 0.0, 0.0
    inward, outward = rates.host_to_device_bytes_per_s, rates.device_to_host_bytes_per_s
    link = inward + outward if rates.is_duplex else max(inward, outward)
    host_s = 1.0 / min(speeds(rates, mask)[HOST] for mask in range(64) if mask >> HOST & 1)
    if rates.downcast_params_per_s:
        masks = [mask for mask in range(64) if mask >> DOWNCAST & 1]
        host_s += 1.0 / min(speeds(rates, mask)[DOWNCAST] for mask in masks)
    return limit, link, host_s


def division_bound_s(pieces: Sequence[Piece], plan: Plan, rates: Rates) -> float:
    """Return what no order of this division into host, staged and resident can undercut.

    A background downcast may run beside the host update, so only the slower of them counts.
    """
    held = set(plan.residents)
    host = [pieces[i] for i in (*plan.host_order, *plan.stored_order)]
    device = [pieces[i] for i in plan.device_order]
    work = Work(
        host=sum(p.numel for p in host),
        upload=sum(p.low_precision_bytes * p.numel for p in host),
        staged=sum(pieces[i].numel for i in plan.device_order if i not in held),
        device=sum(p.numel for p in device),
        gradient=sum(
            pieces[i].resident_load_bytes if i in held else pieces[i].gradient_bytes
            for i in plan.device_order
        ),
        launches=len(device),
    )
    times = lane_times_s(work, rates)
    if rates.downcast_params_per_s:
        slower = min(rates.host_params_per_s, rates.downcast_params_per_s)
        times["host"] = work.host / slower
    bound_s = max(times.values()) * _ROUNDING
    return max(bound_s, storage_bound_s(pieces, rates, carried=plan.carried))


def storage_bound_s(pieces: Sequence[Piece], rates: Rates, *, carried: int) -> float:
    """Return the least time of the busiest storage lane.

    Args:
        pieces: All pieces.
        rates: Speeds of the paths, among others.
        carried: At most so many pieces stay in buffers, and may all be of that path.
    """
    bound_s = 0.0
    for j, path in enumerate(rates.paths):
        sizes = sorted(p.state_bytes for p in pieces if p.path == j)
        moved = sum(sizes[: max(0, len(sizes) - carried)])
        bound_s = max(bound_s, moved * path.turn_s)
    return bound_s * _ROUNDING


def kinds_of(pieces: Sequence[Piece]) -> Kinds:
    """Return how many parameters there are of each kind; kinds are few where pieces are many."""
    kinds: Kinds = {}
    for p in pieces:
        kind = (p.low_precision_bytes, p.gradient_upload_bytes, p.is_movable, p.keeps_gradient)
        count, numel, largest = kinds.get(kind, (0, 0, 0))
        kinds[kind] = count + 1, numel + p.numel, max(largest, p.numel)
    return kinds


@dataclass(frozen=True, slots=True)
class Fluid:
    """The pieces as a fluid.

    Attributes:
        total: All parameters.
        movable: Those that the device may update.
        upload_bytes: Bytes per parameter of 16-bit weights.
        gradient_bytes: Bytes per parameter of gradient to upload with what is staged.
        resident_load_bytes: The same for residents.
        resident_bytes: Device memory per resident parameter.
        piece: Parameters in a movable piece, so that launches can be counted.
    """

    total: float
    movable: float
    upload_bytes: float
    gradient_bytes: float
    resident_load_bytes: float
    resident_bytes: float
    piece: float

    @classmethod
    def of(cls, kinds: Kinds, *, is_bound: bool = False) -> Fluid:
        """Return the pieces' averages, or for a bound the values that cost least."""
        movable = {kind: sizes for kind, sizes in kinds.items() if kind[2]}

        def typical(bytes_of: Callable[[Kind], int], among: Kinds) -> float:
            if is_bound:
                return min(map(bytes_of, among), default=0)
            numel = sum(sizes[1] for sizes in among.values())
            return sum(bytes_of(kind) * sizes[1] for kind, sizes in among.items()) / max(numel, 1)

        moving = sum(numel for _, numel, _ in movable.values())
        if is_bound:
            piece: float = max((largest for _, _, largest in movable.values()), default=1)
        else:
            piece = moving / max(sum(count for count, _, _ in movable.values()), 1) or 1.0
        return cls(
            total=sum(numel for _, numel, _ in kinds.values()),
            movable=moving,
            upload_bytes=typical(lambda kind: kind[0], kinds),
            gradient_bytes=typical(lambda kind: kind[1], movable),
            resident_load_bytes=typical(lambda kind: 0 if kind[3] else kind[1], movable),
            resident_bytes=STATE_BYTES + typical(lambda kind: kind[1] * kind[3], movable),
            piece=piece,
        )

    def work(self, staged: float, resident: float) -> Work:
        """Return what there is to do in this division."""
        device = staged + resident
        host = self.total - device
        return Work(
            host=host,
            upload=self.upload_bytes * host,
            staged=staged,
            device=device,
            gradient=self.gradient_bytes * staged + self.resident_load_bytes * resident,
            launches=device / self.piece,
        )


def best_staged(
    fluid: Fluid, rates: Rates, resident: float, *, slots: int, is_fair: bool = True
) -> tuple[float, float]:
    """Return (parameters to stage, seconds) of the best division for a fixed resident part.

    Args:
        fluid: The pieces.
        rates: Speeds of the lanes.
        resident: Parameters that stay on the device.
        slots: Staging slots; each goes through load, update and flush in turn, so the three
            together take at least 1 / slots of their sum. 0: nothing is staged.
        is_fair: Whether `fair_memory_s` counts too.
    """
    most = max(fluid.movable - resident, 0.0) if slots else 0.0

    def lines(staged: float) -> list[float]:
        work = fluid.work(staged, resident)
        fair_s = fair_memory_s(work, rates) if is_fair else 0.0
        load_s = (STATE_BYTES + fluid.gradient_bytes) / rates.host_to_device_bytes_per_s
        flush_s = STATE_BYTES / rates.device_to_host_bytes_per_s
        chain_s = load_s + flush_s
        chain_s += 1.0 / rates.device_params_per_s + rates.launch_s / fluid.piece
        chain_s *= staged / max(slots, 1)
        return [*lane_times_s(work, rates).values(), chain_s, fair_s]

    left, right = lines(0.0), lines(most)
    candidates = {0.0, most}
    for a, b in itertools.combinations(range(len(left)), 2):
        before, after = left[a] - left[b], right[a] - right[b]
        if before * after < 0:  # they cross in between
            candidates.add(most * before / (before - after))
    # The least time; among equals the least traffic.
    lanes = [(a, (b - a) / most if most else 0.0) for a, b in zip(left, right, strict=True)]
    seconds, staged = min((max(a + slope * x for a, slope in lanes), x) for x in candidates)
    return staged, seconds


def best_resident(
    fluid: Fluid, rates: Rates, most: float, *, slots: int, is_fair: bool = True
) -> tuple[float, float]:
    """Return (resident parameters, seconds) of the best division with at most `most` of them."""

    def seconds(resident: float) -> float:
        return best_staged(fluid, rates, resident, slots=slots, is_fair=is_fair)[1]

    best_s = seconds(most)
    # Convex in the resident part: if fewer residents do not help a little, they do not at all.
    if seconds(most * (1.0 - 1e-6)) >= best_s:
        return most, best_s
    low, high = 0.0, most
    for _ in range(80):  # ternary search
        third = (high - low) / 3
        if seconds(low + third) <= seconds(high - third):
            high -= third
        else:
            low += third
    return low, min(best_s, seconds(low), seconds(high))


def lower_bound_s(
    kinds: Kinds, rates: Rates, *, memory_bytes: float, is_fair: bool = False
) -> float:
    """Return a time that no plan within `memory_bytes` of device memory can undercut.

    Any division, any order, any number of slots; a small piece of fluid needs no slot memory.
    `is_fair` adds `fair_memory_s`: no plan can undercut that either. Without it, the slowest lane.
    """
    fluid = Fluid.of(kinds, is_bound=True)
    slots = 1 << 30 if memory_bytes > 0 else 0
    most = min(fluid.movable, memory_bytes / fluid.resident_bytes)
    return best_resident(fluid, rates, most, slots=slots, is_fair=is_fair)[1] * _ROUNDING
