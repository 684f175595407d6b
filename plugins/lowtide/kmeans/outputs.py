"""What modules give out, sampled while a forward runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowtide.kmeans.adapters.replicas import Replicas
from lowtide.kmeans.vectors import of_activation


class Outputs:
    """Hooks on modules, set only for the forward whose outputs are clustered."""

    def __init__(
        self,
        model: torch.nn.Module,
        names: Sequence[str],
        width: int,
        limit: int,
        replicas: Replicas,
    ) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._width = width
        self._limit = limit
        self._replicas = replicas
        self._handles: list[Any] = []
        self._held: dict[str, Tensor] = {}

    def open(self) -> None:
        """Sample from now on; where it is open already, nothing changes."""
        if self._handles:
            return
        self._held.clear()
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def close(self) -> None:
        """Remove the hooks; what was sampled stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[tuple[str, Tensor]]:
        """Return float32 (n, width) by module and forget it; every module has an entry.

        One without an output of the right shape has no vectors, so that the ranks agree on how
        many fits there are.
        """
        self.close()
        held, self._held = self._held, {}
        empty = torch.empty(0, self._width)
        return [(name, held.get(name, empty)) for name in self._modules]

    def _hook(self, name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            # The first micro-batch is the sample: later ones would only add time.
            if name not in self._held and isinstance(first, Tensor):
                found = of_activation(first, self._width, self._limit, self._replicas)
                if found is not None:
                    self._held[name] = found

        return hook
