"""Line charts over steps: losses, validation against yardsticks, and any other scalar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowtide.report.figures import TRAIN_LOSS, VALIDATION_BITS, VALIDATION_LOSS
from lowtide.report.records import Point, Run, finite
from lowtide.report.svg import (
    WIDTH,
    Drawing,
    Frame,
    draw_axes,
    hover_columns,
    padded,
    path_data,
    spread,
    tick_labels,
)
from lowtide.report.text import bytes_text, date_text, number, plural

_BINS = 450
_MAX_MARKS = 160
_MAX_SMALL_CHARTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure of the page."""

    title: str
    svg: str
    reading: str
    legend: tuple[tuple[str, str], ...] = ()
    """CSS class of the swatch, and its label."""


def extremes(points: Sequence[Point], bins: int = _BINS) -> list[tuple[float, float, float]]:
    """Return (middle step, lowest, highest value) of `bins` runs of neighbours: spikes survive."""
    edges = np.linspace(0, len(points), bins + 1).astype(int)
    values = [point.value for point in points]
    return [
        ((points[a].step + points[b - 1].step) / 2, min(values[a:b]), max(values[a:b]))
        for a, b in itertools.pairwise(edges)
    ]


def smooth(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return steps with the centred moving average over a twentieth of the series, thinned."""
    if len(points) < 20:
        return []
    values = np.array([point.value for point in points])
    half = max(3, len(points) // 40)
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), _BINS)).astype(int))
    return [
        (points[i].step, float(np.mean(values[max(i - half, 0) : i + half + 1]))) for i in chosen
    ]


def _segments(points: Sequence[Point]) -> list[list[Point]]:
    """Split a series where values are not finite."""
    segments: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.value):
            segments[-1].append(point)
        elif segments[-1]:
            segments.append([])
    return [segment for segment in segments if segment]


def _draw_raw(
    drawing: Drawing, frame: Frame, points: Sequence[Point], *, colour: str, is_faint: bool
) -> None:
    """Draw every value as a line, or as a band of extremes where they would touch."""
    good = sum(math.isfinite(point.value) for point in points)
    for segment in _segments(points):
        bins = math.ceil(_BINS * len(segment) / good)
        if len(segment) <= 2 * bins:
            cls = f"line {colour} faint" if is_faint else f"line {colour}"
            _draw_line(drawing, frame, [(p.step, p.value) for p in segment], cls)
            continue
        band = extremes(segment, bins)
        upper = [(frame.x(step), frame.y(high)) for step, _, high in band]
        lower = [(frame.x(step), frame.y(low)) for step, low, _ in reversed(band)]
        drawing.add("path", cls=f"band {colour}", d=path_data([*upper, *lower]) + "Z")


def _draw_line(
    drawing: Drawing, frame: Frame, places: Sequence[tuple[float, float]], cls: str
) -> None:
    drawing.add("path", cls=cls, d=path_data((frame.x(x), frame.y(y)) for x, y in places))


def _draw_dots(drawing: Drawing, frame: Frame, points: Sequence[Point], cls: str) -> None:
    stride = max(1, math.ceil(len(points) / 60))
    for point in [*points[:-1:stride], *points[-1:]]:
        drawing.add("circle", cls=cls, cx=frame.x(point.step), cy=frame.y(point.value), r=3.5)


def _draw_nonfinite(drawing: Drawing, frame: Frame, points: Sequence[Point]) -> None:
    bad = [point for point in points if not math.isfinite(point.value)]
    for point in bad[:: max(1, math.ceil(len(bad) / _MAX_MARKS))]:
        drawing.open("g", cls="bad", tip=f"step {point.step:,}: {number(point.value)}")
        drawing.add("text", "×", cls="mid", x=frame.x(point.step), y=frame.top + 9)
        drawing.close()


def _draw_resumes(drawing: Drawing, frame: Frame, run: Run) -> None:
    later = [a for a in run.lead.attempts[1:] if a.first_step is not None][-_MAX_MARKS:]
    for attempt in later:
        step = attempt.first_step or 0
        if not frame.x_range[0] <= step <= frame.x_range[1]:
            continue
        tip = f"attempt {attempt.number} went on from step {step:,} ({date_text(attempt.begin_s)})"
        drawing.open("g", cls="resume", tip=tip)
        x = frame.x(step)
        drawing.add("line", x1=x, x2=x, y1=frame.top, y2=frame.bottom)
        if len(later) <= 6:
            drawing.add("text", "resumed", x=x + 4, y=frame.top + 11)
        drawing.close()


def _frame(
    series: Sequence[Sequence[Point]], extra: Sequence[float], *, height: float, right: float
) -> Frame:
    steps = [point.step for points in series for point in points]
    values = [np.array([p.value for p in finite(points)]) for points in series]
    lows = [float(np.percentile(v, 0.2)) for v in values if v.size] + list(extra)
    highs = [float(np.percentile(v, 99.8)) for v in values if v.size] + list(extra)
    low, high = (min(lows), max(highs)) if lows else (0.0, 1.0)
    first, last = min(steps), max(steps)
    return Frame(
        left=64, top=34, width=WIDTH - 64 - right, height=height,
        x_range=(first, last) if first < last else padded(first, last),
        y_range=padded(low, high),
    )  # fmt: skip


def _tips(
    raw: Sequence[Point], label: str, others: Sequence[tuple[str, Sequence[Point]]]
) -> list[tuple[float, str]]:
    stride = max(1, len(raw) // 120)
    columns = []
    for point in [*raw[:-1:stride], *raw[-1:]]:
        lines = [f"step {point.step:,}", f"{label} {number(point.value)}"]
        for name, points in others:
            before = [other for other in points if other.step <= point.step]
            if before:
                lines.append(f"{name} {number(before[-1].value)} (step {before[-1].step:,})")
        columns.append((float(point.step), "\n".join(lines)))
    return columns


def loss_chart(run: Run) -> Chart | None:
    """Draw training loss, raw and smoothed, and validation loss; None without any."""
    train, validation = run.series(TRAIN_LOSS), run.series(VALIDATION_LOSS)
    if not train and not validation:
        return None
    frame = _frame([s for s in (train, validation) if s], (), height=290, right=24)
    drawing = Drawing(frame.bottom + 50, label="Loss over optimizer steps")
    draw_axes(drawing, frame, x_label="optimizer step", y_label="loss (nats per token)")
    _draw_resumes(drawing, frame, run)
    legend: list[tuple[str, str]] = []
    if train:
        line = smooth(finite(train))
        _draw_raw(drawing, frame, train, colour="c1", is_faint=bool(line))
        legend.append(("c1 faint", "training, every record") if line else ("c1", "training"))
        if line:
            _draw_line(drawing, frame, line, "line c1 bold")
            legend.append(("c1", "training, moving average"))
    good = finite(validation)
    if good:
        _draw_line(drawing, frame, [(p.step, p.value) for p in good], "line c2")
        _draw_dots(drawing, frame, good, "dot c2")
        legend.append(("c2", "validation"))
    bad = [p for p in (*train, *validation) if not math.isfinite(p.value)]
    if bad:
        _draw_nonfinite(drawing, frame, bad)
        legend.append(("bad", f"× not finite ({plural(len(bad), 'value')})"))
    base, name = (train, "training") if train else (validation, "validation")
    hover_columns(drawing, frame, _tips(base, name, [("validation", good)] if train else []))
    return Chart(
        title="Loss",
        svg=drawing.render(),
        reading="Lower is better. Training loss below validation loss that has stopped falling "
        "means the model is memorising its training text.",
        legend=tuple(legend),
    )


def bits_chart(run: Run) -> Chart | None:
    """Draw validation bits per byte with its yardsticks; None when there was no validation."""
    good = finite(run.series(VALIDATION_BITS))
    if not good:
        return None
    yardsticks = {k: v for k, v in run.references(VALIDATION_BITS).items() if math.isfinite(v)}
    frame = _frame([good], list(yardsticks.values()), height=270, right=150)
    drawing = Drawing(frame.bottom + 50, label="Validation bits per byte over optimizer steps")
    draw_axes(drawing, frame, x_label="optimizer step", y_label="bits per byte of held-out text")
    _draw_resumes(drawing, frame, run)
    names = sorted(yardsticks, key=lambda name: yardsticks[name])
    labels = [f"{name}: {number(yardsticks[name], 3)}" for name in names]
    places = [frame.y(yardsticks[name]) for name in names]
    last = frame.y(good[-1].value)
    moved = spread([*places, last], 16, frame.top, frame.bottom)
    for y, text_y, label in zip(places, moved, labels, strict=False):
        drawing.add("line", cls="yard", x1=frame.left, x2=frame.right, y1=y, y2=y)
        drawing.add("text", label, cls="yard", x=frame.right + 10, y=text_y + 4)
    _draw_line(drawing, frame, [(p.step, p.value) for p in good], "line c2 bold")
    _draw_dots(drawing, frame, good, "dot c2")
    drawing.add(
        "text", f"this run: {number(good[-1].value, 3)}",
        cls="mark c2", x=frame.right + 10, y=moved[-1] + 4,
    )  # fmt: skip
    hover_columns(drawing, frame, _tips(good, "bits per byte", []))
    legend = [("c2", "this run, validation text")]
    if names:
        legend.append(("yard", "yardstick on the same text"))
    return Chart(
        title="Compression of held-out text",
        svg=drawing.render(),
        reading="How many bits the model needs for one byte of text it never saw. A curve that "
        "crosses a yardstick line predicts the text better than that compressor does.",
        legend=tuple(legend),
    )


def small_charts(run: Run) -> list[Chart]:
    """Draw every other scalar as a small chart, at most a dozen."""
    shown = (TRAIN_LOSS, VALIDATION_LOSS, VALIDATION_BITS)
    charts = []
    for name in [name for name in run.scalar_names() if name not in shown]:
        points = run.series(name)
        if finite(points):
            charts.append(_small_chart(name, points))
    return charts[:_MAX_SMALL_CHARTS]


def _small_chart(name: str, points: Sequence[Point]) -> Chart:
    width, good = 510.0, finite(points)
    wide = _frame([points], (), height=130, right=0)
    frame = Frame(
        left=68, top=18, width=width - 68 - 26, height=130,
        x_range=wide.x_range, y_range=wide.y_range,
    )  # fmt: skip
    drawing = Drawing(frame.bottom + 28, label=f"{name} over optimizer steps", width=width)
    is_size = name.endswith("_bytes")
    draw_axes(
        drawing, frame, x_label="", y_label="", x_ticks=5, y_ticks=3,
        y_labels=(lambda _: bytes_text) if is_size else tick_labels,
    )  # fmt: skip
    line = smooth(good)
    _draw_raw(drawing, frame, points, colour="c1", is_faint=bool(line))
    if line:
        _draw_line(drawing, frame, line, "line c1")
    if len(good) == 1:
        _draw_dots(drawing, frame, good, "dot c1")
    _draw_nonfinite(drawing, frame, points)
    hover_columns(drawing, frame, _tips(points, name, []), limit=60)
    return Chart(title=name, svg=drawing.render(), reading="")
