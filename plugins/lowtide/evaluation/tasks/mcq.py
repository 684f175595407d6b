"""``mcq/1``: one question, several options, one of them right.

Fields after EAIRA's class 1 (arXiv 2502.20309) and the public tools around it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from lowtide.evaluation.tasks.items import Item, Part


class Source(Part):
    """Where the question comes from."""

    doi: str | None = None
    """Of the paper; questions on one paper form a cluster."""

    span: str | None = None
    """The piece of it."""


class Review(Part):
    """One expert's view of an item, from 1 (no) to 5 (yes); null was not rated."""

    question_relevance: int | None = Field(default=None, ge=1, le=5)
    """Does it matter in the field?"""
    question_derivable: int | None = Field(default=None, ge=1, le=5)
    """Can it be asked from the source?"""
    question_independence: int | None = Field(default=None, ge=1, le=5)
    """Does it stand alone, without the source?"""
    question_challenge: int | None = Field(default=None, ge=1, le=5)
    """Is it hard for an expert?"""
    answer_relevance: int | None = Field(default=None, ge=1, le=5)
    """Does it answer the question?"""
    answer_completeness: int | None = Field(default=None, ge=1, le=5)
    """Is nothing missing?"""
    answer_derivable: int | None = Field(default=None, ge=1, le=5)
    """Does it follow from the source?"""
    answer_uniqueness: int | None = Field(default=None, ge=1, le=5)
    """Is only one option right?"""
    answer_uncontroversial: int | None = Field(default=None, ge=1, le=5)
    """Would experts agree?"""
    arithmetic_free: int | None = Field(default=None, ge=1, le=5)
    """Is no calculation needed?"""
    skills_right: int | None = Field(default=None, ge=1, le=5)
    """Are the skill labels right?"""
    domain_right: int | None = Field(default=None, ge=1, le=5)
    """Is the domain label right?"""
    accept: bool
    """Should the item be used?"""
    comment: str = ""
    """Anything else."""


class Generator(Part):
    """What wrote the item, if nobody did."""

    model: str
    """Its name and version."""
    prompt_hash: str | None = None
    """Of the prompt."""
    score: float | None = Field(default=None, ge=0, le=10)
    """What a judge gave it."""


class McqItem(Item):
    """One question with options."""

    SCHEMA: ClassVar[str] = "mcq/1"

    question: str = Field(min_length=1)
    """Without the options."""
    choices: tuple[str, ...] = Field(min_length=2, max_length=26)
    """The options, without letters before them."""
    answer: int = Field(ge=0)
    """Which option is right, from 0."""
    domain: str | None = None
    """Such as "astronomy"."""
    skills: tuple[str, ...] = ()
    """What it takes."""
    difficulty: Literal["easy", "medium", "hard"] | None = None
    """As its author sees it."""
    source: Source | None = None
    """Where it comes from."""
    support: str | None = None
    """The text that says why the answer is right."""
    author: str | None = None
    """Who wrote it."""
    review: tuple[Review, ...] = ()
    """What experts said."""
    generator: Generator | None = None
    """What wrote it."""
    cluster: str | None = None
    """Items with the same text are not independent; null: those with the same source."""

    @model_validator(mode="after")
    def _check(self) -> McqItem:
        if self.answer >= len(self.choices):
            raise ValueError(
                f'"answer": {self.answer}, allowed is 0 to {len(self.choices) - 1}, the number of '
                "an option counted from 0"
            )
        blank = [index for index, choice in enumerate(self.choices) if not choice.strip()]
        if blank:
            raise ValueError(f'"choices"[{blank[0]}]: is blank; write the option')
        if len(set(self.choices)) < len(self.choices):
            raise ValueError('"choices": two options are the same; only one may be right')
        return self

    def cluster_label(self) -> str:
        """Return `cluster`, the source's DOI, or the id."""
        return self.cluster or (self.source.doi if self.source else None) or self.id
