"""Better plans where pieces are few, so that whole pieces and the order of events matter.

With few pieces, rounding the fluid optimum to whole pieces costs several per cent, memory is a
knapsack, and the order matters at both ends of every lane. So from the best plans on single changes
follow for as long as they help: a piece goes to another place, on any side; two pieces trade
places; one slot more or less. Up to seven pieces, all divisions that may still be faster follow:
each in a few good orders, then, the most promising first, in every order. With up to five that ends
as a rule with the best plan there is, but for `_NEGLIGIBLE`; else a budget of simulations ends it.

Source: own derivation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lowtide.offload.search import Candidate, Search

_ENUMERATED = 7  # movable pieces: 3^7 divisions
_MOST_PIECES = 32  # above, single changes gain less than half a per cent
_STARTS = 6
_STEPS = 24_000  # pieces simulated at most from one start, and for the sake of orders
_NEGLIGIBLE = 1e-3  # what a division cannot gain more than is not worth a look


def improve(search: Search) -> None:
    """Improve what `search` has found."""
    if len(search.pieces) > _MOST_PIECES or search.wish.fraction is not None:
        return
    starts = [candidate for _, candidate in search.best.values()]
    for start in starts:
        _climb(search, start)
    if len(search.movable) <= _ENUMERATED:
        divisions = _open_divisions(search)
        for start in _well_ordered(search, divisions):
            _climb(search, start)
        _try_orders(search, divisions)


def _open_divisions(search: Search) -> list[tuple[float, Candidate]]:
    """Return (least time, plan) of each division that may be faster, the most promising first."""
    known_s, found = _known_s(search), []
    for staged, residents in _divisions(search):
        for slots in range(1, search.wish.max_slots + 1):
            candidate = search.arrange(staged, residents, slots)
            if not search.fits(candidate):
                break  # more slots need more
            least_s = search.least_s(candidate)
            if least_s < known_s:
                found.append((least_s, candidate))
            if not candidate.slots:
                break
    return sorted(found, key=lambda entry: entry[0])


def _well_ordered(search: Search, divisions: list[tuple[float, Candidate]]) -> list[Candidate]:
    """Simulate divisions in good orders; return the best few."""
    found: list[tuple[float, int, Candidate]] = []
    for number, (least_s, candidate) in enumerate(divisions):
        if least_s >= (found[-1][0] if len(found) == _STARTS else _known_s(search)):
            break  # and so it is with all that follow
        staged = [i for i in search.by_size if i in {*candidate.device} - candidate.residents]
        others = [
            search.arrange(staged, candidate.residents, candidate.slots, before=b) for b in (0, 1)
        ]
        orders = {candidate: None, **dict.fromkeys(others)}  # without repeats
        best_s, best = min(
            ((max(search.judge(order)), order) for order in orders), key=lambda pair: pair[0]
        )
        found.append((best_s, number, best))
        found.sort(key=lambda entry: entry[:2])
        del found[_STARTS:]
    return [candidate for _, _, candidate in found]


def _try_orders(search: Search, divisions: list[tuple[float, Candidate]]) -> None:
    """Simulate divisions that may be faster in all orders, until the budget is used up."""
    budget = search.simulations + _STEPS // len(search.pieces)
    for least_s, candidate in divisions:
        if least_s >= _known_s(search):
            return
        stored = [i for i in candidate.host if search.pieces[i].path is not None]
        host = [i for i in candidate.host if search.pieces[i].path is None]
        for ours in itertools.permutations(host):
            for device in itertools.permutations(candidate.device):
                if search.simulations >= budget:
                    return
                order = (*ours, *stored)
                search.judge(Candidate(device, order, candidate.residents, candidate.slots))


def _known_s(search: Search) -> float:
    """Return the time that a plan must undercut to be worth something."""
    return min(key[1] for key, _ in search.best.values()) * (1 - _NEGLIGIBLE)


def _divisions(search: Search) -> Iterator[tuple[list[int], frozenset[int]]]:
    """Yield (staged pieces, residents) of every division; the rest is the host's.

    Of divisions that differ only in which of several equal pieces goes where, the first.
    """
    seen = set()
    pieces = [search.pieces[i] for i in search.movable]
    sizes = [
        (p.numel, p.gradient_upload_bytes, p.low_precision_bytes, p.keeps_gradient) for p in pieces
    ]
    for sides in itertools.product(range(3), repeat=len(search.movable)):
        staged = [i for i, side in zip(search.movable, sides, strict=True) if side == 1]
        residents = frozenset(i for i, side in zip(search.movable, sides, strict=True) if side == 2)
        if search.wish.residents is None:
            kind = tuple(sorted(zip(sizes, sides, strict=True)))
            if kind not in seen:
                seen.add(kind)
                yield staged, residents
        elif search.wish.residents == residents:
            yield staged, residents


def _climb(search: Search, start: Candidate) -> None:
    """Take the first change that helps, until none does or the simulations are used up."""
    budget = search.simulations + _STEPS // len(search.pieces)
    least_s = max(search.judge(start))
    is_better = True
    while is_better:
        is_better = False
        for candidate in _neighbours(search, start):
            if search.simulations >= budget:
                return
            reached_s = max(search.judge(candidate))
            if reached_s < least_s * (1 - 1e-9):
                start, least_s, is_better = candidate, reached_s, True
                break


def _neighbours(search: Search, start: Candidate) -> Iterator[Candidate]:
    moves = (_other_slots(search, start), _traded(start), _moved(search, start))
    return filter(search.fits, itertools.chain(*moves))


def _moved(search: Search, start: Candidate) -> Iterator[Candidate]:
    for i in search.by_size:
        if search.pieces[i].path is not None:
            continue  # it has an order of its own
        device = tuple(j for j in start.device if j != i)
        host = tuple(j for j in start.host if j != i)
        others = start.residents - {i}
        for changed in _inserted(device, i):
            for residents in (others, others | {i}):
                if (changed, residents) != (start.device, start.residents):
                    yield Candidate(changed, host, residents, start.slots)
        for changed in _inserted(host, i):
            if changed != start.host:
                yield Candidate(device, changed, others, start.slots)


def _inserted(order: Sequence[int], i: int) -> Iterator[tuple[int, ...]]:
    for place in range(len(order) + 1):
        yield (*order[:place], i, *order[place:])


def _traded(start: Candidate) -> Iterator[Candidate]:
    """Trade two pieces; a resident's place comes with its memory."""
    places = [*start.device, *start.host]
    cut = len(start.device)
    for a, b in itertools.combinations(range(len(places)), 2):
        traded = places.copy()
        traded[a], traded[b] = places[b], places[a]
        residents = start.residents
        if (places[a] in residents) != (places[b] in residents):
            residents = residents ^ {places[a], places[b]}
        yield Candidate(tuple(traded[:cut]), tuple(traded[cut:]), residents, start.slots)


def _other_slots(search: Search, start: Candidate) -> Iterator[Candidate]:
    for slots in range(1, search.wish.max_slots + 1):
        if slots != start.slots and start.slots:
            yield Candidate(start.device, start.host, start.residents, slots)
