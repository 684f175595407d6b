"""Kind "open": answers in free text or code, graded as each item says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from lowtide.evaluation.grading import numeric, overlap, text
from lowtide.evaluation.grading.sandbox import Limits, code_in, run_tests
from lowtide.evaluation.models.protocol import Generation, Model
from lowtide.evaluation.statistics import f1_of_means
from lowtide.evaluation.suite.task import Metric, Outcome, Question, Task, TaskSettings
from lowtide.evaluation.tasks.open_response import (
    Exact,
    Numeric,
    OpenItem,
    Overlapping,
    Pattern,
    Rubric,
    UnitTest,
)
from lowtide.evaluation.tasks.reading import read_items

F1_OF_MEANS = Metric(columns=("precision", "recall"), statistic=f1_of_means)


class AnsweringSettings(TaskSettings):
    """How answers are generated."""

    max_tokens: int = Field(default=256, ge=1)
    """Longest answer."""
    stop: tuple[str, ...] = ()
    """An answer ends before the first of these."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the most likely token each time."""

    def generation(self, seed: int) -> Generation:
        """Return the options of a run with this seed."""
        return Generation(
            max_tokens=self.max_tokens, stop=self.stop, temperature=self.temperature, seed=seed
        )


class OpenSettings(AnsweringSettings):
    """How answers are generated."""

    kind: Literal["open"]


class OpenTask(Task[OpenSettings]):
    """Items of ``open/1``."""

    Settings: ClassVar[type[TaskSettings]] = OpenSettings
    PRIMARY: ClassVar[str] = "correct"
    METRICS: ClassVar[Mapping[str, Metric]] = {"f1_of_means": F1_OF_MEANS}

    def questions(self) -> list[Question]:
        """Return all items."""
        return [
            Question(id=item.id, cluster=item.cluster_label(), hash=item.item_hash(), content=item)
            for item in read_items(self.path, schema=OpenItem.SCHEMA)
        ]

    def evaluate(self, questions: Sequence[Question], model: Model, seed: int) -> list[Outcome]:
        """Generate all answers, then grade them."""
        prompts = [question.content.prompt for question in questions]
        answers = model.generate(prompts, self.settings.generation(seed))
        return [_outcome(q.content, a) for q, a in zip(questions, answers, strict=True)]

    @classmethod
    def summarise(cls, details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return how many problems had all of their steps right, and how many answers wait."""
        problems: dict[str, list[bool]] = {}
        for each in details:
            if each.get("parent") is not None and "correct" in each:
                problems.setdefault(each["parent"], []).append(each["correct"])
        found: dict[str, Any] = {}
        if problems:
            solved = sum(all(steps) for steps in problems.values())
            found["problems"] = {"count": len(problems), "solved": solved}
        waiting = sum(each.get("grader") == "rubric" for each in details)
        if waiting:
            found["answers_to_rate"] = waiting
        return found


def _outcome(item: OpenItem, answer: str) -> Outcome:
    scores, note = grade(item, answer)
    detail: dict[str, Any] = {"grader": item.grader.type, "parent": item.parent}
    if "correct" in scores:
        detail["correct"] = bool(scores["correct"])
    if note:
        detail["note"] = note
    return Outcome(
        # Words said: recall can be had by saying much.
        scores={**scores, "answer_words": float(len(answer.split()))} if scores else {},
        output=answer, target=" | ".join(item.references), prompt=item.prompt, detail=detail,
    )  # fmt: skip


def grade(item: OpenItem, answer: str) -> tuple[dict[str, float], str]:
    """Return scores of an answer, and a note on why it failed, if there is one to make.

    No scores for a rubric: people, or a judge, rate it.

    Raises:
        SandboxError: the machine cannot run tests as they must be.
    """
    grader = item.grader
    if isinstance(grader, Rubric):
        return {}, "needs ratings"
    if isinstance(grader, Exact):
        is_right = text.exact_match(answer, item.references, is_normalised=grader.is_normalised)
    elif isinstance(grader, Pattern):
        is_right = text.regex_match(answer, text.compiled(grader.pattern), item.references)
    elif isinstance(grader, Numeric):
        is_right = numeric.numeric_match(
            answer, float(grader.value), rtol=grader.rtol, atol=grader.atol, unit=grader.unit,
            nan=grader.nan,
        )  # fmt: skip
    elif isinstance(grader, UnitTest):
        limits = Limits(cpu_s=grader.cpu_s, wall_s=grader.wall_s, memory_bytes=grader.memory_bytes)
        result = run_tests(code_in(answer), grader.tests, functions=grader.functions, limits=limits)
        return {"correct": float(result.is_passed)}, result.reason
    else:
        return partial_credit(grader, answer, item.references), ""
    return {"correct": float(is_right)}, ""


def partial_credit(grader: Overlapping, answer: str, references: Sequence[str]) -> dict[str, float]:
    """Return precision, recall and F1 of an answer."""
    compare: Mapping[str, Callable[[], overlap.Overlap]] = {
        "token_f1": lambda: overlap.token_overlap(answer, references),
        "rouge_l": lambda: overlap.rouge_l(answer, references),
        "set_f1": lambda: overlap.set_overlap(overlap.parse_set(answer), references),
    }
    return dict(compare[grader.type]()._asdict())
