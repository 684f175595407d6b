"""Typed errors of Lowtide.

Every message says where the problem is (JSON path, file, tensor), what was found, what is allowed
and what to do next. `ConfigError` and `UnknownNameError` also derive from the built-in class a
caller would expect, so existing ``except ValueError`` blocks keep working.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any


class LowtideError(Exception):
    """Base of every error that Lowtide raises on purpose."""

    def __str__(self) -> str:
        # KeyError.__str__ shows repr(message): one class tree, one way to print.
        return str(self.args[0]) if self.args else type(self).__name__


class ConfigError(LowtideError, ValueError):
    """The ``"lowtide"`` block, or the file that holds it, cannot be used."""


class UnknownNameError(LowtideError, KeyError):
    """A plugin, codec or other registered name does not exist."""


class NativeUnavailableError(LowtideError, RuntimeError):
    """Native code was required but is not built or cannot be loaded."""


class HostError(LowtideError, RuntimeError):
    """The host (DeepSpeed, Megatron-core) is missing or its inner interface has moved."""


class PluginError(LowtideError, RuntimeError):
    """A plugin's listener failed; the message names plugin and event, the cause is chained."""


class DeviceError(LowtideError, RuntimeError):
    """A device cannot be opened or refuses an operation."""


class DeviceOutOfMemoryError(DeviceError):
    """A device's memory cannot hold a requested allocation."""


class StorageError(LowtideError, RuntimeError):
    """Optimizer state cannot be written to, or read back from, a path."""


class StaleStateError(LowtideError, RuntimeError):
    """A piece of optimizer state was about to be read where it is not the newest copy."""


class SavedTensorError(LowtideError, RuntimeError):
    """A tensor that autograd saved was changed in place before the backward pass read it."""


class OptimizerError(LowtideError, ValueError):
    """An optimizer update cannot take a tensor or a setting."""


class ModelError(LowtideError, ValueError):
    """A model cannot be converted or sharded the way it was asked for."""


class DataError(LowtideError, ValueError):
    """Data that a computation is asked to work on has a shape, type or value it cannot take."""


class SandboxError(LowtideError, RuntimeError):
    """Code under test cannot be kept apart as it must be."""


class EndpointError(LowtideError, RuntimeError):
    """A model behind a URL cannot be reached, refuses, or answers what cannot be used."""


class EndpointTimeoutError(EndpointError):
    """A model behind a URL did not answer in time."""


class UncorrectedFaultError(LowtideError, ArithmeticError):
    """A silent error of the hardware was found in a result and could not be put right."""


class CodecError(LowtideError, ValueError):
    """A codec cannot take an input, an output buffer or a parameter."""


class CorruptStreamError(LowtideError, ValueError):
    """An encoded stream is damaged, truncated or of an unknown format version."""


class BoundViolationError(LowtideError, ArithmeticError):
    """A decoded value is outside the error bound that its codec promised."""


class CheckpointError(LowtideError, RuntimeError):
    """A checkpoint, or the record of how a run ended, is missing, incomplete or damaged."""


class LaunchError(LowtideError, RuntimeError):
    """A job cannot be started or started again the way it was asked for."""


class StaleLockError(LowtideError, RuntimeError):
    """A lock left by a killed extension build would make the host wait for ever."""


class TelemetryError(LowtideError, RuntimeError):
    """Telemetry cannot be written or read."""


def near(name: str, names: Iterable[str]) -> str:
    """Return ``' Did you mean "x"?'`` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return f' Did you mean "{matches[0]}"?' if matches else ""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Return known names as text for an error message, at most `limit` of them."""
    ordered = sorted(names)
    shown = ", ".join(f'"{name}"' for name in ordered[:limit])
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return f"{shown}{more}" if ordered else "none"


_SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)}
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "m": 60.0, "h": 3600.0}


def problems_text(model: Any, problems: Iterable[Mapping[str, Any]], path: str) -> str:
    """Return validation problems as one line: JSON path, found, allowed, what to do.

    Args:
        model: The pydantic model class that was validated.
        problems: ``ValidationError.errors()``.
        path: JSON path of the object that was validated.
    """
    texts: list[str] = []
    allowed: dict[tuple[str, str], list[str]] = {}  # (where, found) -> what each branch allows
    for problem in problems:
        location = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            parent = ".".join([path, *location[:-1]])
            names = _field_names(model, location[:-1])
            texts.append(
                f"{parent}.{location[-1]}: unknown key.{near(location[-1], names)} "
                f"Known: {listed(names)}"
            )
            continue
        # A union reports one problem per branch, with the branch's type name as last location.
        while len(location) > 1 and not _is_field(model, location):
            location.pop()
        where = ".".join([path, *location])
        if problem["type"] == "value_error":
            texts.append(f"{where}: {str(problem['msg']).removeprefix('Value error, ')}")
        elif problem["type"] == "missing":
            texts.append(f"{where}: missing; it has no default, so give it a value")
        else:
            found = json.dumps(problem.get("input")) + _unit_hint(location[-1:], problem["input"])
            wanted = str(problem["msg"]).removeprefix("Input should be ")
            if problem["type"] == "too_short":
                wanted = f"{problem['ctx']['min_length']} or more"
            allowed.setdefault((where, found), []).append(wanted)
    texts += [f"{w}: got {f}, allowed is {' or '.join(a)}" for (w, f), a in allowed.items()]
    return "; ".join(texts)


def _unit_hint(last: list[str], found: Any) -> str:
    if not last:
        return ""
    if isinstance(found, float) and found.is_integer() and last[0].endswith("_bytes"):
        return f" (sizes are whole bytes: write {found:.0f})"
    if not isinstance(found, str):
        return ""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", found)
    if match is None:
        return ""
    number, unit = float(match[1]), match[2].lower()
    if last[0].endswith("_bytes"):
        size_unit = unit.removesuffix("b") if unit not in ("", "b") else ""
        if size_unit in _SIZE_UNITS:
            return f" (sizes are whole bytes: write {int(number * _SIZE_UNITS[size_unit])})"
    if last[0].endswith("_s") and unit in _TIME_UNITS:
        return f" (times are seconds: write {number * _TIME_UNITS[unit]:g})"
    return ""


def _submodel(model: Any, name: str) -> Any:
    """Return the model behind a field, looking through unions and lists, or None."""
    fields = getattr(model, "model_fields", {})
    if name not in fields:
        return None
    pending = [fields[name].annotation]
    while pending:
        candidate = pending.pop()
        if hasattr(candidate, "model_fields"):
            return candidate
        pending.extend(getattr(candidate, "__args__", ()))
    return None


def _descend(model: Any, location: list[str]) -> Any:
    for part in location:
        model = model if part.isdigit() else _submodel(model, part)
    return model


def _field_names(model: Any, location: list[str]) -> list[str]:
    return list(getattr(_descend(model, location), "model_fields", {}))


def _is_field(model: Any, location: list[str]) -> bool:
    if location[-1].isdigit():
        return True
    return location[-1] in _field_names(model, location[:-1])
