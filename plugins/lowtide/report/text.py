"""Numbers, durations and sizes as people read them."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from html import escape as _escape

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def escape(value: object) -> str:
    """Return text that is safe inside HTML and SVG, also in attributes."""
    return _escape(str(value), quote=True)


def number(value: float | None, digits: int = 4) -> str:
    """Return `value` with `digits` significant digits and thousands separators."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    # Of the rounded value: 9.999 takes as many decimals as 10.
    magnitude = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if magnitude >= 9 or magnitude < -3:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = max(0, digits - 1 - magnitude)
    text = f"{value:,.{decimals}f}"
    if "." in text and math.isclose(value, round(value), rel_tol=1e-9):
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def bytes_text(value: float | None) -> str:
    """Return a size in binary units: ``1.50 GiB``."""
    if value is None or not math.isfinite(value):
        return "–"
    power = 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value /= 1024
        power += 1
    return f"{value:.0f} B" if power == 0 else f"{number(value, 3)} {_BINARY[power]}"


def seconds_text(value: float | None) -> str:
    """Return a duration in the unit that suits it: ``812 µs``, ``41.2 ms``, ``3 min 20 s``."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 0:
        return f"−{seconds_text(-value)}"
    if value == 0:
        return "0 s"
    if value < 0.9995e-3:
        return f"{number(value * 1e6, 3)} µs"
    if value < 0.9995:
        return f"{number(value * 1e3, 3)} ms"
    if value < 99.95:
        return f"{number(value, 3)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min {seconds:02d} s"
    days, hours = divmod(hours, 24)
    return f"{hours} h {minutes:02d} min" if days == 0 else f"{days} d {hours} h"


def quantity(name: str, value: float | None) -> str:
    """Return a metric's value in the unit that its name ends in (``_bytes``, ``_s``, ...)."""
    unit = name.rsplit("/", 1)[-1].lower()
    if unit.endswith("_bytes_per_s"):
        return f"{bytes_text(value)}/s"
    if unit.endswith("_bytes"):
        return bytes_text(value)
    if unit.endswith("_per_s"):
        return f"{number(value)}/s"
    if unit.endswith("_s"):
        return seconds_text(value)
    return number(value)


def date_text(unix_s: float) -> str:
    """Return a moment in UTC: ``2025-01-31 14:05 UTC``."""
    try:
        moment = datetime.fromtimestamp(unix_s, tz=timezone.utc)
    except (ValueError, OverflowError, OSError):
        return "–"
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def plural(count: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
