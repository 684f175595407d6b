"""Rows that are right, for tests that break them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

MCQ: dict[str, Any] = {
    "schema": "mcq/1", "id": "m1", "question": "Which metal is liquid at 300 K?",
    "choices": ["iron", "mercury", "gold", "tin"], "answer": 1, "domain": "chemistry",
    "skills": ["recall"], "difficulty": "easy", "source": {"doi": "10.1/x", "span": "p. 3"},
    "support": "Mercury melts at 234 K.", "author": "A. B.",
    "review": [{"question_relevance": 4, "accept": True}],
    "generator": {"model": "m", "prompt_hash": "ab", "score": 7.5},
}  # fmt: skip
OPEN: dict[str, Any] = {
    "schema": "open/1", "id": "o1", "prompt": "How far does light get in 1 us?",
    "grader": {"type": "numeric", "value": 299.8, "rtol": 1e-3, "unit": "m"},
}  # fmt: skip
UNIT_TEST: dict[str, Any] = {
    "schema": "open/1", "id": "o2", "prompt": "Write add(a, b).", "parent": "p", "step": 1,
    "grader": {"type": "unit_test", "tests": "assert add(1, 2) == 3", "functions": ["add"]},
}  # fmt: skip
LONG: dict[str, Any] = {
    "schema": "longctx/1", "id": "l1", "context": "a is 1. b is 2.", "question": "What is b?",
    "answers": ["2"], "needle_positions": [0.5], "distractors": 1, "length_tokens": 8, "seed": 3,
}  # fmt: skip


def changed(
    row: dict[str, Any], *path: Any, value: Any = None, drop: bool = False
) -> dict[str, Any]:
    """A copy of `row` with one value, at `path`, replaced or dropped."""
    found = copy.deepcopy(row)
    node: Any = found
    for part in path[:-1]:
        node = node[part]
    if drop:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return found


def write(path: Path, *rows: Any) -> Path:
    """Write rows, each an object or a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def mcq_rows(count: int, options: int = 4) -> list[dict[str, Any]]:
    """Arithmetic questions with the right option at all positions in turn."""
    rows = []
    for n in range(count):
        choices = [f"{7 * n + k * 11 + 3}" for k in range(options)]
        rows.append(
            {
                "schema": "mcq/1", "id": f"q{n}", "question": f"What comes {n} times after zero?",
                "choices": choices, "answer": n % options, "cluster": f"c{n // 2}",
            }
        )  # fmt: skip
    return rows
