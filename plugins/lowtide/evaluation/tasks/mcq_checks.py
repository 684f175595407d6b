"""What a set of multiple-choice items gives away: duplicates, leaks, lengths, positions.

A bias is a finding about a set, and small sets show one by chance: each comes with how far chance
alone reaches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lowtide.evaluation.grading.text import normalise
from lowtide.evaluation.statistics import holm, wilson
from lowtide.evaluation.tasks.mcq import McqItem

Kind = Literal["duplicate", "near_duplicate", "answer_leak", "length_bias", "position_bias"]
_ALIKE = 0.8  # Jaccard similarity of 3-word shingles
_SHINGLE = 3
_LEVEL = 0.01
_SHORTEST_LEAK = 4  # characters: "yes" in a question is no leak


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something about one or more items that a model could use instead of knowing.

    Attributes:
        kind: What it is.
        items: Ids; empty for a property of the set.
        message: For people.
        value: The figure behind it, if there is one.
    """

    kind: Kind
    items: tuple[str, ...]
    message: str
    value: float | None = None


def check_set(items: Sequence[McqItem]) -> list[Finding]:
    """Return all findings on a set."""
    return [
        *_duplicates(items), *_near_duplicates(items), *_leaks(items),
        *_length_bias(items), *_position_bias(items),
    ]  # fmt: skip


def _duplicates(items: Sequence[McqItem]) -> list[Finding]:
    by_text: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for item in items:
        key = (normalise(item.question), tuple(sorted(map(normalise, item.choices))))
        by_text.setdefault(key, []).append(item.id)
    return [
        Finding(
            kind="duplicate", items=tuple(ids),
            message=f"{len(ids)} items ask the same with the same options; keep one",
        )
        for ids in by_text.values() if len(ids) > 1
    ]  # fmt: skip


def _near_duplicates(items: Sequence[McqItem]) -> list[Finding]:
    """Compare questions that share a shingle; those that share most of them are nearly the same."""
    shingles = [_shingles(item.question) for item in items]
    places: dict[tuple[str, ...], list[int]] = {}
    for index, each in enumerate(shingles):
        for shingle in each:
            places.setdefault(shingle, []).append(index)
    shared: Counter[tuple[int, int]] = Counter()
    for indices in places.values():
        if len(indices) <= 50:  # "which of the" says nothing, and would take quadratic time
            shared.update((a, b) for n, a in enumerate(indices) for b in indices[n + 1 :])
    found = []
    for (one, other), common in sorted(shared.items()):
        similarity = common / len(shingles[one] | shingles[other])
        is_same = normalise(items[one].question) == normalise(items[other].question)
        if similarity >= _ALIKE and not is_same:
            found.append(
                Finding(
                    kind="near_duplicate", items=(items[one].id, items[other].id),
                    value=similarity, message="two questions are nearly the same; keep one",
                )
            )  # fmt: skip
    return found


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    return {tuple(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))}


def _leaks(items: Sequence[McqItem]) -> list[Finding]:
    found = []
    for item in items:
        question = f" {normalise(item.question)} "
        inside = [
            f" {normalise(choice)} " in question and len(normalise(choice)) >= _SHORTEST_LEAK
            for choice in item.choices
        ]
        if inside[item.answer] and sum(inside) == 1:
            found.append(
                Finding(
                    kind="answer_leak", items=(item.id,),
                    message="the right option, and no other, stands in the question",
                )
            )  # fmt: skip
    return found


def _length_bias(items: Sequence[McqItem]) -> list[Finding]:
    """Look whether choosing the longest, or the shortest, option beats chance."""
    found = []
    for name, best in (("longest", max), ("shortest", min)):
        hits, expected, tried = 0, 0.0, 0
        for item in items:
            lengths = [len(choice) for choice in item.choices]
            if lengths.count(best(lengths)) == 1:  # a tie cannot be chosen by length
                tried += 1
                hits += lengths[item.answer] == best(lengths)
                expected += 1 / len(lengths)
        if not tried:
            continue
        chance, interval = expected / tried, wilson(hits, tried, level=1 - _LEVEL)
        if interval.low > chance:
            found.append(
                Finding(
                    kind="length_bias", items=(), value=hits / tried,
                    message=f"the {name} option is right in {hits} of {tried} items, chance is "
                    f"{chance:.0%}; rewrite options to like lengths",
                )
            )  # fmt: skip
    return found


def _position_bias(items: Sequence[McqItem]) -> list[Finding]:
    """Look whether the right option stands at one position too often."""
    width = max((len(item.choices) for item in items), default=0)
    counts, chances = np.zeros(width), np.zeros((len(items), width))
    for row, item in enumerate(items):
        counts[item.answer] += 1
        chances[row, : len(item.choices)] = 1 / len(item.choices)
    if not len(items):
        return []
    random = np.random.default_rng(0)
    expected = chances.sum(axis=0)
    simulated = np.zeros((2000, width))
    cumulative = chances.cumsum(axis=1)
    for trial in simulated:
        drawn = (random.random((len(items), 1)) > cumulative[:, :-1]).sum(axis=1)
        trial += np.bincount(drawn, minlength=width)
    reached = (simulated >= counts).mean(axis=0) if width else np.zeros(0)
    corrected = holm(np.minimum(1.0, reached + 1 / len(simulated)))
    return [
        Finding(
            kind="position_bias", items=(), value=float(counts[at] / len(items)),
            message=f"the right option stands at position {at + 1} in {int(counts[at])} of "
            f"{len(items)} items, by chance it would in {expected[at]:.0f}; shuffle the options",
        )
        for at in range(width) if corrected[at] < _LEVEL
    ]  # fmt: skip
