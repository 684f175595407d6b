"""What verbs write: JSON for machines on stdout, tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Write `value` as indented JSON to stdout.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON lacks.
    """
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


@contextlib.contextmanager
def others_on_stderr() -> Iterator[None]:
    """Send what libraries say to stderr, so that a verb's answer is alone on stdout.

    DeepSpeed, which unpickling a checkpoint may import, logs to stdout.
    """
    with contextlib.redirect_stdout(sys.stderr):
        yield
