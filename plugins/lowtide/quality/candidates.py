"""What can be chosen: a codec with its options and, where it has one, an error bound."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowtide.core.codec import Codec, get_codec
from lowtide.core.errors import CodecError, ConfigError, UnknownNameError, listed, near
from lowtide.quality.targets import Target

MODES = ("abs", "rel", "pw_rel")
PER_DECADE = 48  # open bounds are 10^(-k/48): neighbours differ by 0.42 dB
_LOOSEST, _TIGHTEST = 14, 7 * PER_DECADE  # k: from half of the range to 1e-7 of it
_COARSE = 12  # k of what predictors are asked for: four in a decade
LOSSLESS = "lowtide.zstd"


@dataclass(frozen=True)
class Candidate:
    """One codec, ready to be built.

    Attributes:
        codec: Registered name.
        options: Its other parameters, JSON types.
        mode: What the bound limits, one of MODES; None for codecs that take no mode.
        bound: Not negative; None for codecs that take none.
    """

    codec: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    bound: float | None = None

    @classmethod
    def of(cls, spec: Candidate | Codec | str | Mapping[str, Any]) -> Candidate:
        """Return the candidate for a codec, its name or its configuration.

        Raises:
            ConfigError, UnknownNameError: no codec can be built from it.
        """
        if isinstance(spec, Candidate):
            return spec
        if isinstance(spec, Codec):
            config = spec.get_config()
        else:
            config = {"id": spec} if isinstance(spec, str) else dict(spec)
            get_codec(config)  # raises for what cannot be built
        mode, bound = config.pop("mode", None), config.pop("bound", None)
        return cls(config.pop("id"), config, mode, bound)

    @functools.cached_property
    def key(self) -> str:
        """The configuration as text: equal for equal candidates."""
        return json.dumps(self.config(), sort_keys=True)

    @property
    def family(self) -> str:
        """The same for all bounds."""
        return replace(self, bound=None).key

    def __hash__(self) -> int:
        return hash(self.key)

    def config(self) -> dict[str, Any]:
        """Return the codec's configuration, as `get_codec` takes it."""
        given = {"mode": self.mode, "bound": self.bound}
        bounded = {name: value for name, value in given.items() if value is not None}
        return {"id": self.codec, **self.options, **bounded}

    def build(self) -> Codec:
        """Return the codec.

        Raises:
            ConfigError, UnknownNameError: it cannot be built.
        """
        return get_codec(self.config())

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        bound = "" if self.bound is None else f" {self.mode or 'bound'} {self.bound:.3g}"
        return f"{self.codec}{options}{bound}"


@dataclass(frozen=True)
class Family:
    """Candidates that differ in their bound only.

    Attributes:
        codec: Registered name.
        options: Other parameters of the codec.
        mode: One of MODES; None for codecs without a bound, which are a family of one.
        bounds: Ascending; None leaves the choice open: 48 bounds in each decade, from half of the
            range down to 1e-7 of it.
    """

    codec: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    bounds: tuple[float, ...] | None = None

    def grid(self, value_range: float) -> list[Candidate]:
        """Return all candidates, tightest first; `value_range` is the unit of open "abs" bounds."""
        return self._candidates(1, value_range)

    def coarse(self, value_range: float) -> list[Candidate]:
        """Return those to be predicted, from which the others are interpolated."""
        return self._candidates(_COARSE, value_range)

    def _candidates(self, every: int, value_range: float) -> list[Candidate]:
        if self.mode is None:
            return [Candidate(self.codec, self.options)]
        bounds = self.bounds
        if bounds is None:
            unit = value_range if self.mode == "abs" and 0 < value_range < math.inf else 1.0
            exponents = range(_TIGHTEST, _LOOSEST - 1, -every)
            bounds = tuple(unit * 10 ** (-k / PER_DECADE) for k in exponents)
        return [Candidate(self.codec, self.options, self.mode, bound) for bound in bounds]


def automatic(targets: Sequence[Target] = ()) -> list[Family]:
    """Return what "auto" stands for: lossless, and `lowtide.sz` with both of its goals.

    Relative to each value where that is limited, else relative to the range.
    """
    is_pointwise = any(target.metric == "max_pw_rel_error" for target in targets)
    mode = "pw_rel" if is_pointwise else "rel"
    return [
        Family(LOSSLESS),
        Family("lowtide.sz", {}, mode),
        Family("lowtide.sz", {"goal": "psnr"}, mode),
    ]


def families_of(
    spec: Any, where: str = "candidates", *, targets: Sequence[Target] = ()
) -> list[Family]:
    """Return the families that a user's candidates are.

    Args:
        spec: "auto", or a list of: codec names, `Family`, `Candidate`, or objects with "codec" (a
            name or a configuration), "mode" and "bounds" (a list, or "auto" for all).
        where: JSON path for errors.
        targets: What "auto" is to meet.

    Raises:
        ConfigError: something is unknown, empty, not positive, or no codec can be built from it.
    """
    if spec == "auto":
        return automatic(targets)
    if isinstance(spec, (str, Mapping)) or not isinstance(spec, Iterable):
        raise ConfigError(f'{where}: got {spec!r}, allowed are "auto" or a list of candidates')
    families = [_family_of(entry, f"{where}[{number}]") for number, entry in enumerate(spec)]
    if not families:
        raise ConfigError(f'{where}: is empty; name at least one codec, or "auto"')
    return families


_KEYS = ("codec", "mode", "bounds")


def _family_of(entry: Any, where: str) -> Family:
    if isinstance(entry, Family):
        family = entry
    elif isinstance(entry, Candidate):
        bounds = None if entry.bound is None else (entry.bound,)
        family = Family(entry.codec, entry.options, entry.mode, bounds)
    elif isinstance(entry, str):
        family = Family(entry)
    elif isinstance(entry, Mapping):
        family = _from_object(entry, where)
    else:
        raise ConfigError(f"{where}: got {entry!r}, allowed are names and objects with {_KEYS}")
    try:
        family.grid(1.0)[0].build()
    except (ConfigError, CodecError, UnknownNameError) as error:
        hint = "" if family.mode is not None else '; a codec with an error bound needs "mode"'
        raise ConfigError(f"{where}: {error}{hint}") from error
    return family


def _from_object(entry: Mapping[str, Any], where: str) -> Family:
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(
                f"{where}.{key}: unknown key.{near(key, _KEYS)} Known: {listed(_KEYS)}"
            )
    codec = entry.get("codec")
    config = {"id": codec} if not isinstance(codec, Mapping) else dict(codec)
    name = config.pop("id", None)
    if not isinstance(name, str):
        raise ConfigError(
            f'{where}.codec: got {codec!r}, allowed are a name and a configuration with "id"'
        )
    mode = entry.get("mode", config.pop("mode", None))
    if mode is not None and mode not in MODES:
        raise ConfigError(
            f"{where}.mode: got {mode!r}, allowed are {listed(MODES)}.{near(str(mode), MODES)}"
        )
    bounds = _bounds_of(entry.get("bounds", config.pop("bound", None)), f"{where}.bounds")
    if bounds is not None and mode is None:
        raise ConfigError(f'{where}.bounds: need "mode", which says what they limit')
    return Family(name, config, mode, bounds)


def _bounds_of(given: Any, where: str) -> tuple[float, ...] | None:
    if given is None or given == "auto":
        return None
    numbers: Sequence[Any] = [given] if isinstance(given, (int, float)) else list(given)
    if not numbers:
        raise ConfigError(f'{where}: is empty; give positive numbers, or "auto"')
    for number in numbers:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not 0 < number < math.inf:
            raise ConfigError(f"{where}: got {number!r}, allowed are positive, finite numbers")
    return tuple(sorted({float(number) for number in numbers}))
