"""Random pieces, rates and plans for the tests of the offload planner."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from lowtide.offload.rates import Rates
from lowtide.offload.schedule import Piece, build_plan
from lowtide.offload.simulate import Job, machine

MILLION = 1_000_000


def between(chance: random.Random, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return low * (high / low) ** chance.random()


def random_rates(chance: random.Random) -> Rates:
    link = between(chance, 2e9, 60e9)
    return Rates(
        host_to_device_bytes_per_s=link,
        device_to_host_bytes_per_s=link * chance.uniform(0.7, 1.1),
        is_duplex=chance.random() < 0.7,
        host_params_per_s=between(chance, 1e8, 3e9),
        downcast_params_per_s=between(chance, 1e9, 9e9) if chance.random() < 0.2 else None,
        device_params_per_s=between(chance, 1e9, 1e11),
        launch_s=between(chance, 1e-5, 1e-3),
        host_memory_bytes_per_s=None if chance.random() < 0.3 else between(chance, 2e10, 2e11),
    )


def random_pieces(chance: random.Random, count: int) -> list[Piece]:
    gradient, keeps = chance.choice([0, 2, 4]), chance.random() < 0.5
    return [
        Piece(
            numel=chance.randint(1, 100) * MILLION,
            gradient_upload_bytes=gradient,
            is_movable=chance.random() > 0.1,
            keeps_gradient=keeps,
        )
        for _ in range(count)
    ]


def random_memory(chance: random.Random) -> float:
    return chance.choice([0, 0.3, 0.8, 1.6, 4, 8]) * 1e9 * chance.random()


def best_makespan_s(
    pieces: Sequence[Piece], rates: Rates, memory_bytes: float, *, max_slots: int = 2
) -> float:
    """Return the shortest makespan of all divisions, orders and slots: tried one by one."""
    simulator, best = machine(pieces, rates), float("inf")
    movable = [i for i, piece in enumerate(pieces) if piece.is_movable]
    for sides in itertools.product("hsr", repeat=len(movable)):
        device = [i for i, side in zip(movable, sides, strict=True) if side != "h"]
        residents = [i for i, side in zip(movable, sides, strict=True) if side == "r"]
        host = [i for i in range(len(pieces)) if i not in device]
        if sum(pieces[i].numel for i in host) / rates.host_params_per_s >= best:
            continue  # the host alone takes longer
        for slots in range(1, max_slots + 1):
            plan = build_plan(
                pieces, residents=residents, device_order=device, host_order=host, slots=slots
            )
            if plan.device_bytes > memory_bytes or (slots > 1 and plan.slots == 0):
                break
            for d, h in itertools.product(
                itertools.permutations(device), itertools.permutations(host)
            ):
                best = min(best, simulator.run(Job(d, h, residents, plan.slots)).makespan_s)
    return best
