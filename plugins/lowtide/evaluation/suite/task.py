"""What a task is: items, how a model is asked about them, and which figures come of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import Field

from lowtide.core.registry import Registry
from lowtide.evaluation.models.protocol import Model
from lowtide.evaluation.statistics import mean
from lowtide.evaluation.statistics.clusters import Statistic
from lowtide.evaluation.tasks.items import Part, canonical_hash

_NAME = r"^[A-Za-z0-9_.\-]+$"


class TaskSettings(Part):
    """What all tasks of a suite have."""

    name: str = Field(pattern=_NAME)
    """As rows, reports and scalars have it; unique in the suite."""
    kind: str
    """Which task it is."""
    file: str
    """Where its items are, seen from the suite's own folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a task.

    Attributes:
        columns: Scores of rows that it is made of.
        statistic: From the means of the columns to the figure.
        is_higher_better: Which way is up.
    """

    columns: tuple[str, ...]
    statistic: Statistic = mean
    is_higher_better: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One item as the runner sees it.

    Attributes:
        id: Unique in the task.
        cluster: What it shares with others.
        hash: Of what it says.
        content: For the task alone.
    """

    id: str
    cluster: str
    hash: str
    content: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one item.

    Attributes:
        scores: Figures by name; empty where people have to rate.
        output: What the model said, for people and exporters.
        target: What was wanted.
        prompt: What was asked.
        detail: Plain JSON that the task's `summarise` reads.
    """

    scores: Mapping[str, float]
    output: str = ""
    target: str = ""
    prompt: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


S = TypeVar("S", bound=TaskSettings)


class Task(ABC, Generic[S]):
    """One entry of a suite.

    Args:
        settings: Checked.
        folder: From where `file` is seen.
    """

    Settings: ClassVar[type[TaskSettings]]
    PRIMARY: ClassVar[str]
    """The metric that is compared."""
    METRICS: ClassVar[Mapping[str, Metric]] = {}
    """What is more than the mean of one score."""
    HIDDEN: ClassVar[frozenset[str]] = frozenset()
    """Scores that only `METRICS` read."""

    def __init__(self, settings: S, folder: Path) -> None:
        self.settings = settings
        self.path = folder / settings.file

    @property
    def name(self) -> str:
        """Its name in the suite."""
        return self.settings.name

    def settings_hash(self) -> str:
        """Return a hash of what decides how items are asked and graded; not of the file's place."""
        return canonical_hash(self.settings.model_dump(exclude={"name", "file"}))

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """Return all items.

        Raises:
            DataError: the file cannot be read, or has a row that is not right.
        """

    @abstractmethod
    def evaluate(self, questions: Sequence[Question], model: Model, seed: int) -> list[Outcome]:
        """Ask the model about some items; one outcome for each, in order.

        A task asks the model the same number of times, whatever the items are: ranks that hold
        parts of one model go through this together.

        Raises:
            DataError: the model cannot be asked this.
        """

    @classmethod
    def summarise(cls, _details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what is to be said of all rows beside metrics, as plain JSON."""
        return {}


def metrics_of(kind: type[Task[Any]], scores: Sequence[str]) -> dict[str, Metric]:
    """Return the metrics of rows with these scores, the primary one first."""
    found: dict[str, Metric] = {
        name: metric for name, metric in kind.METRICS.items() if set(metric.columns) <= set(scores)
    }
    for name in scores:
        if name not in kind.HIDDEN and name not in found:
            found[name] = Metric(columns=(name,), is_higher_better=name not in _LOWER)
    return dict(sorted(found.items(), key=lambda pair: pair[0] != kind.PRIMARY))


_LOWER = frozenset({"brier", "answer_words"})

# Kinds of tasks by the name that suites give. Other packages add theirs by entry points.
task_kinds: Registry[Task[Any]] = Registry("task kind", "lowtide.evaluation.tasks", Task)
task_kinds.register("mcq", "lowtide.evaluation.suite.multiple_choice:McqTask")
task_kinds.register("open", "lowtide.evaluation.suite.open_answers:OpenTask")
task_kinds.register("longctx", "lowtide.evaluation.suite.long_answers:LongContextTask")
task_kinds.register("loss", "lowtide.evaluation.suite.losses:LossTask")
