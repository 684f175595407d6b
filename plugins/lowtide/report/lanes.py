"""The lane timeline: what ran when, on every lane of every rank, during a few typical steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.report.curves import Chart
from lowtide.report.figures import PHASES
from lowtide.report.svg import WIDTH, Drawing, seconds_labels, ticks
from lowtide.report.text import plural, seconds_text

_STEPS_SHOWN = 4
_MAX_RANKS = 8
_MAX_RECTANGLES = 4000
_MAX_DEPTH = 4
_ROW, _GAP, _LEFT = 22.0, 7.0, 150.0
_LETTER = 7.0  # average width of a letter in a bar, in drawing units


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """One span of the trace; times are unix seconds."""

    rank: int
    lane: str
    name: str
    begin_s: float
    end_s: float
    args: Mapping[str, Any]


def read_trace(path: Path, rank: int) -> list[LaneSpan]:
    """Read one rank's Chrome trace, as far as the file is whole; in order of begin.

    A file cut short gives the events before the cut; a file that is no trace gives none.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lanes: dict[str, str] = {}
    spans: list[tuple[str, str, float, float, Mapping[str, Any]]] = []
    for event in _events(text):
        try:
            thread = str(event.get("tid"))
            if event.get("ph") == "M" and event.get("name") == "thread_name":
                lanes[thread] = str(event["args"]["name"])
            elif event.get("ph") == "X":
                begin_s = float(event["ts"]) / 1e6
                end_s = begin_s + max(0.0, float(event["dur"]) / 1e6)
                args = event.get("args")
                args = args if isinstance(args, dict) else {}
                spans.append((thread, str(event["name"]), begin_s, end_s, args))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    named = [
        LaneSpan(
            rank=rank,
            lane=lanes.get(thread, f"lane {thread}"),
            name=name,
            begin_s=begin_s,
            end_s=end_s,
            args=args,
        )
        for thread, name, begin_s, end_s, args in spans
    ]
    return sorted(named, key=lambda span: (span.begin_s, -span.end_s))


def _events(text: str) -> Iterator[Any]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        yield from _salvaged(text)
        return
    events = whole.get("traceEvents") if isinstance(whole, dict) else whole
    if isinstance(events, list):
        yield from events


def _salvaged(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    position = text.find("[") + 1
    while position > 0 and (position := text.find("{", position)) >= 0:
        try:
            event, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return
        yield event


def choose_window(spans: Sequence[LaneSpan]) -> tuple[float, float, int]:
    """Choose a few typical steps near the end.

    Args:
        spans: All spans of one rank, ordered by begin.

    Returns:
        Begin and end in unix seconds, and how many steps lie between (0: no update was seen, the
        window is just the newest stretch).
    """
    ends = [span.end_s for span in spans if span.name == "update"]
    if len(ends) < 2:
        newest = spans[-60:]
        return newest[0].begin_s, max(span.end_s for span in newest), 0
    count = min(_STEPS_SHOWN, len(ends) - 1)
    recent = ends[-41:]
    widths = [recent[i + count] - recent[i] for i in range(len(recent) - count)]
    middle = float(np.median(widths))
    # The last one among equals: nearest to the end of the run.
    best = min(reversed(range(len(widths))), key=lambda index: abs(widths[index] - middle))
    return recent[best], recent[best + count], count


def _depths(spans: Sequence[LaneSpan]) -> list[int]:
    """Return how many spans of the same lane are still open when each one begins."""
    open_ends: list[float] = []
    depths = []
    for span in spans:
        open_ends = [end for end in open_ends if end > span.begin_s + 1e-9]
        depths.append(min(len(open_ends), _MAX_DEPTH - 1))
        open_ends.append(span.end_s)
    return depths


def span_class(name: str, names: Sequence[str]) -> str:
    """Return the CSS class that colours a span: fixed for the host's phases, else by order."""
    if name in PHASES:
        return f"k-{name}"
    others = [other for other in names if other not in PHASES]
    return f"p{others.index(name) % 6}"


def timeline_chart(traces: Mapping[int, Path]) -> Chart | None:
    """Draw a few steps of up to eight ranks, one row per rank and lane; None without spans."""
    chosen = sorted(traces)[:_MAX_RANKS]
    by_rank = {rank: read_trace(traces[rank], rank) for rank in chosen}
    by_rank = {rank: spans for rank, spans in by_rank.items() if spans}
    if not by_rank:
        return None
    lead = min(by_rank)
    begin_s, end_s, count = choose_window(by_rank[lead])
    rows: dict[tuple[int, str], list[LaneSpan]] = {}
    for rank, spans in by_rank.items():
        for span in spans:
            if span.end_s > begin_s and span.begin_s < end_s:
                rows.setdefault((rank, span.lane), []).append(span)
    if not rows or end_s <= begin_s:
        return None
    names = sorted({span.name for spans in rows.values() for span in spans})
    svg, hidden = _draw(rows, names, begin_s, end_s)
    what = f"{plural(count, 'typical step')} near the end" if count else "the newest spans"
    reading = (
        f"{what[0].upper()}{what[1:]}, {seconds_text(end_s - begin_s)} in all; one row per rank "
        "and lane. Bars under one another on different lanes ran at the same time. The whole trace "
        "opens in Perfetto (ui.perfetto.dev): load trace.rank<R>.json."
    )
    if hidden:
        reading += f" {plural(hidden, 'span')} too short to see left out."
    if len(traces) > len(chosen):
        reading += f" The first {len(chosen)} of {len(traces)} ranks are shown."
    ordered = [name for name in PHASES if name in names] + [n for n in names if n not in PHASES]
    legend = tuple((span_class(name, names), name) for name in ordered[:16])
    return Chart(title="Timeline of lanes", svg=svg, reading=reading, legend=legend)


def _draw(
    rows: Mapping[tuple[int, str], Sequence[LaneSpan]],
    names: Sequence[str],
    begin_s: float,
    end_s: float,
) -> tuple[str, int]:
    depths = {key: _depths(spans) for key, spans in rows.items()}
    ordered = sorted(rows, key=lambda key: (key[0], key[1] != "host", key[1]))
    heights = {key: _ROW * (max(depths[key]) + 1) for key in ordered}
    bottom = 8.0 + sum(height + _GAP for height in heights.values())
    drawing = Drawing(bottom + 40, label="Timeline of lanes")
    scale = (WIDTH - _LEFT - 16) / (end_s - begin_s)
    values = ticks(0.0, end_s - begin_s, 8)
    label = seconds_labels(values)
    for value in values:
        x = _LEFT + value * scale
        drawing.add("line", cls="grid", x1=x, x2=x, y1=4.0, y2=bottom)
        drawing.add("text", label(value), cls="tick mid", x=x, y=bottom + 16)
    visible = [(s.end_s - s.begin_s) * scale for spans in rows.values() for s in spans]
    limit = sorted(visible, reverse=True)[_MAX_RECTANGLES] if len(visible) > _MAX_RECTANGLES else 0
    limit = max(limit, 0.12)
    y, hidden, seen_rank = 8.0, 0, -1
    for key in ordered:
        if key[0] != seen_rank and seen_rank >= 0:
            drawing.add("line", cls="rule", x1=0, x2=WIDTH, y1=y - _GAP / 2, y2=y - _GAP / 2)
        if key[0] != seen_rank:
            drawing.add("text", f"rank {key[0]}", cls="row", x=4, y=y + 15)
        seen_rank = key[0]
        lane = key[1] if len(key[1]) <= 14 else key[1][:13] + "…"
        drawing.add("text", lane, cls="tick end", x=_LEFT - 10, y=y + 15)
        drawing.add(
            "rect", cls="track", x=_LEFT, y=y, width=WIDTH - _LEFT - 16, height=heights[key]
        )
        for span, depth in zip(rows[key], depths[key], strict=True):
            if (span.end_s - span.begin_s) * scale < limit:
                hidden += 1
                continue
            _draw_span(drawing, span, names, y + depth * _ROW, (begin_s, end_s, scale))
        y += heights[key] + _GAP
    return drawing.render(), hidden


def _draw_span(
    drawing: Drawing,
    span: LaneSpan,
    names: Sequence[str],
    y: float,
    window: tuple[float, float, float],
) -> None:
    begin_s, end_s, scale = window
    x = _LEFT + (max(span.begin_s, begin_s) - begin_s) * scale
    width = (min(span.end_s, end_s) - max(span.begin_s, begin_s)) * scale
    lines = [
        f"{span.name}: {seconds_text(span.end_s - span.begin_s)}",
        f"rank {span.rank}, lane {span.lane}, at {seconds_text(span.begin_s - begin_s)}",
    ]
    lines += [f"{key} = {str(value)[:80]}" for key, value in list(span.args.items())[:8]]
    drawing.open("g", cls="span", tip="\n".join(lines))
    drawing.add(
        "rect", cls=span_class(span.name, names), x=x, y=y + 1.5,
        width=max(width, 0.6), height=_ROW - 3,
    )  # fmt: skip
    room = int((width - 9) / _LETTER)
    short = span.name.rsplit(".", 1)[-1] if len(span.name) > room else span.name
    if len(short) <= room:
        drawing.add("text", short, cls="inside", x=x + 5, y=y + 15)
    drawing.close()
