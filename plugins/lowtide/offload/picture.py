"""Who worked when in one update, simulated or measured, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from lowtide.offload.reference import LANES


class LaneSpan(Protocol):
    """Work on a lane; seconds from the begin of the update."""

    @property
    def lane(self) -> str:
        """Name of the lane."""

    @property
    def begin_s(self) -> float:
        """Begin."""

    @property
    def end_s(self) -> float:
        """End."""


def in_order(lanes: Iterable[str]) -> list[str]:
    """Return lanes in the order that pictures show them: storage behind the others."""
    return sorted(lanes, key=lambda lane: (LANES.index(lane) if lane in LANES else 99, lane))


def lane_rows(
    spans: Iterable[LaneSpan], makespan_s: float, columns: int
) -> dict[str, list[tuple[float, int]]]:
    """Return an update as a picture: for each lane and column, how busy, and with what.

    Args:
        spans: What the lanes did.
        makespan_s: Length of the update.
        columns: Width of the picture; each column is an equal part of the makespan.

    Returns:
        Per lane in use, per column: the busy share of its time, and the number of the span on
        that lane that takes most of it (-1 for none), so that neighbours can be told apart.
    """
    rows: dict[str, list[tuple[float, int]]] = {}
    step_s = makespan_s / max(columns, 1)
    most: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for span in sorted(spans, key=lambda s: s.begin_s):
        row = rows.setdefault(span.lane, [(0.0, -1)] * columns)
        largest = most.setdefault(span.lane, [0.0] * columns)
        number = counts[span.lane] = counts.get(span.lane, -1) + 1
        first = min(int(span.begin_s / step_s), columns - 1)
        for column in range(first, min(math.ceil(span.end_s / step_s), columns)):
            begin_s, end_s = column * step_s, (column + 1) * step_s
            share = max(0.0, min(span.end_s, end_s) - max(span.begin_s, begin_s)) / step_s
            busy, shown = row[column]
            if share > largest[column]:
                largest[column], shown = share, number
            row[column] = (min(1.0, busy + share), shown)
    return rows


def mark(busy: float) -> str:
    """Return the character for a share of busy time."""
    return " " if busy < 0.05 else "░" if busy < 0.35 else "▒" if busy < 0.8 else "█"


def lane_chart(spans: Iterable[LaneSpan], makespan_s: float, columns: int = 64) -> str:
    """Return the picture as lines of text: a lane each, with its share of busy time."""
    known = list(spans)
    if not known or makespan_s <= 0.0:
        return "nothing was updated"
    rows = lane_rows(known, makespan_s, columns)
    lines = []
    for lane in in_order(rows):
        busy_s = sum(span.end_s - span.begin_s for span in known if span.lane == lane)
        drawn = "".join(mark(busy) for busy, _ in rows[lane])
        lines.append(f"{lane:<9}{drawn} {busy_s / makespan_s:4.0%}")
    end = f"{makespan_s * 1e3:.1f} ms"
    return "\n".join([*lines, " " * 9 + "0" + end.rjust(columns - 1)])
