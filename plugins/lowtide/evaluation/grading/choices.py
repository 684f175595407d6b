"""Multiple choice by log-probability, free of where the right option happens to stand.

A longer option is less likely whatever it says, so there are four ways to compare; and models
prefer some positions, so options are shown in several orders in which each stands everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import DataError, listed

Scoring = Literal["sum", "per_token", "per_byte", "unconditional"]
SCORINGS: tuple[Scoring, ...] = get_args(Scoring)


class OptionScore(NamedTuple):
    """How likely one option is.

    Attributes:
        log_probability: Of the option's text after the question, in nats.
        tokens: Of the option.
        bytes: Of the option in UTF-8.
        unconditional: Log-probability after a neutral prompt, or None where it was not asked for.
    """

    log_probability: float
    tokens: int
    bytes: int
    unconditional: float | None = None


def option_scores(options: Sequence[OptionScore], scoring: Scoring) -> NDArray[np.float64]:
    """Return one figure for each option; the highest is chosen.

    "sum" is the log-probability itself, "per_token" and "per_byte" divide it by a length, and
    "unconditional" subtracts what the option has without the question.

    Raises:
        DataError: an unknown scoring, an empty option, or no unconditional log-probability.
    """
    if scoring not in SCORINGS:
        raise DataError(f'scoring: got "{scoring}", allowed is {listed(SCORINGS)}')
    values = np.array([each.log_probability for each in options], dtype=np.float64)
    if scoring in ("per_token", "per_byte"):
        lengths = [each.tokens if scoring == "per_token" else each.bytes for each in options]
        if not all(lengths):
            raise DataError(f"options: one has 0 {scoring.removeprefix('per_')}s to divide by")
        return values / np.array(lengths)
    if scoring == "unconditional":
        without = [each.unconditional for each in options]
        if any(each is None for each in without):
            raise DataError('scoring "unconditional": an option has no log-probability without it')
        return values - np.array(without, dtype=np.float64)
    return values


def probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the softmax of scores; options that are impossible (-inf) get 0."""
    if not np.isfinite(scores).any():
        return np.full(len(scores), 1 / len(scores))
    shifted = np.exp(scores - scores.max())
    share: NDArray[np.float64] = shifted / shifted.sum()
    return share


def orders(options: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Return orders in which to show options: which option stands at each position.

    The first is a random one and the others its rotations, so that with `count` = `options` each
    option stands once at each position; more begin again from another random order.

    Raises:
        DataError: fewer than one order or two options.
    """
    if options < 2 or count < 1:
        raise DataError(f"got {options} options, {count} orders; allowed are 2 and 1 or more")
    random = np.random.default_rng(seed)
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        start = random.permutation(options)
        found += [tuple(int(i) for i in np.roll(start, turn)) for turn in range(options)]
    return found[:count]


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBias:
    """Whether a position is chosen for itself.

    Attributes:
        shown: How often some option was shown at each position, shape (P,).
        chosen: How often the option at that position was chosen.
        accuracy: Share chosen right where the right option stood there; NaN where it never did.
        excess: Largest difference between a position's share of the choices and of what was shown.
        consistency: Share of items whose choice is the same option in all orders.
    """

    shown: tuple[int, ...]
    chosen: tuple[int, ...]
    accuracy: tuple[float, ...]
    excess: float
    consistency: float


def position_bias(
    items: Sequence[tuple[int, Sequence[Sequence[int]], Sequence[int]]],
) -> PositionBias:
    """Report on positions over items, which may have different numbers of options.

    Args:
        items: For each item the right option, the orders it was shown in, and the position
            chosen in each.

    Raises:
        DataError: no items, or not one choice for each order.
    """
    if not items:
        raise DataError("items: got none, allowed is one or more")
    width = max(len(order) for _, shown, _ in items for order in shown)
    shown, chosen, right_there, right = (np.zeros(width) for _ in range(4))
    fair = np.zeros(width)  # what each position would be chosen by chance
    same = 0
    for answer, item_orders, choices in items:
        if len(item_orders) != len(choices):
            raise DataError(f"items: {len(item_orders)} orders and {len(choices)} choices")
        for order, position in zip(item_orders, choices, strict=True):
            shown[: len(order)] += 1
            fair[: len(order)] += 1 / len(order)
            chosen[position] += 1
            place = list(order).index(answer)
            right_there[place] += 1
            right[place] += position == place
        picked = {order[at] for order, at in zip(item_orders, choices, strict=True)}
        same += len(picked) == 1
    with np.errstate(invalid="ignore"):
        accuracy = right / right_there
    return PositionBias(
        shown=tuple(int(n) for n in shown),
        chosen=tuple(int(n) for n in chosen),
        accuracy=tuple(float(a) for a in accuracy),
        excess=float(np.abs(chosen - fair).max() / chosen.sum()),
        consistency=same / len(items),
    )
