"""One update under each known schedule: stock's loop, static split, fixed stride, the plan.

Everything here is simulated from rates, so it is as good as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowtide.core.errors import ConfigError
from lowtide.offload.plan import host_only_plan, make_plan, stride_plan
from lowtide.offload.rates import PathRates, Rates
from lowtide.offload.schedule import Piece, Plan
from lowtide.offload.simulate import Options, Simulation, simulate
from lowtide.offload.storage.layout import assign, fewest_buffers, lay_out

STOCK_DOWNCAST = 2.5
"""How much faster than Adam the unfused downcast of stock's loop is taken to be, with its pageable
copy: about the middle of what the fit to the published curves gives (benchmarks)."""

_MOST_PIECES = 100_000
_MOST_MORE_BUFFERS = 8
_WORTH_A_BUFFER = 0.02  # of the update
_ONLY_STORAGE = Rates(  # everything else is so fast that it does not count
    host_to_device_bytes_per_s=1e15,
    device_to_host_bytes_per_s=1e15,
    host_params_per_s=1e15,
    device_params_per_s=1e15,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """One schedule and what it would take.

    Attributes:
        name: Which schedule.
        update_s: Time of the whole update.
        to_device_bytes: Copied from host to device, per rank.
        to_host_bytes: Copied back.
        device_bytes: Device memory for slots and residents.
        on_device: Share of all parameters that the device updates.
        storage_bytes: Read from storage, and as many written to it.
    """

    name: str
    update_s: float
    to_device_bytes: int
    to_host_bytes: int
    device_bytes: int
    on_device: float
    storage_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The plan, its simulation, and the other schedules beside it."""

    pieces: Sequence[Piece]
    rates: Rates
    plan: Plan
    simulation: Simulation
    forecasts: tuple[Forecast, ...]


def cut(numel: int, subgroup_size: int, **piece: Any) -> list[Piece]:
    """Return `numel` parameters as pieces of `subgroup_size`, the last one with the rest.

    Raises:
        ConfigError: A number is below 1, or there would be more than 100,000 pieces.
    """
    for name, value in (("params", numel), ("subgroup_size", subgroup_size)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, allowed is a whole number from 1")
    whole, rest = divmod(numel, subgroup_size)
    if whole > _MOST_PIECES:
        raise ConfigError(
            f"subgroup_size: got {subgroup_size}, which cuts {numel} parameters into {whole} "
            f"pieces; allowed are {_MOST_PIECES}, so make it larger"
        )
    sizes = [subgroup_size] * whole + ([rest] if rest else [])
    return [Piece(numel=size, **piece) for size in sizes]


def store(
    pieces: Sequence[Piece], paths: Sequence[PathRates], *, memory_bytes: float, buffers: int
) -> list[Piece]:
    """Return pieces of which only some stay in host memory, as a run would divide them.

    Args:
        pieces: Equal ones, the last perhaps smaller.
        paths: Where the others go.
        memory_bytes: Host memory for state and staging buffers.
        buffers: Staging buffers.

    Raises:
        ConfigError: The memory does not hold the buffers.
    """
    layout = lay_out(
        [sum(p.numel for p in pieces)], memory_bytes=memory_bytes, piece=pieces[0].numel,
        buffers=buffers, vector=1,
    )  # fmt: skip
    places = iter(assign(len(layout.stored), paths))
    return [
        dataclasses.replace(
            pieces[0], numel=each.numel, is_movable=not each.is_stored,
            path=next(places) if each.is_stored else None,
        )
        for each in layout.extents
    ]  # fmt: skip


def choose_buffers(
    pieces: Sequence[Piece], paths: Sequence[PathRates], *, memory_bytes: float
) -> int:
    """Return how many staging buffers let storage take the least time: `fewest_buffers` or more.

    While a slow path reads one piece, a fast one reads several, which wait for their turn behind
    it. A buffer more also keeps a piece from one update to the next, and leaves less memory to
    state that is not stored at all. What that comes to, a simulation says.

    Args:
        pieces: As for `store`, as are the others.
        paths: Where they go.
        memory_bytes: Host memory for state and staging buffers.

    Raises:
        ConfigError: The memory does not hold the fewest buffers.
    """
    rates = _ONLY_STORAGE.replace(paths=tuple(paths))
    fewest = fewest_buffers(len(paths))
    best, best_s = fewest, math.inf
    for count in range(fewest, fewest + _MOST_MORE_BUFFERS + 1):
        try:
            stored = store(pieces, paths, memory_bytes=memory_bytes, buffers=count)
        except ConfigError:
            if count == fewest:
                raise
            break
        plan = make_plan(stored, rates, memory_bytes=0, buffers=count)
        if plan.makespan_s is not None and plan.makespan_s < (1 - _WORTH_A_BUFFER) * best_s:
            best, best_s = count, plan.makespan_s
    return best


def look_ahead(
    pieces: Sequence[Piece], rates: Rates, *, memory_bytes: float, **wishes: Any
) -> Outlook:
    """Plan one update and compare it with the other schedules.

    Args:
        pieces: This rank's pieces.
        rates: Its rates; where the downcast is fused (None), stock's unfused one is modelled.
        memory_bytes: Device memory for slots and residents, the same for every schedule.
        **wishes: Passed on to `make_plan`.
    """
    plan = make_plan(pieces, rates, memory_bytes=memory_bytes, **wishes)
    is_stored = any(p.path is not None for p in pieces)
    buffers = int(wishes.get("buffers", 1))
    stock = rates.replace(
        downcast_params_per_s=rates.downcast_params_per_s
        or STOCK_DOWNCAST * rates.host_params_per_s
    )
    host = host_only_plan(pieces, buffers=buffers)
    in_turn = dataclasses.replace(host, buffers=min(1, host.buffers), carried=0)
    name = "read, update, write in turn" if is_stored else "stock loop"
    forecasts = [_forecast(name, pieces, in_turn, stock, Options.stock())]
    split = stride_plan(pieces, 0, residents=_most_residents(pieces, memory_bytes))
    if split.residents:
        name = f"static split, {len(split.residents) / len(pieces):.0%} resident"
        forecasts.append(_forecast(name, pieces, split, stock, Options.stock()))
    if len(pieces) > 1:
        stride = stride_plan(pieces, 2)
        if stride.device_bytes <= memory_bytes and all(p.is_movable for p in pieces):
            name = "every second, one slot"
            forecasts.append(_forecast(name, pieces, stride, stock, Options.artifact()))
    if is_stored:
        cyclic = dataclasses.replace(host, carried=0)
        name = "overlapped, same order each time"
        forecasts.append(_forecast(name, pieces, cyclic, rates, Options()))
    forecasts.append(_forecast("host only, overlapped", pieces, host, rates, Options()))
    simulation = simulate(pieces, plan, rates)
    forecasts.append(_forecast("this plan", pieces, plan, rates, Options()))
    return Outlook(
        pieces=pieces,
        rates=rates,
        plan=plan,
        simulation=simulation,
        forecasts=tuple(forecasts),
    )


def _forecast(
    name: str, pieces: Sequence[Piece], plan: Plan, rates: Rates, options: Options
) -> Forecast:
    simulation = simulate(pieces, plan, rates, options=options, is_traced=False)
    staged = sum(pieces[i].state_bytes for i in plan.staged)
    gradient = sum(pieces[i].gradient_bytes for i in plan.staged)
    gradient += sum(pieces[i].resident_load_bytes for i in plan.residents)
    on_host = (*plan.host_order, *plan.stored_order)
    upload = sum(pieces[i].low_precision_bytes * pieces[i].numel for i in on_host)
    moved = plan.stored_order[plan.carried :]
    return Forecast(
        name=name,
        update_s=simulation.makespan_s,
        to_device_bytes=staged + gradient + upload,
        to_host_bytes=staged,
        device_bytes=plan.device_bytes,
        on_device=sum(pieces[i].numel for i in plan.device_order) / sum(p.numel for p in pieces),
        storage_bytes=sum(pieces[i].state_bytes for i in moved),
    )


def _most_residents(pieces: Sequence[Piece], memory_bytes: float) -> int:
    """Return how many of the first pieces fit beside one slot for their gradients."""
    held = slot = 0
    for count, piece in enumerate(pieces):
        held += piece.resident_bytes
        slot = max(slot, piece.resident_load_bytes)
        if not piece.is_movable or held + slot > memory_bytes:
            return count
    return len(pieces)
