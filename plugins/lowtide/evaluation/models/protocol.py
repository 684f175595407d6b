"""What an evaluation asks of a model, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from lowtide.core.errors import DataError


class Continuation(NamedTuple):
    """A text whose probability is asked for, and what stands before it."""

    context: str
    text: str


class TokenRow(NamedTuple):
    """Tokens of which those from `first` on are scored, each given all before it.

    Attributes:
        ids: Of the tokens; any sequence of whole numbers, such as a slice of an array.
        first: Of the scored ones, 1 or more: the token at 0 has nothing before it.
    """

    ids: Sequence[int] | NDArray[Any]
    first: int


class LogLikelihood(NamedTuple):
    """How likely a text is.

    Attributes:
        total: Log-probability in nats.
        tokens: How many tokens were scored.
        is_greedy: Whether each was the most likely one.
    """

    total: float
    tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How text is generated.

    Attributes:
        max_tokens: Longest answer.
        stop: The answer ends before the first of these.
        temperature: 0 takes the most likely token each time.
        seed: Of what is drawn at higher temperatures; each prompt draws for itself.
    """

    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not self.temperature >= 0 or "" in self.stop:
            raise DataError(
                f"generation: got {self}; allowed are max_tokens of 1 or more, temperature of 0 "
                "or more and stops that are not empty"
            )


@runtime_checkable
class Model(Protocol):
    """A language model, wherever it runs."""

    @property
    def name(self) -> str:
        """For people; stands in every row."""

    def fingerprint(self) -> str:
        """Return a hash of what decides the answers: rows of another one are not reused."""

    def loglikelihood(self, requests: Sequence[Continuation]) -> list[LogLikelihood]:
        """Return how likely each text is after its context.

        Raises:
            DataError: a request that cannot be scored, such as one longer than the model reads.
            EndpointError: a model behind a URL that cannot be had.
        """

    def generate(self, prompts: Sequence[str], options: Generation) -> list[str]:
        """Return an answer to each prompt, without the prompt.

        Raises:
            DataError: a prompt that cannot be answered.
            EndpointError: a model behind a URL that cannot be had.
        """


@runtime_checkable
class TokenModel(Model, Protocol):
    """A model that also takes tokens as they are: needs no tokenizer for them."""

    def score_tokens(self, rows: Sequence[TokenRow]) -> list[LogLikelihood]:
        """Return how likely the scored tokens of each row are.

        Raises:
            DataError: a row that cannot be scored.
        """


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the first of the stops in it."""
    ends = [at for at in (text.find(each) for each in stop) if at >= 0]
    return text[: min(ends)] if ends else text
