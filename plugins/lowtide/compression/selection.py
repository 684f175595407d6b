"""Which predictor, with which parameters, makes a chunk small: tried out on samples of it.

Nothing here changes what a decoder does, and the same values always get the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lowtide.compression.elements import Array
from lowtide.compression.predictors import (
    MAX_ORDER,
    Differences,
    Interpolation,
    Predictor,
    Shape,
)
from lowtide.compression.samples import Samples

PREDICTORS = ("auto", Differences.name, Interpolation.name)
GOALS = ("size", "psnr")

# Codes a, b of (alpha, beta) after (1, 1). For the size (1.125, 1.25), (1.25, 1.5), (1.25, 2):
# stronger ones were never better on fields from climate, terrain, medicine and turbulence. For the
# size at equal error also (1.5, 3), (1.75, 4) and (2, 5).
_FINER = {"size": ((1, 1), (2, 2), (2, 4)), "psnr": ((2, 4), (4, 8), (6, 12), (8, 16))}
# The order-0 entropy orders candidates, the entropy coder itself decides between the best ones:
# contexts gain up to a fifth, and not the same for all.
_NEAR, _MOST = 1.06, 3

P = TypeVar("P", Differences, Interpolation)


def choose(work: Array, shape: Shape, step: float, policy: str, goal: str) -> Predictor:
    """Return the predictor for a chunk.

    Args:
        work: Working values, flat, float32 or float64.
        shape: Of the chunk.
        step: Of the quantizer.
        policy: One of PREDICTORS; other than "auto" it names the predictor, whose parameters are
            chosen all the same.
        goal: One of GOALS: the smallest stream at this step, or at the error that it will have.
    """
    samples = Samples(work, shape, step, counts_error=goal == "psnr")
    found: list[tuple[float, Predictor]] = []
    if policy != Interpolation.name:
        found.append(_best_differences(samples))
    if policy != Differences.name:
        found.append(_best_interpolation(samples, _FINER[goal]))
    return min(found, key=lambda pair: pair[0])[1]


def choose_orders(work: Array, shape: Shape, step: float) -> Shape:
    """Return the orders of the differences that make a chunk smallest; arguments as `choose`."""
    return _best_differences(Samples(work, shape, step))[1].orders


def _best_differences(samples: Samples) -> tuple[float, Differences]:
    """Go to the best neighbour for as long as there is a better one, from two places."""
    costs: dict[Differences, float] = {}

    def cost(orders: Shape) -> float:
        predictor = Differences(orders)
        if predictor not in costs:
            costs[predictor] = samples.estimate(predictor)
        return costs[predictor]

    ndim, weights = samples.ndim, samples.weights
    along = weights.index(max(weights))
    for start in ((1,) * ndim, (*(0,) * along, MAX_ORDER, *(0,) * (ndim - 1 - along))):
        best, last = start, None
        while best != last:
            last = best
            around = [
                (*last[:axis], order, *last[axis + 1 :])
                for axis in range(ndim)
                for order in (last[axis] - 1, last[axis] + 1)
                if 0 <= order <= MAX_ORDER
            ]
            best = min((last, *around), key=cost)
    return _smallest(samples, costs)


def _best_interpolation(
    samples: Samples, finer_codes: Sequence[tuple[int, int]]
) -> tuple[float, Predictor]:
    """Choose spline and weights first, then how much finer coarse levels are."""
    costs: dict[Interpolation, float] = {}

    def best_of(*candidates: Interpolation) -> Interpolation:
        for each in candidates:
            if each not in costs:
                costs[each] = samples.estimate(each)
        return min(candidates, key=costs.__getitem__)

    best = best_of(*(Interpolation(samples.weights, cubic, 0, 0) for cubic in (True, False)))
    best = best_of(best, replace(best, weights=(1,) * samples.ndim))
    for alpha, beta in finer_codes:
        finer = best_of(best, replace(best, alpha=alpha, beta=beta))
        if finer == best:  # the next would be worse still
            break
        best = finer
    return _smallest(samples, costs)


def _smallest(samples: Samples, costs: dict[P, float]) -> tuple[float, P]:
    """Return the candidate that costs least by the entropy coder, and its cost per element."""
    best = sorted(costs, key=costs.__getitem__)[:_MOST]
    limit = costs[best[0]] + (_NEAR - 1) * abs(costs[best[0]])
    near = [each for each in best if costs[each] <= limit] or best[:1]
    return min(((samples.cost(each), each) for each in near), key=lambda pair: pair[0])
