"""Kind "mcq": options by log-probability, in several orders, with calibration and position bias."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from lowtide.evaluation.grading.calibration import (
    expected_calibration_error,
    reliability_bins,
)
from lowtide.evaluation.grading.choices import (
    SCORINGS,
    OptionScore,
    Scoring,
    option_scores,
    orders,
    position_bias,
    probabilities,
)
from lowtide.evaluation.models.protocol import Continuation, LogLikelihood, Model
from lowtide.evaluation.suite.task import Outcome, Question, Task, TaskSettings
from lowtide.evaluation.tasks.mcq import McqItem
from lowtide.evaluation.tasks.reading import read_items

_NEUTRAL = "Answer:"


class McqSettings(TaskSettings):
    """How options are shown and scored."""

    kind: Literal["mcq"]
    style: Literal["letters", "text"] = "letters"
    """Letters: the options are listed, and letters scored. Text: each option's text is scored
    after the question, and no option is shown."""
    scoring: Scoring = "sum"
    """What "accuracy" goes by; the others are reported beside it."""
    shuffles: int = Field(default=4, ge=1)
    """Orders in which the options are listed; with as many as options, each stands everywhere."""


class McqTask(Task[McqSettings]):
    """Items of ``mcq/1``."""

    Settings: ClassVar[type[TaskSettings]] = McqSettings
    PRIMARY: ClassVar[str] = "accuracy"

    def questions(self) -> list[Question]:
        """Return all items."""
        return [
            Question(id=item.id, cluster=item.cluster_label(), hash=item.item_hash(), content=item)
            for item in read_items(self.path, schema=McqItem.SCHEMA)
        ]

    def evaluate(self, questions: Sequence[Question], model: Model, seed: int) -> list[Outcome]:
        """Score every option in every order, and without the question, in one go."""
        plans = [self._plan(question.content, seed) for question in questions]
        requests = [request for plan in plans for request in plan.requests()]
        scores = iter(model.loglikelihood(requests))
        return [plan.outcome(scores, self.settings.scoring) for plan in plans]

    def _plan(self, item: McqItem, seed: int) -> _Plan:
        if self.settings.style == "text":
            return _TextPlan(item, [tuple(range(len(item.choices)))])
        digest = hashlib.sha256(f"{seed}\0{item.id}".encode()).digest()
        own_seed = int.from_bytes(digest[:8], "big")
        return _LetterPlan(item, orders(len(item.choices), self.settings.shuffles, own_seed))

    @classmethod
    def summarise(cls, details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return calibration, and the bias to positions where options were listed."""
        if not details:
            return {}
        confidence = [each["confidence"] for each in details]
        correct = [each["chosen"] == each["answer"] for each in details]
        bins = reliability_bins(confidence, correct)
        found: dict[str, Any] = {
            "expected_calibration_error": expected_calibration_error(confidence, correct),
            "reliability": [_plain(asdict(each)) for each in bins],
        }
        listed = [each for each in details if each["positions"]]
        if listed:
            bias = position_bias(
                [(each["answer"], each["orders"], each["positions"]) for each in listed]
            )
            found["position_bias"] = _plain(asdict(bias))
        return found


class _Plan:
    """What is asked about one item, and how its answers are read."""

    def __init__(self, item: McqItem, shown: list[tuple[int, ...]]) -> None:
        self.item, self.shown = item, shown

    def prompt(self, order: tuple[int, ...]) -> str:
        raise NotImplementedError

    def text(self, order: tuple[int, ...], position: int) -> str:
        """Return what is scored for the option at `position`."""
        raise NotImplementedError

    def requests(self) -> list[Continuation]:
        """Every order's positions, then the positions of the first order without the question."""
        positions = range(len(self.item.choices))
        asked = [
            Continuation(self.prompt(order), self.text(order, at))
            for order in self.shown
            for at in positions
        ]
        return asked + [Continuation(_NEUTRAL, self.text(self.shown[0], at)) for at in positions]

    def outcome(self, scores: Any, main: Scoring) -> Outcome:
        item, width = self.item, len(self.item.choices)
        asked = [[next(scores) for _ in range(width)] for _ in self.shown]
        alone = [next(scores) for _ in range(width)]
        lengths = [len(self.text(self.shown[0], at).encode()) for at in range(width)]
        shares: dict[str, Any] = {}
        for scoring in SCORINGS:
            total = np.zeros(width)
            for order, row in zip(self.shown, asked, strict=True):
                options = _options(row, alone, lengths)
                total[list(order)] += probabilities(option_scores(options, scoring))
            shares[scoring] = total / len(self.shown)
        chosen = {scoring: int(share.argmax()) for scoring, share in shares.items()}
        share = shares[main]
        right = np.eye(width)[item.answer]
        positions = [
            int(option_scores(_options(row, alone, lengths), main).argmax()) for row in asked
        ]
        return Outcome(
            scores={
                "accuracy": float(chosen[main] == item.answer),
                **{f"accuracy_{s}": float(chosen[s] == item.answer) for s in SCORINGS},
                "brier": float(((share - right) ** 2).sum()),
                "confidence": float(share[chosen[main]]),
            },
            output=item.choices[chosen[main]],
            target=item.choices[item.answer],
            prompt=self.prompt(self.shown[0]),
            detail={
                "answer": item.answer, "chosen": chosen[main],
                "confidence": float(share[chosen[main]]), "orders": [list(o) for o in self.shown],
                "positions": positions if isinstance(self, _LetterPlan) else [],
            },
        )  # fmt: skip


def _options(
    row: Sequence[LogLikelihood], alone: Sequence[LogLikelihood], lengths: Sequence[int]
) -> list[OptionScore]:
    """Return scores by position."""
    return [
        OptionScore(asked.total, asked.tokens, length, by_itself.total)
        for asked, by_itself, length in zip(row, alone, lengths, strict=True)
    ]


class _LetterPlan(_Plan):
    def prompt(self, order: tuple[int, ...]) -> str:
        lines = [
            f"{string.ascii_uppercase[at]}. {self.item.choices[option]}"
            for at, option in enumerate(order)
        ]
        return "\n".join([f"Question: {self.item.question}", *lines, _NEUTRAL])

    def text(self, _order: tuple[int, ...], position: int) -> str:
        return f" {string.ascii_uppercase[position]}"


class _TextPlan(_Plan):
    def prompt(self, _order: tuple[int, ...]) -> str:
        return f"Question: {self.item.question}\n{_NEUTRAL}"

    def text(self, order: tuple[int, ...], position: int) -> str:
        return f" {self.item.choices[order[position]]}"


def _plain(value: Any) -> Any:
    """Return JSON without NaN, which stands for "no answers here"."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and value != value else value
