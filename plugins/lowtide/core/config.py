"""The ``"lowtide"`` block of a DeepSpeed JSON: found, validated, explained.

A setting lives with the class that uses it: each plugin owns one `PluginConfig` model, and this
module only assembles them. Errors carry the JSON path, what was found, what is allowed and the
nearest known name. Everything here works on plain JSON values and imports no plugin until the
block asks for it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowtide.core.errors import ConfigError, LowtideError, listed, near, problems_text
from lowtide.core.registry import plugins

BLOCK = "lowtide"
Auto = Literal["auto"]


class PluginConfig(BaseModel):
    """Base of every plugin's settings: unknown keys are errors, types are not coerced.

    Sizes end in ``_bytes``, times in ``_s``; a value that Lowtide should choose is ``"auto"``.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    enabled: bool = True
    """``false`` is the same as leaving the plugin's key out."""

    def check_host(self, host_config: Mapping[str, Any]) -> None:
        """Refuse combinations with the host's own settings.

        Args:
            host_config: The whole DeepSpeed JSON (empty for hosts without one).

        Raises:
            ConfigError: a combination that cannot work; names both keys.
        """

    def ranks_per_batch(self) -> int:
        """Return how many neighbouring ranks read the same batches, as they hold one model."""
        return 1


class TelemetryConfig(BaseModel):
    """What is recorded about a run, and where (see docs/telemetry.md)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    dir: str | None = None
    """Folder for ``rank<R>.jsonl`` and ``trace.rank<R>.json``. Null keeps everything in memory."""

    every_n_steps: int = Field(default=1, ge=1)
    """Write one step record every this many optimizer steps."""

    trace: bool | Auto = "auto"
    """Write a Chrome/Perfetto trace of all lanes. Auto: yes when `dir` is set."""

    trace_spans: int = Field(default=50_000, ge=1)
    """Newest spans kept for the trace; older ones are dropped."""

    flush_interval_s: float = Field(default=2.0, gt=0)
    """Longest time that records wait in memory before they are written."""

    monitor: bool = True
    """Also send scalars to DeepSpeed's monitor (TensorBoard, CSV, W&B) when it is configured."""

    @model_validator(mode="after")
    def _trace_needs_a_folder(self) -> TelemetryConfig:
        if self.trace is True and self.dir is None:
            raise ValueError('"trace": true needs "dir"; set "dir" or drop "trace"')
        return self


class StopConfig(BaseModel):
    """How a run ends when it is asked to, by a signal or by its script (see docs/launch.md)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    signals: tuple[Literal["USR1", "TERM", "INT", "USR2"], ...] = ("USR1", "TERM")
    """Signals that ask for a stop. A second Ctrl-C (INT) ends the process at once."""

    then: Literal["exit", "tell"] = "exit"
    """``exit``: save a checkpoint, write ``stop.json`` and leave with exit code 0. ``tell``: only
    set ``engine.lowtide.stop.requested``; the script saves and leaves by itself."""

    save_dir: str | None = None
    """Folder of the last checkpoint for ``exit``: the one that the script loads from."""

    run_dir: str | None = None
    """Folder of ``stop.json``, unless the launcher names one in ``$LOWTIDE_RUN_DIR``."""

    every_n_steps: int = Field(default=1, ge=1)
    """The ranks agree on a stop every this many optimizer steps."""

    @model_validator(mode="after")
    def _exit_needs_a_folder(self) -> StopConfig:
        if self.then == "exit" and self.save_dir is None:
            raise ValueError(
                '"then": "exit" needs "save_dir", the folder that the script loads from; name it, '
                'or set "then" to "tell" and save where engine.lowtide.stop.requested is true'
            )
        return self


_CORE_MODELS: dict[str, type[BaseModel]] = {"telemetry": TelemetryConfig, "stop": StopConfig}


@dataclass
class Resolved:
    """A validated block: core settings, one config per enabled plugin, and decided ``"auto"``s."""

    telemetry: TelemetryConfig
    plugins: dict[str, PluginConfig]
    host_config: dict[str, Any] | None = None
    stop: StopConfig | None = None
    decisions: dict[str, Any] = field(default_factory=dict)

    def _models(self) -> dict[str, BaseModel]:
        stop = {"stop": self.stop} if self.stop is not None else {}
        return {"telemetry": self.telemetry, **stop, **self.plugins}

    def decide(self, path: str, value: Any) -> None:
        """Record what an ``"auto"`` became; `path` is relative to the block ("telemetry.trace").

        Raises:
            ConfigError: `path` is not a setting of this block.
        """
        top, _, rest = path.partition(".")
        models = self._models()
        known = models[top].model_dump(mode="json") if top in models else {}
        if top not in models or not _has_path(known, rest):
            raise ConfigError(f"{BLOCK}.{path}: not a setting of this run, so no value to decide")
        self.decisions[path] = value

    def as_dict(self) -> dict[str, Any]:
        """Return the block as plain JSON with every default filled in and every auto decided."""
        block = {name: model.model_dump(mode="json") for name, model in self._models().items()}
        for path, value in self.decisions.items():
            *parents, last = path.split(".")
            node = block
            for part in parents:
                node = node[part]
            node[last] = value
        return block


def _has_path(node: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def load_config(source: Any) -> dict[str, Any]:
    """Return a whole DeepSpeed configuration as a dict.

    Args:
        source: Path of a JSON file, a dict, or base64 text of a JSON object (DeepSpeed takes all
            three).

    Raises:
        ConfigError: the file is missing, is not JSON, repeats a key, or holds no object.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"config: got {type(source).__name__}, allowed are the path of a JSON file or a dict"
        )
    path = Path(source)
    if path.is_file():
        return _parse_object(path.read_text(encoding="utf-8"), str(path))
    try:
        text = base64.urlsafe_b64decode(os.fspath(source)).decode("utf-8")
    except (binascii.Error, UnicodeError, ValueError):
        text = ""
    if not text.lstrip().startswith("{"):
        raise ConfigError(_missing_file(path))
    return _parse_object(text, "base64 config")


def _missing_file(path: Path) -> str:
    what = "is a folder" if path.is_dir() else "does not exist"
    siblings = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
    where = "" if path.parent.is_dir() else f" (nor does its folder, seen from {Path.cwd()})"
    hint = near(path.name, siblings)
    return f"config file {path} {what}{where}; give the path of a JSON file.{hint}"


def _parse_object(text: str, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError(f'{where}: key "{key}" stands twice in one object; keep one')
            result[key] = value
        return result

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        parsed = _parse_lenient(text, unique)
        if parsed is None:
            raise ConfigError(
                f"{where}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
                f"check commas, quotes and brackets there"
            ) from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{where}: holds {_json_type(parsed)}, a JSON object is needed")
    return parsed


def _parse_lenient(text: str, unique: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    # DeepSpeed reads its file with hjson (comments, trailing commas): what stock accepts must not
    # start to fail because Lowtide is switched on.
    try:
        import hjson  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        return hjson.loads(text, object_pairs_hook=unique)
    except hjson.HjsonDecodeError:
        return None


def load_block(source: Any) -> dict[str, Any] | None:
    """Return the ``"lowtide"`` block of a DeepSpeed configuration, or None when it has none.

    Raises:
        ConfigError: as `load_config`, or the block is not a JSON object, or a key of the file is
            a misspelt ``"lowtide"``.
    """
    config = load_config(source)
    if BLOCK not in config:
        for key in config:
            if near(key, [BLOCK]):
                raise ConfigError(
                    f'{key}: unknown top-level key. Did you mean "{BLOCK}"? '
                    f"DeepSpeed would silently ignore it"
                )
        return None
    block = config[BLOCK]
    if not isinstance(block, dict):
        raise ConfigError(
            f"{BLOCK}: got {_json_type(block)}, a JSON object is needed; "
            f"{{}} switches telemetry on, leaving the key out switches everything off"
        )
    return block


def resolve(
    block: Mapping[str, Any],
    *,
    host_config: Mapping[str, Any] | None = None,
    host: str = "deepspeed",
) -> Resolved:
    """Validate a block: core keys and every enabled plugin's keys.

    Args:
        block: The value of ``"lowtide"``.
        host_config: The whole JSON that the block is in.
        host: Who reads it. Only DeepSpeed reads more than the block, so only there are the two
            checked against each other.

    Raises:
        ConfigError: anything unknown, of a wrong type, out of range or contradictory. One line,
            all problems of the block in it.
    """
    problems: list[str] = []
    models: dict[str, Any] = {}
    for key, value in block.items():
        try:
            models[key] = _resolve_key(key, value)
        except ConfigError as error:
            problems.append(str(error))
    if not problems:
        for model in models.values():
            if isinstance(model, PluginConfig):
                try:
                    model.check_host((host_config or {}) if host == "deepspeed" else {})
                except ConfigError as error:
                    problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    telemetry = models.pop("telemetry", None) or TelemetryConfig()
    stop = models.pop("stop", None)
    active = {name: model for name, model in models.items() if model is not None}
    whole = dict(host_config) if host_config else None
    resolved = Resolved(telemetry, active, whole, stop)
    if telemetry.trace == "auto":
        resolved.decide("telemetry.trace", telemetry.dir is not None)
    return resolved


def ranks_per_batch(host_config: Mapping[str, Any]) -> int:
    """Return how many neighbouring ranks read the same batches, for who hands out data.

    Can be asked before there is a session, while the host's own settings may still be open.

    Args:
        host_config: The whole JSON, with a block.

    Raises:
        ConfigError: as `resolve`, for the block by itself, and for what the host's settings
            say against the plugin that spreads the model.
    """
    result = 1
    for config in resolve(host_config[BLOCK], host="").plugins.values():
        if config.ranks_per_batch() > 1:
            config.check_host(host_config)
            result *= config.ranks_per_batch()
    return result


def _resolve_key(key: str, value: Any) -> Any:
    path = f"{BLOCK}.{key}"
    known = [*_CORE_MODELS, *plugins.names()]
    if key not in known:
        raise ConfigError(f"{path}: unknown key.{near(key, known)} Known: {listed(known)}")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: got {_json_type(value)}, a JSON object is needed, e.g. {{}}")
    if value.get("enabled") is False and key not in _CORE_MODELS:
        return None
    return _validated(_CORE_MODELS.get(key) or plugin_config_class(key), value, path)


def plugin_config_class(name: str) -> type[PluginConfig]:
    """Return the settings class of plugin `name`.

    Raises:
        LowtideError: the plugin's class carries no `Config` derived from `PluginConfig`.
    """
    config_class = getattr(plugins.get(name), "Config", None)
    if not (isinstance(config_class, type) and issubclass(config_class, PluginConfig)):
        raise LowtideError(
            f'plugin "{name}": its class has no attribute Config derived from PluginConfig'
        )
    return config_class


def _validated(model: type[BaseModel], value: dict[str, Any], path: str) -> BaseModel:
    try:
        # Through JSON text: strict JSON rules (no "1" for 1, lists may become tuples) apply
        # equally to a file and to a dict built in Python.
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: holds a value that JSON cannot express: {error}") from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(problems_text(model, error.errors(), path)) from None


def _json_type(value: Any) -> str:
    names: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true/false"), (dict, "an object"), (list, "an array"),
        (str, f"text {value!r}"), ((int, float), f"number {value}"),
    ]  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "null")


def all_models() -> dict[str, type[BaseModel]]:
    """Return every model of the block by its key: core's own, then the plugins'."""
    return _CORE_MODELS | {name: plugin_config_class(name) for name in plugins.names()}
