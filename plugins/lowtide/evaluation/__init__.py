"""Evaluation of language models: tasks, graders, error bars, runs; and of one that trains.

``load_suite``, ``run``, ``figures``, ``compare`` are what a script needs; see docs/evaluation.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowtide.evaluation.aggregate import figures
    from lowtide.evaluation.comparison import compare
    from lowtide.evaluation.rows import RowFile, read_rows
    from lowtide.evaluation.runner import run
    from lowtide.evaluation.suite.loading import load_suite

__all__ = ["RowFile", "compare", "figures", "load_suite", "read_rows", "run"]

_HOMES = {
    "RowFile": "lowtide.evaluation.rows",
    "compare": "lowtide.evaluation.comparison",
    "figures": "lowtide.evaluation.aggregate",
    "load_suite": "lowtide.evaluation.suite.loading",
    "read_rows": "lowtide.evaluation.rows",
    "run": "lowtide.evaluation.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No module here may bear one of these names: imported, it would stand in place of the function.
    return getattr(import_module(_HOMES[name]), name)
