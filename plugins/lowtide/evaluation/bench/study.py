"""Running a plan: every model, stack, task, length and seed, going on where it was left."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowtide.core.telemetry import environment
from lowtide.evaluation.bench.measure import calibration, graded, timed
from lowtide.evaluation.bench.plan import Plan
from lowtide.evaluation.bench.rows import RowFile
from lowtide.evaluation.fixtures import facts
from lowtide.evaluation.fixtures.recipes import recipe_of, trained
from lowtide.evaluation.optimizations.base import Context
from lowtide.evaluation.optimizations.stack import Applied, Stack
from lowtide.evaluation.tasks.long_context import LongContextItem

VERSIONS = ("python", "lowtide", "torch", "transformers", "numpy", "platform", "cpu", "commit")


@dataclass(frozen=True)
class Cell:
    """One task in one form."""

    task: str
    words: int
    seed: int
    is_question_aware: bool

    def columns(self) -> dict[str, Any]:
        """Return it as columns of a row."""
        return {
            "task": self.task,
            "words": self.words,
            "seed": self.seed,
            "question_aware": self.is_question_aware,
        }


class Study:
    """A plan, its rows so far, and the models it needs.

    Args:
        plan: What to run.
        path: JSONL file of the rows; what is there already is not run again.
        fixtures: Folder of trained models; None for the default one.
        say: Called with a line of text now and then.
    """

    def __init__(
        self,
        plan: Plan,
        path: Path,
        *,
        fixtures: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.plan, self.file, self._fixtures, self._say = plan, RowFile(path), fixtures, say
        self._stacks, self.refused = plan.all_stacks()
        self._items: dict[Cell, list[LongContextItem]] = {}

    def run(self) -> list[dict[str, Any]]:
        """Run what is missing; return all rows."""
        self._provenance()
        for name in self.plan.models:
            model = trained(recipe_of(name), self._fixtures, say=self._say)
            digest = model_hash(model)
            for number, stack in enumerate(self._stacks, start=1):
                self._quality(name, digest, model, stack)
                self._say(f"{name}: {number} of {len(self._stacks)} stacks, {stack.name}")
            if self.plan.timing is not None:
                self._speed(name, digest, model)
        return self.file.rows

    def items(self, cell: Cell) -> list[LongContextItem]:
        """Return the items of a cell, the same for every model and stack."""
        if cell not in self._items:
            self._items[cell] = facts.items(
                cell.task, seed=cell.seed, rows=self.plan.contexts, words=cell.words,
                questions=self.plan.questions,
            )  # fmt: skip
        return self._items[cell]

    def _cells(self) -> Iterator[Cell]:
        for task in self.plan.tasks:
            for words in self.plan.words:
                for seed in self.plan.seeds:
                    for is_aware in self.plan.question_aware:
                        yield Cell(task, words, seed, is_aware)

    def _provenance(self) -> None:
        facts_of_run = environment()
        row = {key: facts_of_run.get(key) for key in VERSIONS}
        row["threads"] = torch.get_num_threads()
        row["plan"] = self.plan.model_dump()
        digest = hashlib.sha256(repr(sorted(row.items(), key=str)).encode()).hexdigest()[:16]
        self.file.add([{"kind": "run", "key": f"run|{digest}", **row}])

    def _context(self, seed: int) -> Context:
        words = max(self.plan.words)
        tested = [item for cell in self._cells() for item in self.items(cell)]
        tokens = calibration(self.plan.calibration, words, tested)
        return Context(calibration=tokens, seed=seed)

    def _quality(self, name: str, digest: str, model: Any, stack: Stack) -> None:
        for seed in self.plan.seeds:
            missing = []
            for cell in self._cells():
                key = f"cell|{name}|{digest}|{stack.name}|{cell}|{self.plan.contexts}"
                key += f"|{self.plan.questions}"
                if cell.seed != seed or key in self.file.keys:
                    continue
                if stack.needs_question and not cell.is_question_aware:
                    reason = "a part needs the question, which comes later"
                    self._refuse(name, stack, cell, key, reason)
                    continue
                missing.append((cell, key))
            if not missing:
                continue
            begin_s = time.perf_counter()
            with stack.apply(model, self._context(seed)) as applied:
                apply_s = time.perf_counter() - begin_s
                for cell, key in missing:
                    self.file.add(self._rows(name, digest, applied, cell, key, apply_s))

    def _refuse(self, name: str, stack: Stack, cell: Cell, key: str, reason: str) -> None:
        row = {"kind": "refused", "key": key, "model": name, "stack": stack.name}
        self.file.add([{**row, "reason": reason, **cell.columns()}])

    def _rows(
        self, name: str, digest: str, applied: Applied, cell: Cell, key: str, apply_s: float
    ) -> list[dict[str, Any]]:
        """Return the rows of a cell; the cell's own row is the last, so it says all are there."""
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        found, costs = graded(
            applied, self.items(cell), batch=self.plan.batch,
            is_question_aware=cell.is_question_aware, seed=cell.seed,
        )  # fmt: skip
        wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
        shared = {"model": name, "stack": applied.stack.name, **cell.columns()}
        rows = [
            {"kind": "item", "key": f"{key}|{row['item']}".replace("cell|", "item|", 1)}
            | shared
            | row
            for row in found
        ]
        weights = applied.bytes_report()
        cell_row = {
            "kind": "cell", "key": key, **shared, "model_hash": digest, "batch": self.plan.batch,
            "parts": [part.spelled for part in applied.stack.parts],
            "weight_bytes": weights["after_bytes"], "dense_weight_bytes": weights["before_bytes"],
            "undo_bytes": weights["undo_bytes"], "facts": applied.facts(), "apply_s": apply_s,
            "wall_s": wall_s, "cpu_s": cpu_s, **costs.columns(),
        }  # fmt: skip
        return [*rows, cell_row]

    def _speed(self, name: str, digest: str, model: Any) -> None:
        timing = self.plan.timing
        if timing is None:
            return
        seed, task = self.plan.seeds[0], self.plan.tasks[0]
        for words in self.plan.words:
            items = self.items(Cell(task, words, seed, False))
            for repeat in range(timing.repeats):
                order = list(self._stacks)
                random.Random(f"{words} {repeat}").shuffle(order)
                for place, stack in enumerate(order):
                    key = f"time|{name}|{digest}|{stack.name}|{words}|{timing}|{repeat}"
                    if key in self.file.keys:
                        continue
                    with stack.apply(model, self._context(seed)) as applied:
                        found = timed(applied, items, timing, seed=seed)
                    row = {"kind": "time", "key": key, "model": name, "stack": stack.name}
                    self.file.add(
                        [{**row, "words": words, "repeat": repeat, "place": place} | found]
                    )


def model_hash(model: Any) -> str:
    """Return a hash of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
