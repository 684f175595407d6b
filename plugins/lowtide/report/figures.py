"""The figures of a run: what the tiles, tables and ``lowtide report --json`` show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lowtide.report.records import RankLog, Run, Step, finite

TRAIN_LOSS = "train/loss"
TOKENS_PER_S = "train/tokens_per_s"
VALIDATION_LOSS = "validation/loss"
VALIDATION_BITS = "validation/bits_per_byte"
HOST_MEMORY = "memory.rss_bytes"
DEVICE_MEMORY = ("memory.device", "memory.cuda")
PHASES = ("forward", "backward", "update", "evaluation", "save", "load")
_LOSS_VALUES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyFigures:
    """A run in numbers; None where the run recorded nothing. Names are stable."""

    name: str
    status: str
    ranks: int
    attempts: int
    duration_s: float
    last_step: int | None
    train_loss: float | None
    """Mean of the last tenth of the finite values, at most 20 of them."""
    train_loss_values: int
    """How many values that mean is over."""
    train_loss_nonfinite: int
    validation_loss: float | None
    validation_bits_per_byte: float | None
    best_reference: str | None
    best_reference_bits_per_byte: float | None
    tokens_per_s: float | None
    """Median over the run."""
    step_time_median_s: float | None
    step_time_p90_s: float | None
    peak_memory_bytes: float | None
    """Largest resident set of any rank, host memory."""
    peak_device_memory_bytes: float | None
    unreadable_lines: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what is not finite becomes None."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def key_figures(run: Run) -> KeyFigures:
    """Return the figures of a run. Times and medians are those of its lowest rank."""
    losses = run.series(TRAIN_LOSS)
    good = [point.value for point in finite(losses)]
    tail = good[-min(_LOSS_VALUES, math.ceil(len(good) / 10)) :] if good else []
    steps = run.lead.kept_steps()
    times = [step.step_s for step in steps]
    bits = finite(run.series(VALIDATION_BITS))
    yardsticks = {k: v for k, v in run.references(VALIDATION_BITS).items() if math.isfinite(v)}
    best = min(yardsticks, key=lambda name: yardsticks[name]) if yardsticks else None
    validation = finite(run.series(VALIDATION_LOSS))
    rates = [point.value for point in finite(run.series(TOKENS_PER_S))]
    reached = [a.last_step for log in run.ranks for a in log.attempts if a.last_step is not None]
    return KeyFigures(
        name=run.name,
        status=run.status(),
        ranks=run.world_size,
        attempts=len(run.lead.attempts),
        duration_s=run.duration_s(),
        last_step=max(reached, default=None),
        train_loss=float(np.mean(tail)) if tail else None,
        train_loss_values=len(tail),
        train_loss_nonfinite=len(losses) - len(good),
        validation_loss=validation[-1].value if validation else None,
        validation_bits_per_byte=bits[-1].value if bits else None,
        best_reference=best,
        best_reference_bits_per_byte=yardsticks[best] if best is not None else None,
        tokens_per_s=quantile(rates, 50),
        step_time_median_s=quantile(times, 50),
        step_time_p90_s=quantile(times, 90),
        peak_memory_bytes=_peak(run, (HOST_MEMORY,)),
        peak_device_memory_bytes=_peak(run, DEVICE_MEMORY),
        unreadable_lines=run.bad_lines,
    )


def quantile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile of the finite values, None when there are none."""
    good = [value for value in values if math.isfinite(value)]
    return float(np.percentile(good, percent)) if good else None


def _peak(run: Run, prefixes: tuple[str, ...]) -> float | None:
    peaks = [peak for log in run.ranks if (peak := peak_gauge(log, prefixes)) is not None]
    return max(peaks, default=None)


def peak_gauge(log: RankLog, prefixes: tuple[str, ...]) -> float | None:
    """Return the largest value of the gauges so named on one rank, None when there are none."""
    values = (
        value
        for step in log.steps
        for name, value in step.gauges.items()
        if name.startswith(prefixes) and math.isfinite(value)
    )
    return max(values, default=None)


def phase_seconds(step: Step) -> dict[str, float]:
    """Split one optimizer step's time into the host's phases and "other", in seconds.

    Only spans that the host records one after the other are split off; a plugin's spans may run
    beside them on lanes of their own and would be counted twice.
    """
    parts = {name: step.spans[name].total_s / step.steps for name in PHASES if name in step.spans}
    parts["other"] = max(0.0, step.step_s - sum(parts.values()))
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRow:
    """One line of the table of step time."""

    name: str
    median_s: float
    p90_s: float
    total_s: float
    share: float
    calls_per_step: float


def span_rows(steps: Sequence[Step]) -> list[SpanRow]:
    """Return one row per kind of span: the host's phases first, plugins' after, "other" last.

    Median and 90th percentile are taken over the records in which the span occurs.
    """
    wall_s = sum(step.duration_s for step in steps) or math.nan
    number_of_steps = sum(step.steps for step in steps)
    names = {name for step in steps for name in step.spans}
    ordered = [name for name in PHASES if name in names] + sorted(names - set(PHASES))
    rows = []
    for name in ordered:
        spans = [(step.spans[name], step.steps) for step in steps if name in step.spans]
        calls = sum(span.count for span, _ in spans)
        rows.append(
            _span_row(name, [s.total_s / n for s, n in spans], sum(s.total_s for s, _ in spans),
                      wall_s, calls / number_of_steps)
        )  # fmt: skip
    others = [(phase_seconds(step)["other"], step.steps) for step in steps]
    if others:
        total_s = sum(value * count for value, count in others)
        rows.append(_span_row("other", [v for v, _ in others], total_s, wall_s, math.nan))
    return rows


def _span_row(
    name: str, values: Sequence[float], total_s: float, wall_s: float, calls_per_step: float
) -> SpanRow:
    return SpanRow(
        name=name,
        median_s=quantile(values, 50) or 0.0,
        p90_s=quantile(values, 90) or 0.0,
        total_s=total_s,
        share=total_s / wall_s,
        calls_per_step=calls_per_step,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRow:
    """How one rank spent a typical step."""

    rank: int
    step_s: float
    phases: Mapping[str, float]
    peak_memory_bytes: float | None


def rank_rows(run: Run) -> list[RankRow]:
    """Return the median of each phase for every rank that recorded steps."""
    rows = []
    for log in run.ranks:
        steps = log.kept_steps()
        if not steps:
            continue
        parts = [phase_seconds(step) for step in steps]
        names = [name for name in (*PHASES, "other") if any(name in part for part in parts)]
        rows.append(
            RankRow(
                rank=log.rank,
                step_s=quantile([step.step_s for step in steps], 50) or 0.0,
                phases={
                    name: quantile([part.get(name, 0.0) for part in parts], 50) or 0.0
                    for name in names
                },
                peak_memory_bytes=peak_gauge(log, (HOST_MEMORY,)),
            )
        )
    return rows


def counter_totals(logs: Iterable[RankLog]) -> dict[str, float]:
    """Return each counter's total over ranks and attempts.

    A counter restarts at zero with every attempt, so the largest value of each attempt is added.
    """
    totals: dict[str, float] = {}
    for log in logs:
        tops: dict[tuple[int, str], float] = {}
        for step in log.steps:
            for name, value in step.counters.items():
                key = (step.attempt, name)
                tops[key] = max(value, tops.get(key, -math.inf))
        for (_, name), value in tops.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def last_gauges(log: RankLog) -> dict[str, float]:
    """Return the newest value of every gauge of one rank."""
    gauges: dict[str, float] = {}
    for step in log.steps:
        gauges.update(step.gauges)
    return gauges
