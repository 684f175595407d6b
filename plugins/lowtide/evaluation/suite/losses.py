"""Kind "loss": how well a model predicts a text, in bits per byte and as perplexity.

The kind that needs least: bytes and tokens go to the model as they are, without a tokenizer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from lowtide.core.errors import DataError
from lowtide.evaluation.models.protocol import (
    Continuation,
    LogLikelihood,
    Model,
    TokenModel,
    TokenRow,
)
from lowtide.evaluation.statistics import ratio
from lowtide.evaluation.statistics.clusters import Floats
from lowtide.evaluation.suite.task import Metric, Outcome, Question, Task, TaskSettings


class LossSettings(TaskSettings):
    """How a text is cut into windows."""

    kind: Literal["loss"]
    units: Literal["bytes", "tokens", "text"] = "bytes"
    """Bytes: each byte of the file is a token. Tokens: the file holds whole numbers. Text: the
    model's own tokenizer."""
    dtype: Literal["uint8", "uint16", "int32", "int64"] = "uint16"
    """Of a file of raw tokens; an .npy file says it by itself."""
    window: int = Field(default=512, ge=1)
    """Tokens (for text: bytes, to the end of a line) that are scored together."""
    context: int = Field(default=0, ge=0)
    """Tokens before each window that are seen and not scored again."""
    vocabulary: int | None = Field(default=None, ge=1)
    """Tokens of the model, to find a file of others before the model fails."""

    @model_validator(mode="after")
    def _check(self) -> LossSettings:
        if self.units == "text" and self.context:
            raise ValueError('"context": is for units "bytes" and "tokens"; drop it')
        return self


def _bits_per_byte(means: Floats) -> Floats:
    return ratio(means) / math.log(2)


def _perplexity(means: Floats) -> Floats:
    perplexity: Floats = np.exp(np.minimum(ratio(means), 700.0))
    return perplexity


class LossTask(Task[LossSettings]):
    """Windows of a file; each scored token once, the first of a file never."""

    Settings: ClassVar[type[TaskSettings]] = LossSettings
    PRIMARY: ClassVar[str] = "bits_per_byte"
    METRICS: ClassVar[Mapping[str, Metric]] = {
        "bits_per_byte": Metric(
            columns=("nll", "bytes"), statistic=_bits_per_byte, is_higher_better=False
        ),
        "loss": Metric(columns=("nll", "tokens"), statistic=ratio, is_higher_better=False),
        "perplexity": Metric(
            columns=("nll", "tokens"), statistic=_perplexity, is_higher_better=False
        ),
    }
    HIDDEN: ClassVar[frozenset[str]] = frozenset({"nll", "tokens", "bytes"})

    def questions(self) -> list[Question]:
        """Return all windows."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        if self.settings.units == "text":
            return self._pieces(data)
        tokens = self._tokens(data)
        if len(tokens) < 2:
            raise DataError(f"{self.path}: holds {len(tokens)} tokens, allowed are 2 or more")
        window, found = self.settings.window, []
        for begin in range(1, len(tokens), window):
            end = min(begin + window, len(tokens))
            start = max(0, begin - 1 - self.settings.context)
            ids = tokens[start:end]  # a view: a file of a billion tokens is not copied
            found.append(self._question(begin, TokenRow(ids, begin - start), ids.tobytes()))
        return found

    def _question(self, begin: int, content: Any, raw: bytes) -> Question:
        digest = hashlib.sha256(raw).hexdigest()
        name = f"{begin:012d}"
        return Question(id=name, cluster=name, hash=digest, content=content)

    def _tokens(self, data: bytes) -> np.ndarray:
        settings = self.settings
        if settings.units == "bytes":
            return np.frombuffer(data, np.uint8)
        if self.path.suffix == ".npy":
            tokens = np.load(self.path, allow_pickle=False, mmap_mode="r")
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise DataError(
                    f"{self.path}: holds {tokens.dtype} of shape {tokens.shape}, allowed are whole "
                    "numbers of shape (tokens,)"
                )
        else:
            element = np.dtype(settings.dtype)
            if len(data) % element.itemsize:
                raise DataError(
                    f"{self.path}: {len(data)} bytes are no whole number of {settings.dtype}"
                )
            tokens = np.frombuffer(data, element)
        limit = settings.vocabulary
        if tokens.size and (tokens.min() < 0 or (limit is not None and tokens.max() >= limit)):
            raise DataError(
                f"{self.path}: tokens from {tokens.min()} to {tokens.max()}, allowed are 0 to "
                f"{'...' if limit is None else limit - 1}; is it the right dtype and tokenizer?"
            )
        return tokens

    def _pieces(self, data: bytes) -> list[Question]:
        """Cut at the ends of lines, after `window` bytes or more: no character is torn."""
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: is not UTF-8 at byte {error.start}") from None
        found, begin = [], 0
        while begin < len(data):
            end = data.find(b"\n", begin + self.settings.window - 1)
            end = len(data) if end < 0 else end + 1
            piece = data[begin:end]
            if piece.strip():
                found.append(self._question(begin, piece.decode(), piece))
            begin = end
        if not found:
            raise DataError(f"{self.path}: holds no text")
        return found

    def evaluate(self, questions: Sequence[Question], model: Model, _seed: int) -> list[Outcome]:
        """Score all windows in one go."""
        contents = [question.content for question in questions]
        if self.settings.units == "text":
            likelihoods = model.loglikelihood([Continuation("", text) for text in contents])
            lengths = [len(text.encode()) for text in contents]
        else:
            if not isinstance(model, TokenModel):
                raise DataError(
                    f'task "{self.name}": model "{model.name}" takes no tokens; use units "text"'
                )
            likelihoods = model.score_tokens(contents)
            lengths = [each.tokens for each in likelihoods]
        return [
            self._outcome(likelihood, length)
            for likelihood, length in zip(likelihoods, lengths, strict=True)
        ]

    def _outcome(self, likelihood: LogLikelihood, length: int) -> Outcome:
        scores = {"nll": -likelihood.total, "tokens": float(likelihood.tokens)}
        if self.settings.units != "tokens":
            scores["bytes"] = float(length)
        return Outcome(scores=scores)
