"""Several optimizations in order, applied to one model and undone together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import TracebackType

from torch import nn

from lowtide.core.errors import ConfigError
from lowtide.evaluation.optimizations.base import (
    Context,
    Handle,
    Optimization,
    Runtime,
    weight_bytes,
)
from lowtide.evaluation.optimizations.prompt.compressors import PromptCompressor
from lowtide.evaluation.optimizations.registry import parse
from lowtide.evaluation.optimizations.rules import refusal

DENSE = "dense"
"""How the empty stack is written."""


class Stack:
    """Optimizations in the order in which they are applied.

    The order is part of what a stack is: pruning and then quantising is another experiment than
    quantising and then pruning.

    Args:
        parts: Each as in ``["prune.wanda:0.5", "quant.gptq:4,g128", "kv.snapkv:0.5"]``.

    Raises:
        ConfigError: A part cannot be understood, or two of them do not go together.
    """

    def __init__(self, parts: Sequence[str | Optimization]) -> None:
        self.parts = tuple(parse(part) if isinstance(part, str) else part for part in parts)
        for first, second in itertools.combinations(self.parts, 2):
            reason = refusal(first, second)
            if reason is not None:
                raise ConfigError(
                    f'stack "{self.name}": "{second.spelled}" after "{first.spelled}": {reason}'
                )

    @property
    def name(self) -> str:
        """The stack as one word, order included; "dense" for the empty one."""
        return " + ".join(part.spelled for part in self.parts) or DENSE

    @property
    def needs_calibration(self) -> bool:
        """One of its parts looks at activations."""
        return any(part.needs_calibration for part in self.parts)

    @property
    def needs_question(self) -> bool:
        """One of its parts cannot work before the question is known."""
        return any(isinstance(p, PromptCompressor) and p.needs_question for p in self.parts)

    def apply(self, model: nn.Module, context: Context | None = None) -> Applied:
        """Apply every part to `model`, in order. If one fails, those before it are undone."""
        context = context or Context()
        applied = Applied(self, model, context)
        try:
            for part in self.parts:
                applied.handles.append(part.apply(model, context))
        except BaseException:
            applied.undo()
            raise
        return applied


class Applied:
    """A stack in force on a model; a context manager that undoes it at the end.

    Attributes:
        handles: Of its parts, in order.
    """

    def __init__(self, stack: Stack, model: nn.Module, context: Context) -> None:
        self.stack, self.model, self.context = stack, model, context
        self.handles: list[Handle] = []
        self._dense_bytes = weight_bytes(model)

    @property
    def runtime(self) -> Runtime:
        """What happens while a prompt is read."""
        return self.context.runtime

    def undo(self) -> None:
        """Put the model back, last part first; its outputs are those before, bit for bit."""
        for handle in reversed(self.handles):
            handle.undo()

    def bytes_report(self) -> dict[str, int]:
        """Return bytes of weights before and now, and what is held only to be able to undo."""
        return {
            "before_bytes": self._dense_bytes,
            "after_bytes": weight_bytes(self.model),
            "undo_bytes": sum(handle.bytes_report()["undo_bytes"] for handle in self.handles),
        }

    def facts(self) -> dict[str, float]:
        """Return what the parts found out about themselves, as "name.fact"."""
        return {
            f"{handle.name.partition(':')[0]}.{key}": value
            for handle in self.handles
            for key, value in handle.facts.items()
        }

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
