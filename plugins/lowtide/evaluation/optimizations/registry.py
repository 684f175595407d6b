"""All optimizations by name, and how a stack spells them with their parameters."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lowtide.core.errors import ConfigError, listed, near
from lowtide.core.registry import Registry
from lowtide.evaluation.optimizations.base import Optimization

_HOME = "lowtide.evaluation.optimizations"
_TARGETS = {
    "prune.magnitude": "pruning.masks:Magnitude",
    "prune.random": "pruning.masks:RandomMask",
    "prune.wanda": "pruning.masks:Wanda",
    "prune.ria": "pruning.masks:Ria",
    "prune.sparsegpt": "pruning.sparsegpt:SparseGpt",
    "prune.heads": "pruning.structured:Heads",
    "prune.ffn": "pruning.structured:Ffn",
    "prune.depth": "pruning.structured:Depth",
    "quant.rtn": "quantization.methods:Rtn",
    "quant.nf4": "quantization.methods:Nf4",
    "quant.gptq": "quantization.methods:Gptq",
    "quant.awq": "quantization.methods:Awq",
    "quant.w8a8": "quantization.methods:W8A8",
    "quant.smoothquant": "quantization.methods:SmoothQuant",
    "kv.random": "cache.policies:Random",
    "kv.streaming": "cache.policies:Streaming",
    "kv.h2o": "cache.policies:HeavyHitters",
    "kv.snapkv": "cache.policies:SnapKv",
    "kv.tova": "cache.policies:Tova",
    "kv.knorm": "cache.policies:KeyNorm",
    "kv.expected": "cache.policies:Expected",
    "kv.int8": "cache.quantised:CacheInt8",
    "kv.int4": "cache.quantised:CacheInt4",
    "prefill.lazy": "prompt.skipping:TokenSkipping",
    "prompt.bm25": "prompt.compressors:Bm25",
    "prompt.surprise": "prompt.compressors:Surprise",
}

optimizations: Registry[Optimization] = Registry(
    "optimization", "lowtide.optimizations", base=Optimization
)
for _name, _target in _TARGETS.items():
    optimizations.register(_name, f"{_HOME}.{_target}")

_READERS: dict[str, Any] = {"int": int, "float": float, "str": str}


def parse(text: str) -> Optimization:
    """Return the optimization that `text` spells, as "quant.gptq:4,g128" or "kv.tova:0.5".

    Behind the colon stand, between commas: the parameters that need no name, in order;
    ``letter + value``; ``name=value``; or the name of a switch.

    Raises:
        UnknownNameError: There is no such optimization.
        ConfigError: A parameter is unknown, missing, given twice or of no allowed value.
    """
    name, _, arguments = text.strip().partition(":")
    kind = optimizations.get(name)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    unnamed = list(kind.positional)
    for word in (part.strip() for part in arguments.split(",") if part.strip()):
        key, value = _key_and_value(word, kind, unnamed)
        if key not in fields:
            raise ConfigError(
                f'optimization "{text}": unknown parameter "{key}".{near(key, fields)} '
                f"{name} takes {listed(fields)}"
            )
        if key in given:
            raise ConfigError(f'optimization "{text}": parameter "{key}" is given twice')
        given[key] = _value(text, key, value, str(fields[key].type))
    missing = [
        key
        for key, each in fields.items()
        if key not in given and each.default is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f'optimization "{text}": {listed(missing)} missing; write "{name}:'
            f'{",".join(f"<{key}>" for key in kind.positional)}"'
        )
    return kind(**given)


def _key_and_value(
    word: str, kind: type[Optimization], unnamed: list[str]
) -> tuple[str, str | None]:
    if "=" in word:
        key, _, value = word.partition("=")
        return key.strip(), value.strip()
    match = re.fullmatch(r"([a-z])(\d+)", word)
    if match and match[1] in kind.letters:
        return kind.letters[match[1]], match[2]
    if word.isidentifier():
        return word, None
    return (unnamed.pop(0), word) if unnamed else (word, word)


def _value(text: str, key: str, value: str | None, kind: str) -> Any:
    if kind == "bool":
        if value in (None, "true", "false"):
            return value != "false"
    elif value is not None:
        try:
            return _READERS[kind](value)
        except ValueError:
            pass
    wanted = "a switch: write its name alone" if kind == "bool" else f"of type {kind}"
    found = "nothing" if value is None else repr(value)
    raise ConfigError(f'optimization "{text}": parameter "{key}" is {found}; it is {wanted}')
