"""What verbs write: JSON for machines on stdout, tables for people."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Write `value` as indented JSON to stdout.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON lacks.
    """
    typer.echo(json.dumps(value, indent=2, allow_nan=False))
