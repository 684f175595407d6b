"""What a study runs, as JSON: models, stacks, tasks, and how often."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lowtide.core.errors import ConfigError, listed, near, problems_text
from lowtide.evaluation.fixtures.facts import TASKS
from lowtide.evaluation.fixtures.recipes import recipe_of
from lowtide.evaluation.optimizations.stack import Stack


class _Block(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Timing(_Block):
    """How speed is measured: apart from quality, all stacks in turn, in an order drawn anew."""

    repeats: int = Field(default=5, ge=1)
    """Times that every stack is measured."""
    warmup: int = Field(default=1, ge=0)
    """Runs of each that are thrown away, right before it is measured."""
    batch: int = Field(default=8, ge=1)
    """Prompts at a time."""
    tokens: int = Field(default=16, ge=2)
    """Generated for each, always so many."""


class Plan(_Block):
    """A study."""

    models: list[str] = Field(min_length=1)
    """Fixtures, smallest first: differences between the first and the last are differences of
    scale."""
    stacks: list[list[str]] = []
    """Stacks to run, beside the dense model, which always runs."""
    pairs: list[str] = []
    """Every one of these alone, and every two that go together, in this order."""
    tasks: list[str] = list(TASKS)
    """Of the fixtures."""
    words: list[int] = Field(default=[160], min_length=1)
    """Lengths of the texts."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Of the texts and of methods that draw at random."""
    contexts: int = Field(default=32, ge=2)
    """Texts for each task, length and seed: the clusters of the statistics."""
    questions: int = Field(default=8, ge=1)
    """About each text, at most."""
    question_aware: list[bool] = Field(default=[False], min_length=1)
    """Whether the question is known when tokens and entries are chosen: other experiments."""
    batch: int = Field(default=32, ge=1)
    """Prompts at a time."""
    calibration: int = Field(default=64, ge=1)
    """Texts that methods calibrate on, from a seed that no task uses."""
    timing: Timing | None = None
    """Null: quality and bytes only."""

    @field_validator("models")
    @classmethod
    def _known_models(cls, names: list[str]) -> list[str]:
        for name in names:
            try:
                recipe_of(name)
            except KeyError as error:
                raise ValueError(str(error)) from error
        return names

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in TASKS:
                raise ValueError(f'task "{name}" is unknown.{near(name, TASKS)} {listed(TASKS)}')
        return names

    def all_stacks(self) -> tuple[list[Stack], list[str]]:
        """Return the stacks to run, dense first and each once, and why pairs were left out.

        Raises:
            ConfigError: A stack of `stacks`, or one of `pairs`, cannot be.
        """
        wanted = [Stack([]), *map(Stack, self.stacks), *(Stack([each]) for each in self.pairs)]
        refused = []
        for pair in itertools.combinations(self.pairs, 2):
            try:
                wanted.append(Stack(pair))
            except ConfigError as error:
                refused.append(str(error))
        return list({stack.name: stack for stack in wanted}.values()), refused


def read_plan(path: Path) -> Plan:
    """Return the plan in a JSON file.

    Raises:
        ConfigError: The file cannot be read, is no JSON, or holds what a plan does not.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    return plan_of(found, where=str(path))


def plan_of(found: Any, *, where: str = "plan") -> Plan:
    """Return `found`, as JSON gives it, as a plan.

    Raises:
        ConfigError: A key is unknown or a value not allowed; the message says which.
    """
    try:
        plan = Plan.model_validate(found)
    except ValidationError as error:
        raise ConfigError(problems_text(Plan, error.errors(), where)) from error
    plan.all_stacks()
    return plan
