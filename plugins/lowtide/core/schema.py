"""The ``"lowtide"`` block as a JSON Schema and as a table of keys, from the models themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lowtide.core.config import BLOCK, all_models


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """One setting, as `lowtide schema` and the docs list it."""

    path: str
    type: str
    default: str
    description: str


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a DeepSpeed file's ``"lowtide"`` block.

    Keys beside the block are DeepSpeed's own and are left unchecked.
    """
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    for key, model in all_models().items():
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        properties[key] = schema
    block = {"type": "object", "additionalProperties": False, "properties": properties}
    result: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DeepSpeed configuration with a lowtide block",
        "type": "object",
        "properties": {BLOCK: block},
    }
    if definitions:
        result["$defs"] = definitions
    return result


def key_table() -> list[KeyRow]:
    """Return every key of the block with type, default and description, in schema order."""
    schema = json_schema()
    rows: list[KeyRow] = []
    _rows(schema["properties"][BLOCK], BLOCK, schema.get("$defs", {}), rows)
    return rows


def _rows(node: dict[str, Any], path: str, defs: dict[str, Any], rows: list[KeyRow]) -> None:
    for key, entry in node.get("properties", {}).items():
        target = defs[entry["$ref"].rsplit("/", 1)[1]] if "$ref" in entry else entry
        if "properties" in target:
            _rows(target, f"{path}.{key}", defs, rows)
            continue
        default = json.dumps(entry["default"]) if "default" in entry else "required"
        description = " ".join(str(entry.get("description", "")).replace("``", "`").split())
        rows.append(
            KeyRow(
                path=f"{path}.{key}",
                type=_schema_type(target, defs),
                default=default,
                description=description,
            )
        )
        for option in [target, *target.get("anyOf", [])]:  # an object or null: its keys
            _rows(_resolved(option, defs), f"{path}.{key}", defs, rows)
            items = option.get("items", {})
            for element in [items, *items.get("anyOf", [])]:  # of a list of objects: their keys
                _rows(_resolved(element, defs), f"{path}.{key}[]", defs, rows)


def _resolved(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    return defs[node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _schema_type(node: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in node:
        return _schema_type(defs[node["$ref"].rsplit("/", 1)[1]], defs)
    if "anyOf" in node:
        return " or ".join(_schema_type(option, defs) for option in node["anyOf"])
    if "const" in node:
        return json.dumps(node["const"])
    if "enum" in node:
        return " or ".join(json.dumps(value) for value in node["enum"])
    if node.get("type") == "array":
        return f"array of {_schema_type(node.get('items', {}), defs)}"
    return str(node.get("type", "any"))
