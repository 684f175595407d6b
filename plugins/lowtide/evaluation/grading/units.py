"""Units of measurement: enough to compare a number with a unit to another one.

SI base and derived units with SI prefixes, products and powers ("kg m^2 s-2", "J/(kg K)"). Only
units that are multiples of SI ones: degrees Celsius have another zero and are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowtide.core.errors import DataError, near

_PREFIXES = {
    "": 1.0, "q": 1e-30, "r": 1e-27, "y": 1e-24, "z": 1e-21, "a": 1e-18, "f": 1e-15, "p": 1e-12,
    "n": 1e-9, "u": 1e-6, "µ": 1e-6, "μ": 1e-6, "m": 1e-3, "c": 1e-2, "d": 1e-1, "da": 1e1,
    "h": 1e2, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21, "Y": 1e24,
    "R": 1e27, "Q": 1e30,
}  # fmt: skip
# Exponents of m, kg, s, A, K, mol, cd.
_PREFIXED: dict[str, tuple[float, tuple[int, ...]]] = {
    "m": (1, (1, 0, 0, 0, 0, 0, 0)), "g": (1e-3, (0, 1, 0, 0, 0, 0, 0)),
    "s": (1, (0, 0, 1, 0, 0, 0, 0)), "A": (1, (0, 0, 0, 1, 0, 0, 0)),
    "K": (1, (0, 0, 0, 0, 1, 0, 0)), "mol": (1, (0, 0, 0, 0, 0, 1, 0)),
    "cd": (1, (0, 0, 0, 0, 0, 0, 1)), "Hz": (1, (0, 0, -1, 0, 0, 0, 0)),
    "N": (1, (1, 1, -2, 0, 0, 0, 0)), "Pa": (1, (-1, 1, -2, 0, 0, 0, 0)),
    "J": (1, (2, 1, -2, 0, 0, 0, 0)), "W": (1, (2, 1, -3, 0, 0, 0, 0)),
    "C": (1, (0, 0, 1, 1, 0, 0, 0)), "V": (1, (2, 1, -3, -1, 0, 0, 0)),
    "F": (1, (-2, -1, 4, 2, 0, 0, 0)), "ohm": (1, (2, 1, -3, -2, 0, 0, 0)),
    "Ω": (1, (2, 1, -3, -2, 0, 0, 0)), "S": (1, (-2, -1, 3, 2, 0, 0, 0)),
    "Wb": (1, (2, 1, -2, -1, 0, 0, 0)), "T": (1, (0, 1, -2, -1, 0, 0, 0)),
    "H": (1, (2, 1, -2, -2, 0, 0, 0)), "L": (1e-3, (3, 0, 0, 0, 0, 0, 0)),
    "l": (1e-3, (3, 0, 0, 0, 0, 0, 0)), "eV": (1.602176634e-19, (2, 1, -2, 0, 0, 0, 0)),
    "bar": (1e5, (-1, 1, -2, 0, 0, 0, 0)), "M": (1e3, (-3, 0, 0, 0, 0, 1, 0)),
}  # fmt: skip
_ALONE: dict[str, tuple[float, tuple[int, ...]]] = {
    "min": (60, (0, 0, 1, 0, 0, 0, 0)), "h": (3600, (0, 0, 1, 0, 0, 0, 0)),
    "day": (86400, (0, 0, 1, 0, 0, 0, 0)), "t": (1e3, (0, 1, 0, 0, 0, 0, 0)),
    "Å": (1e-10, (1, 0, 0, 0, 0, 0, 0)), "angstrom": (1e-10, (1, 0, 0, 0, 0, 0, 0)),
    "atm": (101325, (-1, 1, -2, 0, 0, 0, 0)), "torr": (101325 / 760, (-1, 1, -2, 0, 0, 0, 0)),
    "au": (149597870700, (1, 0, 0, 0, 0, 0, 0)), "%": (1e-2, (0,) * 7), "rad": (1, (0,) * 7),
    "deg": (0.017453292519943295, (0,) * 7), "1": (1, (0,) * 7),
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_TOKEN = re.compile(r"\s*(?:(?P<name>[^\W\d_]+|%|1(?![\d.]))(?:(?:\^|\*\*)?(?P<power>-?\d+))?"
                    r"|(?P<sign>[*·./()]))")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """A multiple of a product of SI base units; exponents of m, kg, s, A, K, mol, cd."""

    factor: float
    exponents: tuple[int, ...]

    def to(self, other: Unit) -> float | None:
        """Return what a number in this unit is multiplied by, or None where the two do not fit."""
        return self.factor / other.factor if self.exponents == other.exponents else None


def _product(one: Unit, other: Unit, power: int) -> Unit:
    exponents = (a + power * b for a, b in zip(one.exponents, other.exponents, strict=True))
    return Unit(one.factor * other.factor**power, tuple(exponents))


_NONE = Unit(1.0, (0,) * 7)


def parse_unit(text: str) -> Unit:
    """Return the unit that `text` names, such as "km", "kg m^2/s^2" or "J mol-1".

    A slash divides by the one unit, or the parenthesis, after it.

    Raises:
        DataError: not a unit that is known here.
    """
    spelled = text.translate(_SUPERSCRIPTS)
    stack: list[tuple[Unit, int]] = []  # open parentheses: what stands before, and its power
    unit, power, at = _NONE, 1, 0
    while at < len(spelled.rstrip()):
        match = _TOKEN.match(spelled, at)
        if match is None:
            raise DataError(f'unit "{text}": cannot be read at "{spelled[at:].strip()}"')
        at = match.end()
        sign = match["sign"]
        if sign == "/":
            power = -1
        elif sign == "(":
            stack.append((unit, power))
            unit, power = _NONE, 1
        elif sign == ")":
            if not stack:
                raise DataError(f'unit "{text}": a parenthesis closes that was not opened')
            before, outer = stack.pop()
            unit, power = _product(before, unit, outer), 1
        elif sign is None:
            exponent = int(match["power"] or 1)
            if abs(exponent) > 12:
                raise DataError(f'unit "{text}": power {exponent}, allowed is -12 to 12')
            unit, power = _product(unit, _named(match["name"], text), power * exponent), 1
    if stack:
        raise DataError(f'unit "{text}": a parenthesis is not closed')
    return unit


def _named(name: str, text: str) -> Unit:
    if name in _ALONE:
        return Unit(*_ALONE[name])
    if name in _PREFIXED:
        return Unit(*_PREFIXED[name])
    for length in (1, 2):
        prefix, rest = name[:length], name[length:]
        if prefix in _PREFIXES and rest in _PREFIXED:
            factor, exponents = _PREFIXED[rest]
            return Unit(_PREFIXES[prefix] * factor, exponents)
    known = [*_ALONE, *_PREFIXED]
    raise DataError(f'unit "{text}": "{name}" is not known.{near(name, known)}')
