"""Plans the update: which pieces the host and the device update, in which order, in which slots.

    plan = make_plan(pieces, rates, memory_bytes=8 << 30)
    plan.host_order, plan.device_order, plan.residents, plan.slots

Pure functions of their arguments.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Collection, Sequence
from typing import Literal

from lowtide.core.errors import ConfigError
from lowtide.offload.fluid import Kinds, kinds_of, lower_bound_s, storage_bound_s
from lowtide.offload.improve import improve
from lowtide.offload.rates import Rates
from lowtide.offload.reference import Outcome, lane_names
from lowtide.offload.schedule import MAX_SLOTS, Piece, Plan, build_plan, check_plan, slot_bytes
from lowtide.offload.search import Search, Wish
from lowtide.offload.simulate import Options, check_paths, machine, plan_job

__all__ = [
    "Piece", "Plan", "build_plan", "check_plan", "host_only_plan", "make_plan", "predict",
    "random_plan", "stride_plan",
]  # fmt: skip


def make_plan(
    pieces: Sequence[Piece],
    rates: Rates,
    *,
    memory_bytes: float,
    fraction: Literal["auto"] | float = "auto",
    keep_residents: bool | Collection[int] = True,
    max_slots: int = 2,
    buffers: int = 1,
) -> Plan:
    """Return the plan with the shortest predicted update.

    Args:
        pieces: All pieces of this rank.
        rates: Speeds of its lanes.
        memory_bytes: Device memory for slots and residents together; where it allows neither,
            everything is updated on the host.
        fraction: Share of the parameters that are not resident to stage, 0 to 1, as near as whole
            pieces and memory allow. "auto": the best one, which may be none at all.
        keep_residents: True: what the slots leave of the memory holds residents, where that
            helps; False: no residents; a collection of indices: exactly these.
        max_slots: Most staging slots.
        buffers: Staging buffers for stored pieces, should there be any.

    Raises:
        ConfigError: An argument is out of range, given residents do not fit, or there are no rates
            for a stored piece's path.
    """
    check_paths(pieces, rates)
    wish = Wish(
        memory_bytes=_memory(memory_bytes),
        fraction=None if fraction == "auto" else _fraction(fraction),
        residents=_residents(pieces, keep_residents),
        max_slots=_slots(max_slots),
        buffers=_buffers(buffers),
    )
    if not pieces:
        return predict(pieces, host_only_plan(pieces), rates, memory_bytes=memory_bytes)
    _check_residents(pieces, wish)
    search = Search(pieces, rates, wish)
    search.run()
    improve(search)
    found = search.winner()
    plan = build_plan(
        pieces,
        residents=found.residents,
        device_order=found.device,
        host_order=found.host,
        slots=found.slots,
        buffers=buffers,
        carried=buffers,
    )
    plan, outcome = _best_carried(search, plan, search.outcomes[found.slots])
    bound_s = _bound_s(pieces, search.kinds, rates, memory_bytes, buffers)
    return _predicted(plan, rates, outcome, bound_s)


def _best_carried(search: Search, plan: Plan, outcome: Outcome) -> tuple[Plan, Outcome]:
    """Let fewer stored pieces stay in buffers where that is faster: reads could begin at once."""
    best, best_outcome = plan, outcome
    for carried in range(plan.carried):
        other = dataclasses.replace(plan, carried=carried)
        found = search.machine.run(plan_job(other, Options()))
        if found.makespan_s < best_outcome.makespan_s * (1 - 1e-9):
            best, best_outcome = other, found
    return best, best_outcome


def _bound_s(
    pieces: Sequence[Piece], kinds: Kinds, rates: Rates, memory_bytes: float, buffers: int
) -> float:
    # What copies to and from files take of the host's memory is not in the fair share.
    is_fair = not rates.paths
    return max(
        lower_bound_s(kinds, rates, memory_bytes=memory_bytes, is_fair=is_fair),
        storage_bound_s(pieces, rates, carried=buffers),
    )


def predict(pieces: Sequence[Piece], plan: Plan, rates: Rates, *, memory_bytes: float) -> Plan:
    """Return `plan` with its predicted times and the lower bound within `memory_bytes`.

    Raises:
        ConfigError: The plan does not fit the pieces or the memory.
    """
    check_plan(pieces, plan, memory_bytes=_memory(memory_bytes))
    if not pieces:
        return dataclasses.replace(plan, makespan_s=0.0, lower_bound_s=0.0)
    check_paths(pieces, rates)
    outcome = machine(pieces, rates).run(plan_job(plan, Options()))
    bound_s = _bound_s(pieces, kinds_of(pieces), rates, memory_bytes, plan.buffers)
    return _predicted(plan, rates, outcome, bound_s)


def _predicted(plan: Plan, rates: Rates, outcome: Outcome, bound_s: float) -> Plan:
    return dataclasses.replace(
        plan,
        makespan_s=outcome.makespan_s,
        busy_s=dict(zip(lane_names(len(rates.paths)), outcome.busy_s, strict=True)),
        lower_bound_s=bound_s,
    )


def host_only_plan(pieces: Sequence[Piece], *, buffers: int = 1) -> Plan:
    """Return the plan that updates everything on the host, in the order of the pieces.

    Stored pieces stay in all of the `buffers` between updates.
    """
    return build_plan(
        pieces, residents=(), device_order=(), host_order=range(len(pieces)), slots=0,
        buffers=buffers, carried=buffers,
    )  # fmt: skip


def stride_plan(pieces: Sequence[Piece], stride: int, *, residents: int = 0) -> Plan:
    """Return the published plan: one piece in `stride` on the device, by index, in one slot.

    Args:
        pieces: All pieces, each movable.
        stride: Every stride-th piece goes to the device, 2 or more; 0: none.
        residents: How many of the first pieces stay on the device (TwinFlow's split).

    Raises:
        ConfigError: An argument is out of range.

    Source: public artifact of Deep Optimizer States (arXiv 2410.21316).
    """
    if stride not in range(2, len(pieces) + 1) and stride != 0:
        raise ConfigError(f"stride: got {stride}, allowed is 0 or 2 to {len(pieces)}")
    rest = range(residents, len(pieces))
    staged = [i for i in rest if stride and (i - residents + 1) % stride == 0]
    on_device = {*range(residents), *staged}
    return build_plan(
        pieces,
        residents=range(residents),
        device_order=sorted(on_device),
        host_order=[i for i in rest if i not in on_device],
        slots=1,
    )


def random_plan(
    pieces: Sequence[Piece],
    seed: int,
    *,
    memory_bytes: float,
    max_slots: int = 3,
    keep_residents: bool = True,
    buffers: int = 3,
) -> Plan:
    """Return a valid plan drawn at random: any residents, slots and orders that fit the memory.

    For tests that want the same result from every plan; nothing is predicted.
    """
    chance = random.Random(seed)
    left = _memory(memory_bytes)
    slots = chance.randint(1, _slots(max_slots))
    shuffled = [i for i, piece in enumerate(pieces) if piece.is_movable]
    chance.shuffle(shuffled)
    share_resident, share_staged = chance.random() / 2, chance.random()
    residents: list[int] = []
    device: list[int] = []
    for i in shuffled:
        drawn = chance.random()
        is_resident = keep_residents and drawn < share_resident
        if not is_resident and chance.random() >= share_staged:
            continue
        held = [*residents, i] if is_resident else residents
        largest = slot_bytes(pieces, [*device, i], held)
        if sum(pieces[j].resident_bytes for j in held) + slots * largest <= left:
            device.append(i)
            residents = held
    host = [i for i in range(len(pieces)) if i not in set(device)]
    chance.shuffle(host)
    stored = [i for i in host if pieces[i].path is not None]
    return build_plan(
        pieces, residents=residents, device_order=device, host_order=host, slots=slots,
        stored_order=stored, buffers=buffers, carried=chance.randint(0, buffers) if stored else 0,
    )  # fmt: skip


def _memory(memory_bytes: float) -> float:
    if math.isnan(memory_bytes) or memory_bytes < 0:
        raise ConfigError(f"memory_bytes: got {memory_bytes!r}, allowed is 0 or more")
    return memory_bytes


def _fraction(fraction: float | str) -> float:
    if isinstance(fraction, str) or not 0.0 <= fraction <= 1.0:
        raise ConfigError(f'fraction: got {fraction!r}, allowed is "auto" or a number from 0 to 1')
    return float(fraction)


def _slots(max_slots: int) -> int:
    if not 1 <= max_slots <= MAX_SLOTS:
        raise ConfigError(f"max_slots: got {max_slots!r}, allowed is 1 to {MAX_SLOTS}")
    return max_slots


def _buffers(buffers: int) -> int:
    if buffers < 1:
        raise ConfigError(f"buffers: got {buffers!r}, allowed is 1 or more")
    return buffers


def _residents(pieces: Sequence[Piece], keep: bool | Collection[int]) -> frozenset[int] | None:
    if isinstance(keep, bool):
        return None if keep else frozenset()
    strangers = [i for i in keep if not 0 <= i < len(pieces) or not pieces[i].is_movable]
    if strangers:
        raise ConfigError(
            f"keep_residents: {sorted(strangers)} are not movable pieces of 0 to {len(pieces) - 1}"
        )
    return frozenset(keep)


def _check_residents(pieces: Sequence[Piece], wish: Wish) -> None:
    held = wish.residents or frozenset()
    needed = sum(pieces[i].resident_bytes for i in held) + slot_bytes(pieces, held, held)
    if held and needed > wish.memory_bytes:
        raise ConfigError(
            f"keep_residents: {len(held)} pieces need {needed} bytes of device memory with one "
            f"slot for their gradients, allowed are {wish.memory_bytes:.0f}; keep fewer"
        )
