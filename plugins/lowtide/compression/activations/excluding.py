"""Modules whose saved tensors stay as they are: told apart by name, while they run."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowtide.compression.activations.saving import Saving


class Hook:
    """A hook on a module; in copies of the module, and in pickled ones, it does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> None:
        """Listen."""
        self._function(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[Callable[..., None]]]:
        return Hook, (_nothing,)


def _nothing(*_: Any) -> None:
    """Stand for a hook where nobody listens."""


class Excluding:
    """Hooks on the modules of one model that `patterns` name.

    Attributes:
        unused: Patterns that name no module.
    """

    def __init__(self, model: torch.nn.Module, patterns: Sequence[str], saving: Saving) -> None:
        self._saving = saving
        self._handles: list[Any] = []
        named = dict(model.named_modules())
        found = {pattern: fnmatch.filter(named, pattern) for pattern in patterns}
        self.unused = [pattern for pattern, names in found.items() if not names]
        for name in dict.fromkeys(name for names in found.values() for name in names):
            self._handles += [
                named[name].register_forward_pre_hook(Hook(self._enter)),
                named[name].register_forward_hook(Hook(self._leave), always_call=True),
            ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, _module: Any, _inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._saving.excluded += 1

    def _leave(self, _module: Any, _inputs: Any, _outputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self._saving.excluded -= 1
