"""Kind "longctx": short answers to questions on long texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lowtide.evaluation.grading import overlap, text
from lowtide.evaluation.models.protocol import Model
from lowtide.evaluation.suite.open_answers import F1_OF_MEANS, AnsweringSettings
from lowtide.evaluation.suite.task import Metric, Outcome, Question, Task, TaskSettings
from lowtide.evaluation.tasks.long_context import LongContextItem
from lowtide.evaluation.tasks.reading import read_items


class LongContextSettings(AnsweringSettings):
    """How answers are generated, and what stands around text and question."""

    kind: Literal["longctx"]
    template: str = "{context}\n\nQuestion: {question}\nAnswer:"
    """Text and question in their places."""


class LongContextTask(Task[LongContextSettings]):
    """Items of ``longctx/1``."""

    Settings: ClassVar[type[TaskSettings]] = LongContextSettings
    PRIMARY: ClassVar[str] = "f1"
    METRICS: ClassVar[Mapping[str, Metric]] = {"f1_of_means": F1_OF_MEANS}

    def questions(self) -> list[Question]:
        """Return all items."""
        return [
            Question(id=item.id, cluster=item.cluster_label(), hash=item.item_hash(), content=item)
            for item in read_items(self.path, schema=LongContextItem.SCHEMA)
        ]

    def evaluate(self, questions: Sequence[Question], model: Model, seed: int) -> list[Outcome]:
        """Generate all answers, then compare them."""
        prompts = [self.prompt(question.content) for question in questions]
        answers = model.generate(prompts, self.settings.generation(seed))
        return [_outcome(q.content, a) for q, a in zip(questions, answers, strict=True)]

    def prompt(self, item: LongContextItem) -> str:
        """Return what the model is shown."""
        # Not str.format: a text may hold braces.
        head, _, tail = self.settings.template.partition("{context}")
        return head + item.context + tail.replace("{question}", item.question)

    @classmethod
    def summarise(cls, details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return F1 by length and by where the needle stands, in fifths."""
        by_length: dict[str, list[float]] = {}
        by_depth: dict[str, list[float]] = {}
        for each in details:
            power = 1 << max(0, int(each["length_tokens"]) - 1).bit_length()
            by_length.setdefault(str(power), []).append(each["f1"])
            for depth in each["needle_positions"]:
                by_depth.setdefault(f"{min(4, int(depth * 5)) * 20}%", []).append(each["f1"])
        return {
            "f1_by_length_up_to": {k: sum(v) / len(v) for k, v in sorted(by_length.items())},
            "f1_by_depth_from": {k: sum(v) / len(v) for k, v in sorted(by_depth.items())},
        }


def _outcome(item: LongContextItem, answer: str) -> Outcome:
    if item.scoring == "set":
        found = overlap.set_overlap(overlap.parse_set(answer), item.answers)
        is_exact = found.f1 == 1.0
    else:
        found = overlap.token_overlap(answer, item.answers)
        is_exact = text.exact_match(answer, item.answers)
    return Outcome(
        scores={**found._asdict(), "exact": float(is_exact),
                "answer_words": float(len(answer.split()))},
        output=answer, target=" | ".join(item.answers), prompt=item.question,
        detail={"length_tokens": item.length_tokens, "f1": found.f1,
                "needle_positions": list(item.needle_positions)},
    )  # fmt: skip
