"""Which pieces change paths, where paths turn out slower or faster than they were.

A stored piece is read and written in every update. One that is written to another path than it was
read from has moved, and nothing was done for it that would not have been done anyway. So all that
a move needs is a reason, and one that lasts:

- at the measured rates, dividing the pieces anew would save `LEAST_GAIN` of what the paths take
  now, and `LEAST_GAIN_S`, in each of the last `PATIENCE` updates;
- the planner, which knows the host's part too, predicts that gain for the whole update;
- the last moves are long enough ago. Moves that have not paid may be taken back soon, but from then
  on one waits twice as long with the next try.

A path with little to do looks faster than it is under load, where its reads meet its writes and
other ranks' transfers. So moves may go too far, and a second thought right after them, in the other
direction, goes half way only, and so on: the division is closed in from both sides.

Rates that vary by 10 % move nothing: the worst that two paths can look like then is a gain of 10 %.

Source: dividing by the observed bandwidth is MLP-Offload's (SC 2025, arXiv 2509.02480). When it is
done, and that moves ride on writes, is our own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from lowtide.offload.rates import PathRates
from lowtide.offload.storage.layout import shares

LEAST_GAIN = 0.15
LEAST_GAIN_S = 0.02  # of an update: below, it is not the paths that are measured
PATIENCE = 5  # updates on end; measured rates have settled by then
LONGEST_PAUSE = 200  # updates
_SETTLED_AFTER = PATIENCE + 2  # updates; moves take two, as some pieces stay in buffers in one
_SMOOTHING = 0.5

Homes = list[int | None]  # path of each piece; None: it is in memory


class Placement:
    """One rank's decisions. Each rank makes its own: nothing here is collective.

    Args:
        every_n_updates: Moves are at least so far apart, and at least long enough to be judged.
    """

    def __init__(self, every_n_updates: int) -> None:
        self._shortest = self._pause = max(every_n_updates, _SETTLED_AFTER + 1)
        self._patience = self._shortest  # of a division that is well as it is
        self._updates = 0
        self._update_s = 0.0  # smoothed
        self._reasons = 0  # updates on end that had one
        self._moved_at: int | None = None
        self._before_s = 0.0
        self._step = 1.0  # share of what the rates ask for that is done
        self._direction: list[int] = []  # of the last moves: pieces more on each path

    def observe(self, update_s: float) -> None:
        """Take note of what an update took, in seconds; judge the last moves when it is time."""
        self._updates += 1
        known_s = self._update_s or update_s
        self._update_s = known_s**_SMOOTHING * update_s ** (1 - _SMOOTHING)
        if self._moved_at is None or self._updates != self._moved_at + _SETTLED_AFTER:
            return
        has_paid = self._update_s <= (1 - LEAST_GAIN / 3) * self._before_s
        if not has_paid:
            self._patience = min(2 * self._patience, max(LONGEST_PAUSE, self._shortest))
        self._pause = self._patience if has_paid else self._shortest

    def goals(
        self,
        homes: Sequence[int | None],
        sizes: Sequence[int],
        rates: Sequence[PathRates],
        takes: Sequence[bool],
        is_worth: Callable[[Homes], bool],
    ) -> dict[int, int]:
        """Return which pieces should move, and to which path. Once before each update.

        Args:
            homes: Path of each piece.
            sizes: Bytes of each piece.
            rates: Of each path, as measured.
            takes: Whether each path takes more.
            is_worth: Says whether the update would become faster by `LEAST_GAIN` with such homes.
        """
        now_s = _turn_s(homes, sizes, rates)
        wanted = divide(homes, rates, takes)
        direction = [n - _held(homes, j) for j, n in enumerate(wanted)]
        moves = spread(homes, wanted)
        then = [moves.get(number, home) for number, home in enumerate(homes)]
        gain_s = now_s - _turn_s(then, sizes, rates)
        if not moves or gain_s < max(LEAST_GAIN * now_s, LEAST_GAIN_S):
            self._reasons = 0
            return {}
        self._reasons += 1
        since = self._pause if self._moved_at is None else self._updates - self._moved_at
        if self._reasons < PATIENCE or since < self._pause:
            return {}
        self._reasons = 0
        if not is_worth(then):
            return {}
        is_second_thought = bool(self._direction) and since < self._pause + PATIENCE
        if not is_second_thought:
            self._step, self._patience = 1.0, self._shortest
        elif sum(a * b for a, b in zip(self._direction, direction, strict=True)) < 0:
            self._step /= 2
        else:
            self._step = min(1.0, 2 * self._step)
        self._moved_at, self._before_s, self._direction = self._updates, self._update_s, direction
        return _thinned(moves, self._step)


def divide(
    homes: Sequence[int | None], rates: Sequence[PathRates], takes: Sequence[bool]
) -> list[int]:
    """Return how many pieces each path should have.

    In proportion to the rates, but a path that takes no more keeps what it has at most.
    """
    found = [_held(homes, j) for j in range(len(rates))]
    left, choices = sum(found), list(range(len(rates)))
    while True:
        parts = shares(left, [rates[j] for j in choices])
        over = [j for j, n in zip(choices, parts, strict=True) if n > found[j] and not takes[j]]
        if not over:
            for j, part in zip(choices, parts, strict=True):
                found[j] = part
            return found
        left -= sum(found[j] for j in over)
        choices = [j for j in choices if j not in over]  # never none: together they have room


def spread(homes: Sequence[int | None], wanted: Sequence[int]) -> dict[int, int]:
    """Return moves to the wanted numbers of pieces: as few as possible, evenly over the order."""
    leaving: list[int] = []
    room = []
    for j, count in enumerate(wanted):
        mine = [number for number, home in enumerate(homes) if home == j]
        surplus = max(0, len(mine) - count)
        leaving += _evenly(mine, surplus)
        room.append(max(0, count - len(mine)))
    moves: dict[int, int] = {}
    given = [0] * len(room)
    for turn, number in enumerate(sorted(leaving), start=1):
        # To the path that is furthest behind its share of the moves so far.
        j = max(
            (j for j in range(len(room)) if given[j] < room[j]),
            key=lambda j: (room[j] * turn / len(leaving) - given[j], -j),
        )
        given[j] += 1
        moves[number] = j
    return moves


def _thinned(moves: dict[int, int], share: float) -> dict[int, int]:
    """Return a share of the moves, evenly over the order, and at least one."""
    kept = _evenly(sorted(moves), max(1, round(share * len(moves))))
    return {number: moves[number] for number in kept}


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    """Return `count` of the numbers, as far from each other as can be."""
    return [numbers[(2 * k + 1) * len(numbers) // (2 * count)] for k in range(count)]


def _held(homes: Sequence[int | None], path: int) -> int:
    return sum(home == path for home in homes)


def random_moves(homes: Sequence[int | None], paths: int, seed: int) -> dict[int, int]:
    """Return moves drawn at random, for about a quarter of the pieces."""
    chance = random.Random(seed)
    drawn = [(chance.random() < 0.25, chance.randrange(paths)) for _ in homes]
    return {
        number: path
        for number, (is_chosen, path) in enumerate(drawn)
        if is_chosen and homes[number] not in (None, path)
    }


def _turn_s(homes: Sequence[int | None], sizes: Sequence[int], rates: Sequence[PathRates]) -> float:
    """Return the seconds of the path that takes longest, when everything is read and written."""
    held = [0] * len(rates)
    for home, nbytes in zip(homes, sizes, strict=True):
        if home is not None:
            held[home] += nbytes
    return max(nbytes * each.turn_s for nbytes, each in zip(held, rates, strict=True))
