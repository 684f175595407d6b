"""Answers that are numbers: found in text, brought to one unit, compared with a tolerance."""

from __future__ import annotations

import math
import re
from typing import Literal

from lowtide.core.errors import DataError
from lowtide.evaluation.grading.units import Unit, parse_unit

NanPolicy = Literal["wrong", "equal"]
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺−", "0123456789-+-")
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+−]?)\s?"
    r"(?:(?P<word>inf(?:inity)?|nan)\b"
    r"|(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:[eE](?P<e>[-+]?\d+)|\s?[×x*·]\s?10(?:(?:\^|\*\*)\s?[{(]?(?P<ten>[-+−]?\d+)[})]?"
    r"|(?P<raised>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)))?)",
    re.IGNORECASE,
)
_AFTER = 40  # characters after a number in which its unit is looked for
_UNIT_WORDS = 3  # "kg m^-3" has two


def numbers_in(text: str) -> list[tuple[float, str]]:
    """Return numbers in `text`, in order, each with what stands after it, which may be its unit.

    Thousands may be grouped by commas; powers of ten as 1e-3, 1 x 10^-3 or 1·10⁻³.
    """
    found = []
    for match in _NUMBER.finditer(text):
        minus = match["sign"] in ("-", "−")
        if match["word"]:
            value = math.nan if match["word"].lower() == "nan" else math.inf
        else:
            power = match["e"] or match["ten"] or match["raised"] or "0"
            digits = match["digits"].replace(",", "")
            value = _power_of_ten(digits, power.translate(_SUPERSCRIPTS))
        found.append((-value if minus else value, text[match.end() : match.end() + _AFTER]))
    return found


def _power_of_ten(digits: str, power: str) -> float:
    if len(power) > 6:  # beyond every float; a text of a million digits is not worth converting
        return 0.0 if power.startswith("-") or not float(digits) else math.inf
    return float(f"{digits}e{power}")


def close(
    found: float,
    wanted: float,
    *,
    rtol: float,
    atol: float,
    nan: NanPolicy = "wrong",
) -> bool:
    """Tell whether abs(found - wanted) <= atol + rtol * abs(wanted).

    Infinity is close to itself alone. NaN is close to nothing, or with ``nan="equal"`` to NaN.

    Raises:
        DataError: a negative tolerance, or one that is not finite.
    """
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf):
        raise DataError(f"rtol, atol: got {rtol}, {atol}, allowed are finite numbers of 0 or more")
    if math.isnan(found) or math.isnan(wanted):
        return nan == "equal" and math.isnan(found) and math.isnan(wanted)
    if math.isinf(found) or math.isinf(wanted):
        return found == wanted
    return abs(found - wanted) <= atol + rtol * abs(wanted)


def numeric_answer(text: str, *, unit: str | None = None) -> float | None:
    """Return the last number in `text`, in `unit` where one is wanted, or None.

    A number whose unit is of another kind (metres where seconds are wanted) is no answer, and
    neither is one without a unit.
    """
    numbers = numbers_in(text)
    if unit is None:
        return numbers[-1][0] if numbers else None
    wanted = parse_unit(unit)
    for value, after in reversed(numbers):
        factor = _factor(after, wanted)
        if factor is not None:
            return value * factor
    return None


def _factor(after: str, wanted: Unit) -> float | None:
    """Return what turns a number before `after` into one in `wanted`; the longest unit counts."""
    words = after.split("\n")[0].split()[:_UNIT_WORDS]
    for length in range(len(words), 0, -1):
        try:
            unit = parse_unit(" ".join(words[:length]).rstrip(".,;:!?"))
        except DataError:  # words of the sentence
            continue
        return unit.to(wanted)
    return Unit(1.0, (0,) * 7).to(wanted)


def numeric_match(
    output: str,
    wanted: float,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    unit: str | None = None,
    nan: NanPolicy = "wrong",
) -> bool:
    """Tell whether the last number of `output` is `wanted`.

    Args:
        output: What the model said.
        wanted: The right number, in `unit`.
        rtol: Tolerance relative to `wanted`.
        atol: Absolute tolerance, in `unit`.
        unit: Unit of `wanted`; numbers in multiples of it are converted.
        nan: What NaN is worth.

    Raises:
        DataError: a tolerance or a unit that cannot be.
    """
    found = numeric_answer(output, unit=unit)
    if found is None:
        return False
    return close(found, wanted, rtol=rtol, atol=atol, nan=nan)
