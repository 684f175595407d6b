"""What the rows of a study say, with intervals: effects, interactions, scale, precision and recall.

Every comparison is paired: the same items under two stacks, or of two models. Items about one text
are a cluster. P-values are those of the mean over its clustered standard error, taken as normal:
families have hundreds of members, and counting random resamples gives no p-value small enough to
survive the correction (Holm) over them. With fewer than some 30 texts they are too small.

Source: Miller (2411.00640), sections on paired differences, clusters and power.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import DataError
from lowtide.evaluation.optimizations.stack import DENSE
from lowtide.evaluation.statistics import (
    bootstrap,
    holm,
    minimal_detectable_effect,
    normal_interval,
    standard_error,
)

Group: TypeAlias = tuple[str, bool]
"""A task, and whether the question was known."""
Scores: TypeAlias = dict[str, dict[str, float]]
"""Metric to item to value."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One difference.

    Attributes:
        model: The model, or "large - small".
        stack: What was compared, in words.
        estimate: Mean over items.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Two-sided, for a difference of 0.
        p_holm: Corrected over the table it stands in.
        detectable: Smallest true difference that would be found with 80 % power, alone.
        items: How many.
        clusters: How many texts.
    """

    model: str
    task: str
    question_aware: bool
    metric: str
    stack: str
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    detectable: float
    items: int
    clusters: int


class Results:
    """The item rows of a study, to be compared.

    Raises:
        DataError: There are none.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._scores: dict[tuple[str, Group, str], Scores] = {}
        self.clusters: dict[str, str] = {}
        self.parts: dict[str, list[str]] = {DENSE: []}
        for row in rows:
            if row["kind"] == "item":
                group = (row["task"], row["question_aware"])
                scores = self._scores.setdefault((row["model"], group, row["stack"]), {})
                for metric in ("precision", "recall", "f1", "em", "nll", "said_old"):
                    scores.setdefault(metric, {})[row["item"]] = row[metric]
                self.clusters[row["item"]] = row["cluster"]
            elif row["kind"] == "cell":
                self.parts[row["stack"]] = row["parts"]
        if not self._scores:
            raise DataError("the rows hold no answered item; run the study first")
        self.models = list(dict.fromkeys(model for model, _, _ in self._scores))
        self.groups = list(dict.fromkeys(group for _, group, _ in self._scores))

    def stacks(self, model: str, group: Group) -> list[str]:
        """Return the stacks that were run, in their order."""
        return [s for m, g, s in self._scores if (m, g) == (model, group)]

    def means(self, model: str, group: Group, stack: str) -> dict[str, float]:
        """Return the mean of each metric."""
        scores = self._scores[model, group, stack]
        return {metric: float(np.mean(list(found.values()))) for metric, found in scores.items()}

    def scores(self, model: str, group: Group, stack: str, metric: str) -> dict[str, float]:
        """Return the metric of each item; empty when the stack was not run there."""
        return self._scores.get((model, group, stack), {}).get(metric, {})

    def combined(
        self, group: Group, metric: str, terms: Sequence[tuple[float, str, str]]
    ) -> tuple[NDArray[np.float64], list[str]]:
        """Return a sum of scores for each item, and the items' clusters.

        Args:
            group: Task and form.
            metric: Which score.
            terms: Sign, model and stack of each term. Items that a term lacks are left out.
        """
        found = [(sign, self.scores(model, group, stack, metric)) for sign, model, stack in terms]
        shared = set.intersection(*(set(scores) for _, scores in found))
        items = [item for item in found[0][1] if item in shared]
        total = np.zeros(len(items))
        for sign, scores in found:
            total += sign * np.array([scores[item] for item in items])
        return total, [self.clusters[item] for item in items]


def finding(
    results: Results,
    group: Group,
    metric: str,
    stack: str,
    model: str,
    terms: Sequence[tuple[float, str, str]],
) -> Finding | None:
    """Return a difference with its interval, or None when no item has all terms."""
    values, clusters = results.combined(group, metric, terms)
    if len(set(clusters)) < 2:
        return None
    interval = bootstrap(values, clusters, method="percentile")
    p = p_value(values, clusters)
    return Finding(
        model=model, task=group[0], question_aware=group[1], metric=metric, stack=stack,
        estimate=interval.estimate, low=interval.low, high=interval.high, p=p, p_holm=p,
        detectable=minimal_detectable_effect(standard_error(values, clusters)),
        items=len(values), clusters=len(set(clusters)),
    )  # fmt: skip


def p_value(values: NDArray[np.float64], clusters: Sequence[str]) -> float:
    """Return the two-sided p-value of a mean of 0, from the clustered standard error."""
    if len(set(clusters)) < 2:
        return 1.0
    estimate, error = float(values.mean()), standard_error(values, clusters)
    if error == 0:
        return 1.0 if estimate == 0 else 0.0
    return math.erfc(abs(estimate) / error / math.sqrt(2))


def corrected(findings: Iterable[Finding | None]) -> list[Finding]:
    """Return what was found, with p-values corrected over all of it."""
    found = [each for each in findings if each is not None]
    family = holm([each.p for each in found])
    return [replace(each, p_holm=float(p)) for each, p in zip(found, family, strict=True)]


def effects(results: Results, metric: str = "f1") -> list[Finding]:
    """Return, for every model and stack, stack - dense."""
    return corrected(
        finding(results, group, metric, stack, model, [(1, model, stack), (-1, model, DENSE)])
        for model in results.models
        for group in results.groups
        for stack in results.stacks(model, group)
        if stack != DENSE
    )


def pairs_of(results: Results, model: str, group: Group) -> list[tuple[str, str, str]]:
    """Return pairs that were run and each of their parts alone: pair, first, second."""
    run = set(results.stacks(model, group))
    found = []
    for stack in results.stacks(model, group):
        parts = results.parts.get(stack, [])
        if len(parts) == 2 and set(parts) <= run:
            found.append((stack, parts[0], parts[1]))
    return found


def _interaction(model: str, pair: tuple[str, str, str], sign: float = 1) -> list[Any]:
    stack, first, second = pair
    signs = ((sign, stack), (-sign, first), (-sign, second), (sign, DENSE))
    return [(each, model, name) for each, name in signs]


def interactions(results: Results, metric: str = "f1") -> list[Finding]:
    """Return, for every pair, (AB - A) - (B - dense): below 0, together they cost more."""
    return corrected(
        finding(results, group, metric, pair[0], model, _interaction(model, pair))
        for model in results.models
        for group in results.groups
        for pair in pairs_of(results, model, group)
    )


def scale_effects(results: Results, metric: str = "f1") -> list[Finding]:
    """Return, for every stack, its effect on the last model - its effect on the first one."""

    def terms(stack: str) -> list[tuple[float, str, str]]:
        return [(1, large, stack), (-1, large, DENSE), (-1, small, stack), (1, small, DENSE)]

    small, large = results.models[0], results.models[-1]
    if small == large:
        return []
    return corrected(
        finding(results, group, metric, stack, f"{large} - {small}", terms(stack))
        for group in results.groups
        for stack in results.stacks(large, group)
        if stack != DENSE
    )


def scale_interactions(results: Results, metric: str = "f1") -> list[Finding]:
    """Return, for every pair, its interaction in the last model - that in the first one."""
    small, large = results.models[0], results.models[-1]
    if small == large:
        return []
    return corrected(
        finding(
            results, group, metric, pair[0], f"{large} - {small}",
            _interaction(large, pair) + _interaction(small, pair, -1),
        )
        for group in results.groups
        for pair in pairs_of(results, large, group)
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Two stacks that F1 does not tell apart, and precision does.

    Attributes:
        f1: Second - first.
        precision: Likewise; `p_holm` is corrected over all pairs of stacks that were compared.
        recall: Likewise.
    """

    first: str
    second: str
    f1: Finding
    precision: Finding
    recall: Finding


def hidden_by_f1(
    results: Results, *, margin: float = 0.03, level: float = 0.01
) -> tuple[list[Hidden], int]:
    """Return pairs of stacks with equal F1 and another precision, and how many were compared.

    Equal is an F1 whose 95 % interval of the difference holds 0 and lies within `margin`, so that
    few items do not make everything equal. Another precision is one with p below `level` after
    Holm's correction over all pairs.
    """
    compared = [
        (model, group, first, second)
        for model in results.models
        for group in results.groups
        for first, second in itertools.combinations(results.stacks(model, group), 2)
    ]

    def terms(model: str, first: str, second: str) -> list[tuple[float, str, str]]:
        return [(1.0, model, second), (-1.0, model, first)]

    def difference(metric: str, model: str, group: Group, *pair: str) -> Finding | None:
        name = "second - first"
        return finding(results, group, metric, name, model, terms(model, *pair))

    family = holm(
        [
            p_value(*results.combined(group, "precision", terms(model, *pair)))
            for model, group, *pair in compared
        ]
    )
    found = []
    for each, p in zip(compared, family, strict=True):
        if p >= level:
            continue
        f1, precision, recall = (
            difference(metric, *each) for metric in ("f1", "precision", "recall")
        )
        if f1 is None or precision is None or recall is None:
            continue
        if f1.low <= 0 <= f1.high and max(-f1.low, f1.high) <= margin:
            precision = replace(precision, p_holm=float(p))
            found.append(
                Hidden(first=each[2], second=each[3], f1=f1, precision=precision, recall=recall)
            )
    return found, len(compared)


def interval_of_mean(values: Iterable[float], clusters: Sequence[str]) -> tuple[float, float]:
    """Return the 95 % interval of a mean over clustered items."""
    found = normal_interval(list(values), clusters)
    return found.low, found.high
