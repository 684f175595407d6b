"""Two runs on the same items: paired differences, corrected for being many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lowtide.core.errors import DataError
from lowtide.evaluation.aggregate import columns, grouped, metrics_in, scored
from lowtide.evaluation.rows import Row
from lowtide.evaluation.statistics import (
    Interval,
    holm,
    mcnemar,
    mean,
    minimal_detectable_effect,
    paired_bootstrap,
    sign_flip_test,
    standard_error,
)
from lowtide.evaluation.suite.task import Metric, task_kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One metric of the second run less that of the first.

    Attributes:
        task: Name.
        metric: Name.
        first: Of the first run, on the items that both have.
        second: Of the second run.
        interval: Of the difference; its ends are not corrected for being many.
        p_value: By exchanging the two runs in whole clusters.
        p_corrected: After Holm, over all rows of this comparison.
        mcnemar_p: Exact, for right-or-wrong scores of independent items; NaN else.
        detectable: Smallest difference that such a test finds in 80 of 100 cases; NaN where the
            metric is not a mean.
        unpaired: Rows that only one run has.
        is_higher_better: Which way is up.
    """

    task: str
    metric: str
    first: float
    second: float
    interval: Interval
    p_value: float
    p_corrected: float
    mcnemar_p: float
    detectable: float
    unpaired: int
    is_higher_better: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON; null for what there is not."""
        flat = asdict(self)
        for name, value in flat.pop("interval").items():
            flat["difference" if name == "estimate" else name] = value
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in flat.items()
        }


def compare(
    first: Sequence[Row],
    second: Sequence[Row],
    *,
    every_metric: bool = False,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[Difference]:
    """Compare two runs on the items that both have, paired by item, its hash and the seed.

    Args:
        first: Rows of one model.
        second: Rows of another, or of the same one changed.
        every_metric: All metrics of a task and not only its primary one; the correction grows.
        level: Of intervals.
        resamples: Of intervals and tests.
        seed: Of both.

    Raises:
        DataError: a run with more than one model, or no item that both have.
    """
    sides = [_by_task(first, "first"), _by_task(second, "second")]
    found = []
    for task in sides[0]:
        if task in sides[1]:
            found += _task_differences(
                sides[0][task], sides[1][task], every_metric, level, resamples, seed
            )
    if not found:
        raise DataError(
            "the two runs have no scored item in common: the same task, settings, item and seed "
            "are needed"
        )
    corrected = holm([each.p_value for each in found])
    return [replace(each, p_corrected=float(p)) for each, p in zip(found, corrected, strict=True)]


def _by_task(rows: Sequence[Row], which: str) -> dict[str, list[Row]]:
    groups = grouped(rows)
    models = {model for model, _ in groups}
    if len(models) != 1:
        raise DataError(f"{which} run: has rows of {len(models)} models, allowed is one")
    return {task: members for (_, task), members in groups.items()}


def _task_differences(
    first: list[Row], second: list[Row], every_metric: bool, level: float, resamples: int, seed: int
) -> list[Difference]:
    def keyed(rows: list[Row]) -> dict[Any, Row]:
        return {(r.settings_hash, r.item, r.item_hash, r.seed): r for r in scored(rows)}

    one, other = keyed(first), keyed(second)
    common = [key for key in one if key in other]
    if not common:
        return []
    pair = [one[key] for key in common], [other[key] for key in common]
    unpaired = len(one) + len(other) - 2 * len(common)
    metrics = {n: m for n, m in metrics_in(pair[0]).items() if n in metrics_in(pair[1])}
    if not every_metric:
        primary = task_kinds.get(first[0].kind).PRIMARY
        name = primary if primary in metrics else next(iter(metrics))
        metrics = {name: metrics[name]}
    return [
        _difference(name, metric, pair, unpaired, level, resamples, seed)
        for name, metric in metrics.items()
    ]


def _difference(
    name: str,
    metric: Metric,
    pair: tuple[list[Row], list[Row]],
    unpaired: int,
    level: float,
    resamples: int,
    seed: int,
) -> Difference:
    one, other = (columns(rows, metric) for rows in pair)
    clusters = [row.cluster for row in pair[0]]
    interval = paired_bootstrap(
        one,
        other,
        clusters,
        statistic=metric.statistic,
        level=level,
        resamples=resamples,
        seed=seed,
    )
    p_value = sign_flip_test(
        one, other, clusters, statistic=metric.statistic, resamples=resamples, seed=seed
    )
    detectable = mcnemar_p = math.nan
    if metric.statistic is mean:
        error = standard_error(other[:, 0] - one[:, 0], clusters)
        if math.isfinite(error):
            detectable = minimal_detectable_effect(error, level=level)
        is_binary = bool(np.isin(np.hstack([one, other]), (0.0, 1.0)).all())
        if is_binary and len(set(clusters)) == len(clusters):
            mcnemar_p = mcnemar(one[:, 0], other[:, 0]).p_value
    return Difference(
        task=pair[0][0].task, metric=name, first=float(metric.statistic(one.mean(axis=0))),
        second=float(metric.statistic(other.mean(axis=0))), interval=interval, p_value=p_value,
        p_corrected=math.nan, mcnemar_p=mcnemar_p, detectable=detectable, unpaired=unpaired,
        is_higher_better=metric.is_higher_better,
    )  # fmt: skip
