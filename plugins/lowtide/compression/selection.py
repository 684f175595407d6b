"""Which predictor, with which parameters, makes a chunk small: tried out on samples of it.

The size of the codes decides, not the size of the errors. Nothing here changes what a decoder
does, and the same values always get the same choice.
"""

from __future__ import annotations

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

# Codes a, b of (alpha, beta) after (1, 1): (1.125, 1.25), (1.25, 1.5), (1.25, 2). Stronger ones
# were never better on fields from climate, terrain, medicine and turbulence.
_FINER = ((1, 1), (2, 2), (2, 4))
# The order-0 entropy orders candidates, the entropy coder itself decides between the best ones:
# contexts gain up to a fifth, and not the same for all.
_NEAR, _MOST = 1.06, 3

P = TypeVar("P", Differences, Interpolation)


def choose(work: Array, shape: Shape, step: float, policy: str) -> Predictor:
    """Return the predictor for a chunk.

    Args:
        work: Working values, flat, float32 or float64.
        shape: Of the chunk.
        step: Of the quantizer.
        policy: One of PREDICTORS; other than "auto" it names the predictor, whose parameters are
            chosen all the same.
    """
    samples = Samples(work, shape, step)
    found: list[tuple[float, Predictor]] = []
    if policy != Interpolation.name:
        found.append(_best_differences(samples))
    if policy != Differences.name:
        found.append(_best_interpolation(samples))
    return min(found, key=lambda pair: pair[0])[1]


def _best_differences(samples: Samples) -> tuple[float, Predictor]:
    """Go to the best neighbour for as long as there is a better one, from two places."""
    costs: dict[Differences, float] = {}

    def cost(orders: Shape) -> float:
        predictor = Differences(orders)
        if predictor not in costs:
            costs[predictor] = samples.entropy(predictor)
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


def _best_interpolation(samples: Samples) -> tuple[float, Predictor]:
    """Choose spline and weights first, then how much finer coarse levels are."""
    costs: dict[Interpolation, float] = {}

    def best_of(*candidates: Interpolation) -> Interpolation:
        for each in candidates:
            if each not in costs:
                costs[each] = samples.entropy(each)
        return min(candidates, key=costs.__getitem__)

    best = best_of(*(Interpolation(samples.weights, cubic, 0, 0) for cubic in (True, False)))
    best = best_of(best, replace(best, weights=(1,) * samples.ndim))
    for alpha, beta in _FINER:
        finer = best_of(best, replace(best, alpha=alpha, beta=beta))
        if finer == best:  # the next would be worse still
            break
        best = finer
    return _smallest(samples, costs)


def _smallest(samples: Samples, costs: dict[P, float]) -> tuple[float, Predictor]:
    """Return the candidate that the entropy coder makes smallest, and its bits per element."""
    best = sorted(costs, key=costs.__getitem__)[:_MOST]
    near = [each for each in best if costs[each] <= _NEAR * costs[best[0]]]
    return min(((samples.size(each), each) for each in near), key=lambda pair: pair[0])
