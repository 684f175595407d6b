"""A model that follows a script: for tests, and for trying a suite without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from lowtide.evaluation.models.protocol import (
    Continuation,
    Generation,
    LogLikelihood,
    cut_at_stop,
)


class ScriptedModel:
    """Answers from a mapping or a function, and scores by a function.

    Args:
        answers: From a prompt to its answer; prompts that a mapping lacks get an empty one.
        score: From (context, text) to a log-probability in nats. Left out, every text has one
            that its SHA-256 gives: the same in every run, and without meaning.
        name: As rows have it.
    """

    def __init__(
        self,
        answers: Mapping[str, str] | Callable[[str], str] | None = None,
        score: Callable[[str, str], float] | None = None,
        *,
        name: str = "scripted",
    ) -> None:
        self.name = name
        self._answers = answers if answers is not None else {}
        self._score = score or _arbitrary

    def fingerprint(self) -> str:
        """Return a hash of the name: scripts of one name are taken to be the same."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def loglikelihood(self, requests: Sequence[Continuation]) -> list[LogLikelihood]:
        """Score each text; its words are its tokens."""
        return [
            LogLikelihood(self._score(context, text), max(1, len(text.split())), False)
            for context, text in requests
        ]

    def generate(self, prompts: Sequence[str], options: Generation) -> list[str]:
        """Answer each prompt, up to a stop."""
        answers = self._answers
        said = (answers(p) if callable(answers) else answers.get(p, "") for p in prompts)
        return [cut_at_stop(text, options.stop) for text in said]


def _arbitrary(context: str, text: str) -> float:
    digest = hashlib.sha256(f"{context}\0{text}".encode()).digest()
    return -float(int.from_bytes(digest[:4], "big")) / 2**32 * max(1, len(text))
