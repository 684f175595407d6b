"""From rows to tables: figures with intervals, and what rows say beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lowtide.core.errors import DataError, listed, near
from lowtide.evaluation.rows import Row
from lowtide.evaluation.statistics import Interval, bootstrap, mean, standard_error, wilson
from lowtide.evaluation.suite.task import Metric, metrics_of, task_kinds

FEW_CLUSTERS = 30
"""With fewer, bootstrap intervals of 95 % hold the truth in about 92 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One metric of one model on one task.

    Attributes:
        model: Name.
        model_hash: Of what decides its answers.
        task: Name.
        metric: Name.
        interval: The figure and its interval.
        standard_error: Clustered, of plain means; NaN for other statistics.
        seeds: How many.
        failed: Rows that have no scores.
        is_higher_better: Which way is up.
    """

    model: str
    model_hash: str
    task: str
    metric: str
    interval: Interval
    standard_error: float
    seeds: int
    failed: int
    is_higher_better: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON; null for what there is not."""
        flat = {**asdict(self), **asdict(self.interval)}
        del flat["interval"]
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in flat.items()
        }


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return rows by (model hash, task), without rows that stand twice.

    Raises:
        DataError: one task of one model was run under two settings, which have no common mean.
    """
    found: dict[tuple[str, str], dict[Any, Row]] = {}
    for row in rows:
        found.setdefault((row.model_hash, row.task), {})[row.key] = row
    for (_, task), members in found.items():
        if len({(row.kind, row.settings_hash) for row in members.values()}) > 1:
            raise DataError(
                f'task "{task}": rows of two settings in one table; give their files one by one'
            )
    return {key: list(members.values()) for key, members in found.items()}


def scored(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that have scores."""
    return [row for row in rows if row.scores]


def metrics_in(rows: Sequence[Row]) -> dict[str, Metric]:
    """Return the metrics of rows of one task: those that all scored rows have columns for."""
    names = [list(row.scores) for row in scored(rows)]
    if not names:
        return {}
    common = [name for name in names[0] if all(name in each for each in names)]
    return metrics_of(task_kinds.get(rows[0].kind), common)


def figures(
    rows: Sequence[Row], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> list[Figure]:
    """Return every metric of every model and task, primary metrics first.

    Rows of one item under several seeds, and items of one cluster, are resampled together.

    Raises:
        DataError: there are no rows, or rows of two settings.
    """
    if not rows:
        raise DataError("rows: there are none; was the run started?")
    found = []
    for (model_hash, task), members in grouped(rows).items():
        good = scored(members)
        for name, metric in metrics_in(members).items():
            interval, error = _interval(good, metric, level, resamples, seed)
            found.append(
                Figure(
                    model=members[0].model, model_hash=model_hash, task=task, metric=name,
                    interval=interval, standard_error=error,
                    seeds=len({row.seed for row in members}),
                    failed=sum(bool(row.error) for row in members),
                    is_higher_better=metric.is_higher_better,
                )
            )  # fmt: skip
    return found


def columns(rows: Sequence[Row], metric: Metric) -> np.ndarray:
    """Return the metric's columns, float64 of shape (rows, columns)."""
    return np.array([[row.scores[name] for name in metric.columns] for row in rows])


def _interval(
    rows: Sequence[Row], metric: Metric, level: float, resamples: int, seed: int
) -> tuple[Interval, float]:
    values = columns(rows, metric)
    clusters = [row.cluster for row in rows]
    is_mean = metric.statistic is mean
    error = standard_error(values[:, 0], clusters) if is_mean else math.nan
    is_rate = is_mean and bool(np.isin(values, (0.0, 1.0)).all())
    if is_rate and len(set(clusters)) == len(rows):
        return wilson(int(values.sum()), len(values), level=level), error
    interval = bootstrap(
        values, clusters, statistic=metric.statistic, level=level, resamples=resamples, seed=seed
    )
    return interval, error


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what tasks say of their rows beside metrics, one object per model and task."""
    found = []
    for (model_hash, task), members in grouped(rows).items():
        kind = task_kinds.get(members[0].kind)
        said = kind.summarise([row.detail for row in members if not row.error])
        errors = sorted({row.error for row in members if row.error})
        if errors:
            said = {**said, "errors": errors[:5]}
        if said:
            found.append(
                {"model": members[0].model, "model_hash": model_hash, "task": task, **said}
            )
    return found


def metric_named(metrics: Mapping[str, Metric], name: str, task: str) -> Metric:
    """Return a metric by its name.

    Raises:
        DataError: no such metric; the message has the nearest one.
    """
    if name not in metrics:
        raise DataError(
            f'task "{task}": no metric "{name}".{near(name, metrics)} Known: {listed(metrics)}'
        )
    return metrics[name]
