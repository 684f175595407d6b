"""``longctx/1``: a question on a long text in which the answer stands somewhere."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lowtide.evaluation.tasks.items import Item

Depth = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class LongContextItem(Item):
    """One question on one text."""

    SCHEMA: ClassVar[str] = "longctx/1"

    context: str = Field(min_length=1)
    """The text."""
    question: str = Field(min_length=1)
    """Asked after it."""
    answers: tuple[str, ...] = Field(min_length=1)
    """With scoring "any", right answers; with "set", the elements of the only one."""
    scoring: Literal["any", "set"] = "any"
    """Whether one of `answers` is wanted, or all of them."""
    needle_positions: tuple[Depth, ...] = ()
    """Where in the text the facts stand, from 0 (start) to 1 (end)."""
    distractors: int | tuple[str, ...] = 0
    """Facts that look like the ones asked for: how many, or which."""
    length_tokens: int = Field(ge=1)
    """Of the context, as its maker counted."""
    seed: int = 0
    """From which it was made."""
    cluster: str | None = None
    """Items with the same text are not independent; null: each is."""

    @model_validator(mode="after")
    def _check(self) -> LongContextItem:
        blank = [index for index, answer in enumerate(self.answers) if not answer.strip()]
        if blank:
            raise ValueError(f'"answers"[{blank[0]}]: is blank; write the answer')
        if isinstance(self.distractors, int) and self.distractors < 0:
            raise ValueError(f'"distractors": {self.distractors}, allowed is 0 or more')
        return self

    def cluster_label(self) -> str:
        """Return `cluster` or the id."""
        return self.cluster or self.id
