"""What a result has to be: metrics with limits, and how far a measurement is from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowtide.core.errors import ConfigError, DataError, UnknownNameError, listed, near
from lowtide.quality.metrics.registry import Scale, resolve

# Of the size, not of the quality: measured with every codec.
SIZES = {"compression_ratio": ">=", "bit_rate": "<="}
_OPERATORS = {"higher": ">=", "lower": "<=", "zero": "<="}
# No array has more.
_MOST = {"ssim": 1.0, "ssim_qcat": 1.0, "pearson_r": 1.0, "cosine_similarity": 1.0}


@dataclass(frozen=True)
class Target:
    """One limit.

    Attributes:
        metric: A quality metric, or one of SIZES.
        op: ">=" or "<=", whichever asks for a better result; the absolute value counts for
            metrics of both signs.
        value: The limit, finite.
    """

    metric: str
    op: str
    value: float

    @property
    def is_size(self) -> bool:
        """Whether it limits the size."""
        return self.metric in SIZES

    def is_met(self, value: float | None) -> bool:
        """Whether a measured value is within the limit; None is not."""
        if value is None or math.isnan(value):
            return False
        if self.op == ">=":
            return value >= self.value
        return abs(value) <= self.value

    def margin(self, value: float | None) -> float:
        """Return how many decades of the error (of the size) are left; negative if not met.

        Infinite where nothing is left to say how far it is, -inf for None.
        """
        if value is None or math.isnan(value):
            return -math.inf
        scale = scale_of(self.metric)
        have, need = _decades(scale, value), _decades(scale, self.value)
        if have == need:
            return 0.0
        return need - have if self.metric == "bit_rate" else have - need

    def __str__(self) -> str:
        return f"{self.metric} {self.op} {self.value:g}"


SIZE = Scale(lambda value: math.log10(value), lambda decades: 10.0**decades)


def scale_of(name: str) -> Scale:
    """Return the scale of a quality metric or of one of SIZES; the latter grow with the size."""
    return SIZE if name in SIZES else resolve(name)[0].scale


def _decades(scale: Scale, value: float) -> float:
    try:
        return scale.decades(value)
    except ValueError:  # the logarithm of what is not positive
        return -math.inf


def targets_of(spec: Any, where: str = "target") -> tuple[Target, ...]:
    """Return targets.

    Args:
        spec: ``{"psnr_db": 60}``, or a list of `Target` and of objects with "metric", "value" and,
            if one wants to say it, "op".
        where: JSON path for errors.

    Raises:
        ConfigError: a metric is unknown, a value cannot be met, an operator asks for a worse
            result, or two targets limit the same metric.
    """
    if isinstance(spec, Mapping) and "metric" not in spec:
        entries: list[Any] = [{"metric": name, "value": value} for name, value in spec.items()]
        paths = [f"{where}.{name}" for name in spec]
    elif isinstance(spec, (Target, Mapping)):
        entries, paths = [spec], [where]
    elif isinstance(spec, Iterable) and not isinstance(spec, str):
        entries = list(spec)
        paths = [f"{where}[{number}]" for number in range(len(entries))]
    else:
        raise ConfigError(f'{where}: got {spec!r}, allowed is an object such as {{"psnr_db": 60}}')
    if not entries:
        raise ConfigError(f'{where}: is empty; name what is to be kept, such as {{"psnr_db": 60}}')
    targets = [_target_of(entry, path) for entry, path in zip(entries, paths, strict=True)]
    seen: dict[str, Target] = {}
    for target, path in zip(targets, paths, strict=True):
        other = seen.setdefault(target.metric, target)
        if other is not target:
            raise ConfigError(
                f"{path}: {target} and {other} contradict each other or say the same; keep one"
            )
    return tuple(targets)


_KEYS = ("metric", "op", "value")


def _target_of(entry: Any, where: str) -> Target:
    if isinstance(entry, Target):
        entry = {"metric": entry.metric, "op": entry.op, "value": entry.value}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: got {entry!r}, allowed is an object with {listed(_KEYS)}")
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(
                f"{where}.{key}: unknown key.{near(key, _KEYS)} Known: {listed(_KEYS)}"
            )
    name, value = entry.get("metric"), entry.get("value")
    op, least = _direction(name, where)
    given = entry.get("op", op)
    if given not in (">=", "<="):
        raise ConfigError(f'{where}.op: got {given!r}, allowed are ">=" and "<="')
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where}.value: got {value!r}, allowed are finite numbers")
    if given != op:
        raise ConfigError(
            f"{where}: {name} {given} {value:g} asks for a worse result; {name} is better the "
            f"{'higher' if op == '>=' else 'lower'} it is, so write {op}"
        )
    if value < least:
        raise ConfigError(
            f"{where}.value: got {value:g} for {name}, allowed are {least:g} and more"
        )
    most = _MOST.get(str(name).partition(":")[0], math.inf)
    if value > most:
        raise ConfigError(f"{where}.value: got {value:g} for {name}, which is {most:g} at most")
    return Target(str(name), op, float(value))


def _direction(name: Any, where: str) -> tuple[str, float]:
    """Return the operator and the least value that make sense."""
    if name in SIZES:
        return SIZES[name], 1e-3
    try:
        metric = resolve(str(name))[0]
    except (UnknownNameError, DataError) as error:
        raise ConfigError(f"{where}: {error}. Also: {listed(SIZES)}") from error
    return _OPERATORS[metric.better], -math.inf if metric.better == "higher" else 0.0
