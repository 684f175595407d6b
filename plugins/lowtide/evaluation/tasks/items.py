"""What every item of every schema is: checked, unchangeable, and with a hash of its own."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from lowtide.core.registry import Registry


class Part(BaseModel):
    """Base of what items are made of: unknown keys are errors, types are not coerced."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Item(Part):
    """One row of a JSONL file. Subclasses set `SCHEMA` to what the row says in ``"schema"``."""

    SCHEMA: ClassVar[str]

    id: str = Field(min_length=1)
    """Unique in a file."""

    def cluster_label(self) -> str:
        """Return what the item shares with others (a passage, a paper), or its own id."""
        return self.id

    def item_hash(self) -> str:
        """Return the hash of what the item says; defaults written out or left out are the same."""
        return canonical_hash({"schema": self.SCHEMA, **self.model_dump(exclude_defaults=True)})


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys, without spaces, and in no other way.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON lacks.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def canonical_hash(value: Any) -> str:
    """Return SHA-256 of `canonical_json` in UTF-8, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# Schemas by the name that rows carry. Other packages add theirs by entry points.
schemas: Registry[Item] = Registry("item schema", "lowtide.evaluation.schemas", Item)
schemas.register("mcq/1", "lowtide.evaluation.tasks.mcq:McqItem")
schemas.register("open/1", "lowtide.evaluation.tasks.open_response:OpenItem")
schemas.register("longctx/1", "lowtide.evaluation.tasks.long_context:LongContextItem")
