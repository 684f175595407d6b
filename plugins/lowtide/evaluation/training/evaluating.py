"""One evaluation of the model that trains, by all ranks together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lowtide.core.errors import DataError, EndpointError, PluginError, SandboxError
from lowtide.evaluation.models.torch_model import Decode, Encode, Logits, TorchModel
from lowtide.evaluation.runner import spread
from lowtide.evaluation.suite.loading import Suite
from lowtide.evaluation.suite.task import Outcome, Question, Task, metrics_of, task_kinds
from lowtide.evaluation.training.preserving import as_it_was
from lowtide.evaluation.training.ranks import OtherRankFailedError, Ranks

logger = logging.getLogger("lowtide")

Failures = dict[str, str]
_RECOVERABLE = (DataError, EndpointError, SandboxError)
_ITEMS_AT_ONCE = 8


class ForwardFailedError(PluginError):
    """The model's forward pass raised: other ranks may be waiting inside theirs."""


class Evaluating:
    """What is needed to evaluate a model that trains.

    Args:
        suite: What is asked.
        ranks: Who takes part.
        max_items: Of each task.
        batch_size: Rows of one forward pass.
        max_length: Most tokens that the model reads.
        seed: Of orders and of what is drawn.
    """

    def __init__(
        self,
        suite: Suite,
        ranks: Ranks,
        *,
        max_items: int | None,
        batch_size: int,
        max_length: int | None,
        seed: int,
    ) -> None:
        self.suite, self.ranks = suite, ranks
        self._batch_size, self._max_length, self._seed = batch_size, max_length, seed
        self._questions = {t.name: spread(t.questions(), max_items) for t in suite.tasks}
        self.encode: Encode | None = None
        self.decode: Decode | None = None
        self.bos: int | None = None
        self.eos: int | None = None

    def check_alike(self) -> None:
        """Refuse ranks that would not ask the same: they would wait for each other for ever.

        Raises:
            DataError: on all ranks, where suites or items differ.
        """
        seen = [
            (task.name, task.settings_hash(), tuple(q.hash for q in self._questions[task.name]))
            for task in self.suite.tasks
        ]
        if not self.ranks.are_alike((seen, self.encode is None, self.decode is None)):
            raise DataError(
                "the ranks have different suites, items or tokenizers: is the suite's folder the "
                "same on all nodes, and is `use` called by all ranks?"
            )

    def run(self, module: torch.nn.Module, logits: Logits) -> tuple[dict[str, float], Failures]:
        """Evaluate; every rank of the run calls this, and gets the same.

        Args:
            module: All of it is set to evaluation and back.
            logits: From tokens, shape (B, T), to logits, shape (B, T, V).

        Returns:
            Figures by "task/metric", and what failed by task.

        Raises:
            ForwardFailedError: the model raised.
        """
        found: dict[str, float] = {}
        failures: Failures = {}
        with as_it_was(module):
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            model = TorchModel(
                _guarded(logits), encode=self.encode, decode=self.decode, name="training",
                max_length=self._max_length, batch_size=self._batch_size, bos=self.bos,
                eos=self.eos, device=device,
                agree=self.ranks.agree if self.ranks.size > 1 else None,
            )  # fmt: skip
            for task in self.suite.tasks:
                scores, failure = self._task(task, model)
                failure = next((each for each in self.ranks.gather(failure) if each), None)
                if failure is not None:
                    failures[task.name] = failure
                else:
                    figures = _figures(task, self._merged(scores))
                    found |= {f"{task.name}/{name}": value for name, value in figures.items()}
        return found, failures

    def _task(self, task: Task[Any], model: TorchModel) -> tuple[dict[str, Any], str | None]:
        """Return this rank's scores by item, and why there are none.

        Every rank has as many parts of as many items, though some twice, so that all ask the
        model as often.
        """
        scores: dict[str, Any] = {}
        for part in self._parts(self._questions[task.name]):
            failure: Exception | None = None
            outcomes: list[Outcome] = []
            try:
                outcomes = task.evaluate(part, model, self._seed)
            except _RECOVERABLE as error:
                failure = error
            if self.ranks.any_of(failure is not None):
                is_own = failure is not None and not isinstance(failure, OtherRankFailedError)
                return {}, str(failure) if is_own else None
            pairs = zip(part, outcomes, strict=True)
            scores |= {question.id: dict(outcome.scores) for question, outcome in pairs}
        return scores, None

    def _parts(self, questions: Sequence[Question]) -> list[list[Question]]:
        shards = self.ranks.shards
        own = list(questions[self.ranks.shard :: shards])
        own += [questions[0]] * (math.ceil(len(questions) / shards) - len(own))
        return [own[at : at + _ITEMS_AT_ONCE] for at in range(0, len(own), _ITEMS_AT_ONCE)]

    def _merged(self, scores: dict[str, Any]) -> list[dict[str, float]]:
        """Return all ranks' scores, each item once, in an order that all ranks have."""
        merged: dict[str, dict[str, float]] = {}
        for each in self.ranks.gather(scores):
            merged |= each
        return [merged[item] for item in sorted(merged) if merged[item]]


def _guarded(logits: Logits) -> Logits:
    def call(tokens: torch.Tensor) -> torch.Tensor:
        try:
            return logits(tokens)
        except Exception as error:
            raise ForwardFailedError(
                f"lowtide.evaluation: the model's forward pass raised {error!r} for tokens of "
                f"shape {tuple(tokens.shape)}; tell how it is called with "
                "engine.lowtide.evaluation.use(logits=...), or see max_length and vocabulary"
            ) from error

    return call


def _figures(task: Task[Any], scores: Sequence[dict[str, float]]) -> dict[str, float]:
    if not scores:
        return {}
    common = [name for name in scores[0] if all(name in each for each in scores)]
    kind: Callable[..., Any] = task_kinds.get(task.settings.kind)
    found = {}
    for name, metric in metrics_of(kind, common).items():  # type: ignore[arg-type]
        values = np.array([[each[column] for column in metric.columns] for each in scores])
        found[name] = float(metric.statistic(values.mean(axis=0)))
    return found
