"""Bar charts of where the time of a step goes: over the run, and rank by rank."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from lowtide.report.curves import Chart
from lowtide.report.figures import PHASES, RankRow, phase_seconds
from lowtide.report.records import Step
from lowtide.report.svg import WIDTH, Drawing, Frame, draw_axes, seconds_labels, ticks
from lowtide.report.text import bytes_text, seconds_text

_MAX_BARS = 104
_MAX_RANKS = 24
_STACK = (*PHASES, "other")


def _bins(steps: Sequence[Step]) -> list[Sequence[Step]]:
    edges = np.linspace(0, len(steps), min(_MAX_BARS, len(steps)) + 1).astype(int)
    return [steps[a:b] for a, b in itertools.pairwise(edges)]


def _mean_phases(steps: Sequence[Step]) -> dict[str, float]:
    """Return seconds per optimizer step of each phase, over all steps given."""
    count = sum(step.steps for step in steps)
    sums: dict[str, float] = {}
    for step in steps:
        for name, value in phase_seconds(step).items():
            sums[name] = sums.get(name, 0.0) + value * step.steps
    return {name: value / count for name, value in sums.items()}


def _legend(parts: Sequence[Mapping[str, float]]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"k-{name}", name) for name in _STACK if any(part.get(name, 0.0) > 0 for part in parts)
    )


def breakdown_chart(steps: Sequence[Step]) -> Chart | None:
    """Draw the time of a step, split into phases, over the run; None without step records."""
    if not steps:
        return None
    bins = _bins(steps)
    parts = [_mean_phases(group) for group in bins]
    totals = [sum(part.values()) for part in parts]
    # One step that builds a kernel or saves a checkpoint must not flatten all others.
    top = min(max(totals), float(np.percentile(totals, 90)) * 1.5)
    frame = Frame(
        left=64, top=34, width=WIDTH - 64 - 24, height=240,
        x_range=(-0.5, len(bins) - 0.5), y_range=(0.0, top * 1.04 or 1.0),
    )  # fmt: skip
    drawing = Drawing(frame.bottom + 50, label="Seconds per optimizer step, split into phases")
    _draw_step_axes(drawing, frame, bins)
    width = frame.width / len(bins)
    bar = max(width * 0.86, width - 3, 0.5)
    is_cut = False
    for index, (group, part, total) in enumerate(zip(bins, parts, totals, strict=True)):
        first, last = group[0].step - group[0].steps + 1, group[-1].step
        name = f"steps {first:,} to {last:,}" if last > first else f"step {last:,}"
        lines = [name, f"{seconds_text(total)} per step"]
        lines += [f"{key} {seconds_text(part[key])}" for key in _STACK if key in part]
        drawing.open("g", cls="bar", tip="\n".join(lines))
        left = frame.x(index) - bar / 2
        _draw_stack(drawing, frame, part, left, bar)
        if total > frame.y_range[1]:
            is_cut = True
            drawing.add("text", "▲", cls="mid cut", x=frame.x(index), y=frame.top - 2)
        drawing.close()
    reading = (
        "Each bar is the mean step of its stretch of the run. “Other” is what the host did not "
        "time: data loading, logging, and before the first step the start-up."
    )
    if is_cut:
        reading += " Bars marked ▲ are taller than the chart; their tooltip has the figure."
    return Chart(
        title="Where a step's time goes",
        svg=drawing.render(),
        reading=reading,
        legend=_legend(parts),
    )


def _draw_step_axes(drawing: Drawing, frame: Frame, bins: Sequence[Sequence[Step]]) -> None:
    """Label round step numbers at the bars that hold them."""
    draw_axes(
        drawing, frame, x_label="optimizer step", y_label="time per step",
        y_labels=seconds_labels, x_ticks=0,
    )  # fmt: skip
    lasts = [group[-1].step for group in bins]
    for value in ticks(lasts[0], lasts[-1], 10, whole=True) or lasts[:1]:
        x = frame.x(float(np.searchsorted(lasts, value)))
        drawing.add("line", cls="axis", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 5)
        drawing.add("text", f"{value:,.0f}", cls="tick mid", x=x, y=frame.bottom + 19)


def _draw_stack(
    drawing: Drawing, frame: Frame, part: Mapping[str, float], left: float, width: float
) -> None:
    level = 0.0
    for name in _STACK:
        value = part.get(name, 0.0)
        if value <= 0:
            continue
        top, bottom = frame.y(level + value), frame.y(level)
        level += value
        if bottom - top > 0.05:
            drawing.add("rect", cls=f"k-{name}", x=left, y=top, width=width, height=bottom - top)


def ranks_chart(rows: Sequence[RankRow]) -> Chart | None:
    """Draw the median step of every rank side by side; None for fewer than two ranks."""
    if len(rows) < 2:
        return None
    chosen = _chosen_ranks(rows)
    row_height = 30.0
    top = max(sum(row.phases.values()) for row in chosen) or 1.0
    frame = Frame(
        left=76, top=14, width=WIDTH - 76 - 200, height=row_height * len(chosen),
        x_range=(0.0, top * 1.02), y_range=(0.0, 1.0),
    )  # fmt: skip
    drawing = Drawing(frame.bottom + 34, label="Median step time of every rank, by phase")
    values = ticks(0.0, top, 6)
    label = seconds_labels(values)
    for value in values:
        x = frame.x(value)
        drawing.add("line", cls="grid", x1=x, x2=x, y1=frame.top, y2=frame.bottom)
        drawing.add("text", label(value), cls="tick mid", x=x, y=frame.bottom + 18)
    for index, row in enumerate(chosen):
        y = frame.top + index * row_height
        lines = [f"rank {row.rank}: {seconds_text(row.step_s)} per step (median)"]
        lines += [f"{key} {seconds_text(value)}" for key, value in row.phases.items()]
        drawing.open("g", cls="bar", tip="\n".join(lines))
        x = frame.left
        for name in _STACK:
            width = frame.width * row.phases.get(name, 0.0) / frame.x_range[1]
            if width > 0:
                drawing.add(
                    "rect", cls=f"k-{name}", x=x, y=y + 4, width=width, height=row_height - 8
                )
            x += width
        drawing.close()
        drawing.add("text", f"rank {row.rank}", cls="tick end", x=frame.left - 10, y=y + 19)
        note = seconds_text(row.step_s)
        if row.peak_memory_bytes is not None:
            note += f", peak {bytes_text(row.peak_memory_bytes)}"
        drawing.add("text", note, cls="tick", x=frame.right + 12, y=y + 19)
    reading = (
        "Medians of each phase. Ranks wait for one another inside forward, backward or update: "
        "the one that waits least is the one the others wait for."
    )
    if len(chosen) < len(rows):
        reading += f" Of {len(rows)} ranks, the {len(chosen)} furthest from the median are shown."
    return Chart(
        title="Ranks compared",
        svg=drawing.render(),
        reading=reading,
        legend=_legend([row.phases for row in chosen]),
    )


def _chosen_ranks(rows: Sequence[RankRow]) -> list[RankRow]:
    middle = float(np.median([row.step_s for row in rows]))
    far = sorted(rows, key=lambda row: abs(row.step_s - middle), reverse=True)[:_MAX_RANKS]
    return sorted(far, key=lambda row: row.rank)


def skew(rows: Sequence[RankRow]) -> tuple[str, float] | None:
    """Return the phase whose medians differ most between ranks, and by how many seconds."""
    names = {name for row in rows for name in row.phases}
    spans = {
        name: max(r.phases.get(name, 0.0) for r in rows)
        - min(r.phases.get(name, 0.0) for r in rows)
        for name in names
    }
    if len(rows) < 2 or not spans:
        return None
    widest = max(sorted(spans), key=lambda name: spans[name])
    return widest, spans[widest]
