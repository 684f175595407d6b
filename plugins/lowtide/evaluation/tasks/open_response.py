"""``open/1``: an answer in free text or code, and how it is graded."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lowtide.core.errors import DataError
from lowtide.evaluation.grading.units import parse_unit
from lowtide.evaluation.tasks.items import Item, Part


class Exact(Part):
    """The answer is one of the references."""

    type: Literal["exact"]
    is_normalised: bool = True
    """Compare without case, punctuation, articles and odd spaces."""


class Pattern(Part):
    """A regular expression finds the answer; its first group, if any, must be a reference."""

    type: Literal["regex"]
    pattern: str
    """In Python's syntax; the last match counts."""

    @model_validator(mode="after")
    def _check(self) -> Pattern:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f'"pattern": is no regular expression: {error}') from None
        return self


class Numeric(Part):
    """The last number of the answer is within a tolerance."""

    type: Literal["numeric"]
    value: float | Literal["nan", "inf", "-inf"]
    """The right one, in `unit`."""
    rtol: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """Relative to `value`."""
    atol: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """In `unit`."""
    unit: str | None = None
    """Answers in its multiples are converted."""
    nan: Literal["wrong", "equal"] = "wrong"
    """What NaN is worth where `value` is NaN."""

    @model_validator(mode="after")
    def _check(self) -> Numeric:
        try:
            parse_unit(self.unit or "1")
        except DataError as error:
            raise ValueError(f'"unit": {error}') from None
        return self


class UnitTest(Part):
    """Tests run against the code of the answer, in a sandbox."""

    type: Literal["unit_test"]
    tests: str
    """Python; a statement or a function test_* that raises is a failure."""
    functions: tuple[str, ...] = Field(min_length=1)
    """Names that the tests call."""
    cpu_s: int = Field(default=10, ge=1)
    """Processor time of the solution."""
    wall_s: float = Field(default=30.0, gt=0)
    """Time of all."""
    memory_bytes: int = Field(default=1 << 30, ge=1 << 26)
    """Address space."""

    @model_validator(mode="after")
    def _check(self) -> UnitTest:
        bad = [name for name in self.functions if not name.isidentifier()]
        if bad:
            raise ValueError(f'"functions": "{bad[0]}" is no name of a function')
        try:
            compile(self.tests, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f'"tests": {error}') from None
        return self


class Rubric(Part):
    """People or a judge rate the answer by the item's rubric; no program can."""

    type: Literal["rubric"]


class Overlapping(Part):
    """Partial credit: common tokens, longest common subsequence, or common elements of a list."""

    type: Literal["token_f1", "rouge_l", "set_f1"]


Grader = Annotated[
    Exact | Pattern | Numeric | UnitTest | Rubric | Overlapping, Field(discriminator="type")
]


class Criterion(Part):
    """One thing to rate."""

    criterion: str = Field(min_length=1)
    """What is looked at, such as "accuracy"."""
    levels: tuple[str, ...] = Field(min_length=2)
    """From worst to best, in words."""


class OpenItem(Item):
    """One prompt with a grader."""

    SCHEMA: ClassVar[str] = "open/1"

    prompt: str = Field(min_length=1)
    """All that the model is shown."""
    parent: str | None = None
    """The problem that this is a step of; it is solved when all of its steps are."""
    step: int | None = Field(default=None, ge=0)
    """Which step."""
    grader: Grader
    """How the answer is judged."""
    references: tuple[str, ...] = ()
    """Right answers."""
    rubric: tuple[Criterion, ...] = ()
    """What raters rate."""
    domain: str | None = None
    """Such as "materials"."""
    cluster: str | None = None
    """Items with the same text are not independent; null: steps of one problem are not."""

    @model_validator(mode="after")
    def _check(self) -> OpenItem:
        needs = ("exact", "token_f1", "rouge_l", "set_f1")
        if self.grader.type in needs and not self.references:
            raise ValueError(f'"references": is empty; grader "{self.grader.type}" needs one')
        if self.grader.type == "rubric" and not self.rubric:
            raise ValueError('"rubric": is empty; grader "rubric" needs a criterion')
        if self.step is not None and self.parent is None:
            raise ValueError('"step": needs "parent", the problem that it is a step of')
        return self

    def cluster_label(self) -> str:
        """Return `cluster`, the problem that this is a step of, or the id."""
        return self.cluster or self.parent or self.id
