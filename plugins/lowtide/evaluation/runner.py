"""Runs: model x task x seed, item by item, going on where a run before stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowtide.core.errors import DataError
from lowtide.evaluation.models.protocol import Model
from lowtide.evaluation.rows import Row, RowFile
from lowtide.evaluation.suite.loading import Suite
from lowtide.evaluation.suite.task import Outcome, Question, Task

Progress = Callable[[str, int, int], None]
"""Called with a task's name, rows done of it, and rows that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run did.

    Attributes:
        done: Rows written now.
        kept: Rows that were there already.
        failed: Rows written now that have an error.
    """

    done: int
    kept: int
    failed: int


def run(
    suite: Suite,
    model: Model,
    rows: RowFile,
    *,
    seeds: Sequence[int] = (0,),
    max_items: int | None = None,
    items_at_once: int = 1,
    progress: Progress | None = None,
) -> RunSummary:
    """Evaluate a model on a suite; rows that the file has already are not done again.

    Args:
        suite: From `load_suite`.
        model: What is asked.
        rows: Where rows go. A crash loses the items under way: `items_at_once` of them.
        seeds: Each gives every item a row of its own.
        max_items: Of each task, spread evenly over it; None takes all.
        items_at_once: More let a model work on larger batches.
        progress: Told after every write.

    Raises:
        LowtideError: a task cannot be read, or the model not be asked; rows so far are kept.
    """
    if items_at_once < 1 or not seeds or len(set(seeds)) < len(seeds):
        raise DataError(
            f"items_at_once, seeds: got {items_at_once}, {list(seeds)}; allowed are 1 or more, and "
            "one or more different seeds"
        )
    facts = provenance()
    model_hash = model.fingerprint()
    done = kept = failed = 0
    for task in suite.tasks:
        chosen = spread(task.questions(), max_items)
        total, at = len(chosen) * len(seeds), 0
        for seed in seeds:
            blanks = [_blank(task, q, model.name, model_hash, seed, facts) for q in chosen]
            missing = [
                (question, row)
                for question, row in zip(chosen, blanks, strict=True)
                if row.key not in rows.keys
            ]
            kept += len(chosen) - len(missing)
            at += len(chosen) - len(missing)
            for part in _parts(missing, items_at_once):
                finished = _evaluate(task, part, model, seed)
                rows.add(finished)
                done, at = done + len(finished), at + len(finished)
                failed += sum(bool(row.error) for row in finished)
                if progress is not None:
                    progress(task.name, at, total)
    return RunSummary(done=done, kept=kept, failed=failed)


def spread(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return at most `limit` questions, at even distances: the same ones every time.

    Raises:
        DataError: `limit` is less than 1.
    """
    if limit is None or limit >= len(questions):
        return list(questions)
    if limit < 1:
        raise DataError(f"max_items: got {limit}, allowed is 1 or more")
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _parts(missing: list[Any], size: int) -> Iterator[list[Any]]:
    for begin in range(0, len(missing), size):
        yield missing[begin : begin + size]


def _blank(
    task: Task[Any],
    question: Question,
    model: str,
    model_hash: str,
    seed: int,
    facts: dict[str, Any],
) -> Row:
    return Row(
        task=task.name, kind=task.settings.kind, settings_hash=task.settings_hash(),
        item=question.id, item_hash=question.hash, cluster=question.cluster, model=model,
        model_hash=model_hash, seed=seed, scores={}, detail={}, provenance=facts, time_s=0.0,
        duration_s=0.0,
    )  # fmt: skip


def _evaluate(
    task: Task[Any], part: list[tuple[Question, Row]], model: Model, seed: int
) -> list[Row]:
    begin_s = time.perf_counter()
    outcomes = task.evaluate([question for question, _ in part], model, seed)
    elapsed_s = (time.perf_counter() - begin_s) / len(part)
    return [
        _filled(row, outcome, elapsed_s) for (_, row), outcome in zip(part, outcomes, strict=True)
    ]


def _filled(row: Row, outcome: Outcome, elapsed_s: float) -> Row:
    odd = sorted(name for name, value in outcome.scores.items() if not math.isfinite(value))
    error = ""
    if odd:  # a diverged model: no figure can be made of it, and none may be left out silently
        error = f"{odd[0]} is {outcome.scores[odd[0]]}"
    return replace(
        row, scores={} if odd else dict(outcome.scores), error=error, output=outcome.output,
        target=outcome.target, prompt=outcome.prompt, detail={} if odd else dict(outcome.detail),
        time_s=round(time.time(), 3), duration_s=round(elapsed_s, 6),
    )  # fmt: skip


def provenance() -> dict[str, Any]:
    """Return versions, the commit of the folder that is worked in, and the machine."""
    from lowtide.core.telemetry import environment

    facts = environment()
    kept = (
        "python",
        "lowtide",
        "torch",
        "numpy",
        "transformers",
        "commit",
        "platform",
        "cpu",
        "gpu",
    )
    return {name: facts[name] for name in kept if facts.get(name) is not None}
