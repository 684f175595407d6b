"""The search behind `lowtide.offload.plan.make_plan`: candidates around the fluid optimum.

For each number of slots, size of a slot and set of residents the fluid model says how much to
stage. A few amounts around it are simulated exactly, led by which side ended last, and the best
plan of all is taken. No clock and no chance is involved, so ranks with equal rates find equal
plans.

Source: own derivation; the order of device pieces is Johnson's rule for two machines (1954).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowtide.offload.fluid import Fluid, Work, best_resident, best_staged, kinds_of, lane_times_s
from lowtide.offload.rates import STATE_BYTES, Rates
from lowtide.offload.reference import Job, Outcome
from lowtide.offload.schedule import Piece
from lowtide.offload.simulate import machine

_AMOUNTS = 3  # simulated for each number of slots and set of residents
_CAPS = 4  # sizes of a slot that are tried where pieces differ ...
_SMALLER = 0.95  # ... and are at least so much smaller than the one before
_BALANCED = 1e-3  # sides that end that close to each other cannot be balanced better
_SAME = 1e-9  # relative; plans closer than that take equally long
_NEAR = 1.0 + 2 * _SAME


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan while it is being judged; `device` holds residents too."""

    device: tuple[int, ...]
    host: tuple[int, ...]
    residents: frozenset[int]
    slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a plan must keep to.

    Attributes:
        memory_bytes: Device memory for slots and residents.
        fraction: Share of what is not resident to stage; None: the best.
        residents: The resident set; None: chosen by the search.
        max_slots: Most slots.
        buffers: Staging buffers for stored pieces.
    """

    memory_bytes: float
    fraction: float | None
    residents: frozenset[int] | None
    max_slots: int
    buffers: int = 1


class Search:
    """Judges plans of the same pieces, rates and wishes; remembers the best for each slot count."""

    def __init__(self, pieces: Sequence[Piece], rates: Rates, wish: Wish) -> None:
        self.pieces, self.rates, self.wish = pieces, rates, wish
        self.numel = [p.numel for p in pieces]
        self.load = [p.staged_bytes for p in pieces]
        self.upload = [p.low_precision_bytes * p.numel for p in pieces]
        self.resident = [p.resident_bytes for p in pieces]
        self.resident_load = [p.resident_load_bytes for p in pieces]
        self.total = sum(self.numel)
        self.by_size = sorted(range(len(pieces)), key=self.numel.__getitem__, reverse=True)
        self.stored = tuple(i for i, p in enumerate(pieces) if p.path is not None)
        self.movable = [i for i in self.by_size if pieces[i].is_movable]
        self.best: dict[int, tuple[tuple[float, float, int, int], Candidate]] = {}
        self.outcomes: dict[int, Outcome] = {}  # of the best plans
        self.simulations = 0
        self.machine = machine(pieces, rates)
        self.kinds = kinds_of(pieces)
        self._fluid = Fluid.of(self.kinds)
        self._residents_load = any(self.resident_load)
        # Johnson's rule: pieces whose second machine, the flush, takes longer come first.
        load_s, flush_s = rates.host_to_device_bytes_per_s, rates.device_to_host_bytes_per_s
        early = {
            kind[1]
            for kind in self.kinds
            if (STATE_BYTES + kind[1]) / load_s < STATE_BYTES / flush_s
        }
        self._early = (
            {i for i, p in enumerate(pieces) if p.gradient_upload_bytes in early}
            if early
            else set()
        )

    def run(self) -> None:
        """Try every shape."""
        for slots, cap in self._shapes():
            residents = self.choose_residents(slots, cap)
            if residents is None:
                continue
            self._try_amounts(slots, cap, residents)
            fewer = self._fewer_residents(slots if cap else 0, residents)
            if fewer is not None:
                self._try_amounts(slots, cap, fewer)

    def winner(self) -> Candidate:
        """Return the best of all plans that were judged."""
        found = iter(self.best[slots] for slots in sorted(self.best))
        best = next(found)
        for other in found:
            best = other if _is_better(other[0], best[0]) else best
        return best[1]

    def judge(self, candidate: Candidate) -> tuple[float, float]:
        """Simulate a plan, remember it if it is the best of its slots; return both sides' ends."""
        self.simulations += 1
        outcome = self.machine.run(self._job(candidate))
        known, seconds = self.best.get(candidate.slots), outcome.makespan_s
        if known is None or self.wish.fraction is not None or seconds <= known[0][1] * _NEAR:
            host = sum(map(self.numel.__getitem__, candidate.host))
            staged = self.total - host - sum(map(self.numel.__getitem__, candidate.residents))
            miss = self._miss(staged, candidate)
            key = (miss, seconds, staged, len(candidate.residents))
            if known is None or _is_better(key, known[0]):
                self.best[candidate.slots] = (key, candidate)
                self.outcomes[candidate.slots] = outcome
        return outcome.host_end_s, outcome.device_end_s

    def _job(self, candidate: Candidate) -> Job:
        device, residents = candidate.device, tuple(candidate.residents)
        if not self.stored:
            return Job(device, candidate.host, residents, candidate.slots)
        in_memory = [i for i in candidate.host if self.pieces[i].path is None]
        return Job(
            device, in_memory, residents, candidate.slots, stored_order=self.stored,
            buffers=self.wish.buffers, carried=self.wish.buffers,
        )  # fmt: skip

    def arrange(
        self, staged: Sequence[int], residents: frozenset[int], slots: int, *, before: int = -1
    ) -> Candidate:
        """Return a division of the pieces in a good order.

        Args:
            staged: Pieces to stage, large ones first.
            residents: Residents.
            slots: Staging slots.
            before: Place of the residents in the device's order, small ones first; -1: behind
                everything staged, large ones first, so that they fill the time of the last flush.
        """
        order = self.device_order(staged)
        held = [i for i in self.by_size if i in residents] if residents else []
        place = len(order) if before < 0 else before
        held = held if before < 0 else held[::-1]
        device = (*order[:place], *held, *order[place:])
        on_device = set(device)
        host = tuple([i for i in self.by_size if i not in on_device])
        is_loading = bool(staged) or (
            self._residents_load and any(self.resident_load[i] for i in residents)
        )
        return Candidate(device, host, residents, slots if is_loading else 0)

    def fits(self, candidate: Candidate) -> bool:
        """Tell whether a plan keeps to the wishes and to the memory."""
        residents, wish = candidate.residents, self.wish
        if wish.residents is not None and residents != wish.residents:
            return False
        if not all(self.pieces[i].is_movable for i in candidate.device):
            return False
        loads = (
            self.resident_load[i] if i in residents else self.load[i] for i in candidate.device
        )
        slot = max(loads, default=0)
        if slot and not candidate.slots:
            return False
        held = sum(map(self.resident.__getitem__, residents))
        return candidate.slots * slot + held <= wish.memory_bytes

    def least_s(self, candidate: Candidate) -> float:
        """Return a time that no order of this division undercuts."""
        device, numel = candidate.device, self.numel
        staged = [i for i in device if i not in candidate.residents]
        loads = [(self.load if i in staged else self.resident_load)[i] for i in device]
        moved = sum(map(numel.__getitem__, staged))
        work = Work(
            host=sum(map(numel.__getitem__, candidate.host)),
            upload=sum(map(self.upload.__getitem__, candidate.host)),
            staged=moved,
            device=sum(map(numel.__getitem__, device)),
            gradient=sum(loads) - STATE_BYTES * moved,
            launches=len(device),
        )
        rates = self.rates
        # A slot holds one piece at a time, from its load to the end of its update or its flush.
        held_s = sum(loads) / rates.host_to_device_bytes_per_s
        held_s += STATE_BYTES * moved / rates.device_to_host_bytes_per_s
        for i, load in zip(device, loads, strict=True):
            held_s += (numel[i] / rates.device_params_per_s + rates.launch_s) if load else 0.0
        return max(*lane_times_s(work, rates).values(), held_s / max(candidate.slots, 1))

    def choose_residents(self, slots: int, cap: int) -> frozenset[int] | None:
        """Fill what `slots` slots of `cap` bytes leave with residents, large ones first.

        Returns:
            The residents, or None where the memory is too small for slots and given residents.
        """
        wish, slot = self.wish, cap
        if wish.residents is not None:
            slot = max([cap, *(self.resident_load[i] for i in wish.residents)])
            needed = sum(map(self.resident.__getitem__, wish.residents)) + slots * slot
            is_allowed = needed <= wish.memory_bytes and (slots > 0 or slot == 0)
            return wish.residents if is_allowed else None
        left = wish.memory_bytes - slots * slot
        if left < 0:
            return None
        chosen = []
        smallest = min((self.resident[i] for i in self.movable), default=0)
        for i in self.movable:
            if left < smallest:
                break
            grown = max(slot, self.resident_load[i])
            needed = self.resident[i] + slots * (grown - slot)
            if needed <= left and (slots or not grown):
                chosen.append(i)
                left -= needed
                slot = grown
        return frozenset(chosen)

    def _fewer_residents(self, slots: int, residents: frozenset[int]) -> frozenset[int] | None:
        """Return fewer residents where the device, or the link, has too much to do with them."""
        if self.wish.residents is not None or not residents:
            return None
        most = sum(map(self.numel.__getitem__, residents))
        left, _ = best_resident(self._fluid, self.rates, most, slots=slots)
        if left >= most:
            return None
        chosen = []
        for i in self.by_size:
            if i in residents and self.numel[i] <= 2 * left:  # to the nearest piece
                chosen.append(i)
                left -= self.numel[i]
        return frozenset(chosen)

    def device_order(self, staged: Sequence[int]) -> list[int]:
        """Return staged pieces, which come large ones first, in the order that hides most."""
        if not self._early:
            return list(staged)
        early = [i for i in reversed(staged) if i in self._early]
        return [*early, *(i for i in staged if i not in self._early)]

    def _miss(self, staged: int, candidate: Candidate) -> float:
        """Return how many parameters the wanted fraction is missed by; 0 within half a piece."""
        if self.wish.fraction is None:
            return 0.0
        movable = self.total - sum(self.numel[i] for i in candidate.residents)
        miss = abs(staged - self.wish.fraction * movable)
        return miss if miss > self.numel[self.by_size[0]] / 2 else 0.0

    def _shapes(self) -> Iterator[tuple[int, int]]:
        """Yield (slots, size of a slot in bytes); size 0: nothing is staged."""
        yield 0, 0
        counts = range(self.wish.max_slots, 0, -1)  # the fastest first, so others are cut off
        sizes = sorted({self.load[i] for i in self.movable}, reverse=True)
        for slots in counts:
            fitting = [size for size in sizes if slots * size <= self.wish.memory_bytes]
            steps, last = min(_CAPS, len(fitting)), math.inf
            for step in range(steps):
                size = fitting[step * (len(fitting) - 1) // max(steps - 1, 1)]
                if size <= _SMALLER * last:
                    last = size
                    yield slots, size
        if self._residents_load:  # residents alone need a slot too, for their gradients
            yield from ((slots, 0) for slots in counts)

    def _try_amounts(self, slots: int, cap: int, residents: frozenset[int]) -> None:
        """Judge a few amounts to stage, for these slots and residents."""
        resident = sum(map(self.numel.__getitem__, residents))
        if slots == 0 and not self.wish.residents:
            self.judge(self.arrange([], frozenset(), 0))
        if self.wish.fraction is None:
            fluid_slots = slots if cap else 0
            target, least_s = best_staged(self._fluid, self.rates, resident, slots=fluid_slots)
            if any(least_s > key[1] for key, _ in self.best.values()):
                return
        else:
            target = self.wish.fraction * (self.total - resident)
        load = self.load
        eligible = [i for i in self.movable if load[i] <= cap and i not in residents] if cap else []
        ends = list(itertools.accumulate(map(self.numel.__getitem__, eligible)))
        tried = set()
        for _ in range(_AMOUNTS if self.wish.fraction is None else 1):
            staged = self._fill(eligible, ends, target)
            amount = sum(map(self.numel.__getitem__, staged))
            if amount in tried or (not staged and not residents):
                return
            tried.add(amount)
            host_s, device_s = self.judge(self.arrange(staged, residents, slots))
            if abs(host_s - device_s) < _BALANCED * host_s:
                return
            host = self.total - amount - resident
            # Both sides as straight lines through their ends: where would they meet?
            slope = host_s / max(host, 1) + device_s / max(amount, 1)
            target = amount + (host_s - device_s) / slope

    def _fill(self, eligible: Sequence[int], ends: Sequence[int], target: float) -> list[int]:
        """Return pieces that come to about `target` parameters: large ones, then what still fits.

        Args:
            eligible: Pieces, the largest first.
            ends: Running sums of their parameters.
            target: Parameters wanted.
        """
        count = bisect.bisect_right(ends, target)
        chosen = list(eligible[:count])
        left = target - (ends[count - 1] if count else 0)
        for i in eligible[count:]:
            if left < self.numel[eligible[-1]]:
                break
            if self.numel[i] <= left:
                chosen.append(i)
                left -= self.numel[i]
        if len(chosen) < len(eligible):  # one more of the smallest, if that is nearer
            on_device = set(chosen)
            smallest = next(i for i in reversed(eligible) if i not in on_device)
            if self.numel[smallest] < 2 * left:
                chosen.append(smallest)
        return chosen


def _is_better(key: tuple[float, float, int, int], than: tuple[float, float, int, int]) -> bool:
    """Compare (missed fraction, makespan, staged, residents); equal makespans move less."""
    if key[0] != than[0]:
        return key[0] < than[0]
    if abs(key[1] - than[1]) > _SAME * than[1]:
        return key[1] < than[1]
    return key[2:] < than[2:]
