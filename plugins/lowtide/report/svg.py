"""Small pieces that the charts are drawn from: elements, scales, axes, hover columns.

Written by hand instead of by a plotting library so that colours follow the page's theme (CSS
classes, never colours in the file), text stays text and every mark can carry a tooltip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lowtide.report.text import escape, number

WIDTH = 1040.0
Formatter = Callable[[float], str]


def _attribute(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return escape(value)


class Drawing:
    """An SVG image under construction; every piece of text is escaped on the way in.

    Args:
        height: Height in the units of `width`; the page scales the image to its column.
        label: What the image shows, for people who cannot see it.
    """

    def __init__(self, height: float, *, label: str, width: float = WIDTH) -> None:
        self.width = width
        self.height = height
        self._label = label
        self._parts: list[str] = []
        self._open: list[str] = []

    def add(self, tag: str, text: str | None = None, **attributes: object) -> None:
        """Add an element. Attribute names: ``cls`` is class, ``_`` becomes ``-``."""
        self._parts.append(f"<{tag}{self._attributes(attributes)}")
        self._parts.append("/>" if text is None else f">{escape(text)}</{tag}>")

    def open(self, tag: str, *, tip: str | None = None, **attributes: object) -> None:
        """Open a group-like element; `tip` becomes its tooltip."""
        self._parts.append(f"<{tag}{self._attributes(attributes)}>")
        self._open.append(tag)
        if tip is not None:
            self.add("title", tip)

    def close(self) -> None:
        """Close the element opened last."""
        self._parts.append(f"</{self._open.pop()}>")

    @staticmethod
    def _attributes(attributes: dict[str, object]) -> str:
        pairs = (
            ("class" if name == "cls" else name.replace("_", "-"), value)
            for name, value in attributes.items()
        )
        return "".join(f' {name}="{_attribute(value)}"' for name, value in pairs)

    def render(self) -> str:
        """Return the image as one ``<svg>`` element."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {_attribute(self.width)} {_attribute(self.height)}" '
            f'aria-label="{escape(self._label)}">'
        )
        return head + "".join(self._parts) + "</svg>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The plotting area of a chart and the data range it stands for."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Return the horizontal position of a data value."""
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Return the vertical position of a data value, held inside the area."""
        low, high = self.y_range
        share = (value - low) / (high - low)
        return self.top + self.height * (1.0 - min(1.0, max(0.0, share)))

    @property
    def right(self) -> float:
        """Right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.top + self.height


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """Return a range a little wider than `low` to `high`, never empty."""
    if not low < high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, low + margin
    margin = (high - low) * share
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 6, *, whole: bool = False) -> list[float]:
    """Return about `count` round values inside the range; `whole` allows integers only."""
    rough = (high - low) / max(1, count)
    if rough <= 0 or not math.isfinite(rough):
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1.0, 2.0, 2.5, 5.0, 10.0) if power * k >= rough * 0.75)
    if whole:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> Formatter:
    """Return a formatter with just enough decimals to tell neighbouring ticks apart."""
    gap = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    top = max((abs(value) for value in values), default=0.0)
    if top >= 1e6 or (0 < top < 1e-3):
        return lambda value: number(value, 3)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    if any(abs(round(v, decimals) - v) > gap / 100 for v in values):
        decimals += 1
    return lambda value: f"{value:,.{decimals}f}".replace("-", "−")


def seconds_labels(values: Sequence[float]) -> Formatter:
    """Return a formatter that writes all ticks of a time axis in one unit."""
    top = max((abs(value) for value in values), default=0.0)
    scale, unit = (1e6, "µs") if top < 1e-3 else (1e3, "ms") if top < 1.0 else (1.0, "s")
    label = tick_labels([value * scale for value in values])
    return lambda value: f"{label(value * scale)} {unit}"


def draw_axes(
    drawing: Drawing,
    frame: Frame,
    *,
    x_label: str,
    y_label: str,
    y_labels: Callable[[Sequence[float]], Formatter] = tick_labels,
    x_ticks: int = 10,
    y_ticks: int = 5,
) -> None:
    """Draw grid lines, tick labels and the names of both axes."""
    y_values = ticks(*frame.y_range, y_ticks)
    x_values = ticks(*frame.x_range, x_ticks, whole=True) if x_ticks else []
    label = y_labels(y_values)
    for value in y_values:
        y = frame.y(value)
        drawing.add("line", cls="grid", x1=frame.left, x2=frame.right, y1=y, y2=y)
        drawing.add("text", label(value), cls="tick end", x=frame.left - 8, y=y + 4)
    for value in x_values:
        x = frame.x(value)
        drawing.add("line", cls="axis", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 5)
        drawing.add("text", f"{value:,.0f}", cls="tick mid", x=x, y=frame.bottom + 19)
    drawing.add("line", cls="axis", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom)
    drawing.add("text", y_label, cls="name", x=frame.left - 8, y=frame.top - 14)
    drawing.add("text", x_label, cls="name end", x=frame.right, y=frame.bottom + 38)


def path_data(points: Iterable[tuple[float, float] | None]) -> str:
    """Return the ``d`` of a line through `points`; None lifts the pen."""
    parts: list[str] = []
    pen = "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        parts.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return "".join(parts)


def hover_columns(
    drawing: Drawing, frame: Frame, columns: Sequence[tuple[float, str]], *, limit: int = 120
) -> None:
    """Lay invisible columns with tooltips over a chart; a line marks the one under the pointer.

    Args:
        drawing: Where to draw.
        frame: The chart's plotting area.
        columns: Data x and tooltip, in ascending order.
        limit: At most about so many columns are drawn, evenly thinned.
    """
    stride = max(1, math.ceil(len(columns) / limit))
    chosen = list(columns[::stride])
    if columns and chosen[-1] != columns[-1]:
        chosen.append(columns[-1])
    centres = [frame.x(value) for value, _ in chosen]
    for index, (x, (_, tip)) in enumerate(zip(centres, chosen, strict=True)):
        left = (centres[index - 1] + x) / 2 if index else frame.left
        right = (centres[index + 1] + x) / 2 if index + 1 < len(centres) else frame.right
        drawing.open("g", cls="hit", tip=tip)
        drawing.add("rect", x=left, y=frame.top, width=max(right - left, 0.5), height=frame.height)
        drawing.add("line", x1=x, x2=x, y1=frame.top, y2=frame.bottom)
        drawing.close()


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are at least `gap` away, inside low..high.

    The order of `positions` is kept; where they do not all fit, the gap shrinks.
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(1, len(positions) - 1)) if len(positions) > 1 else gap
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    floor = low
    for index in order:
        moved[index] = max(positions[index], floor)
        floor = moved[index] + gap
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
