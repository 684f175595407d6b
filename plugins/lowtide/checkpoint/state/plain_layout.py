"""Stage 0: one file with whole parameters, whose optimizer state is numbered instead of named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lowtide.checkpoint.state.rank_files import RankFiles
from lowtide.checkpoint.state.zero_layout import MASTER, Piece, Place, hyperparameters
from lowtide.core.errors import CheckpointError


class PlainLayout:
    """Whole parameters; each is a slot of its own.

    The file numbers the parameters of the optimizer and does not say their names. One group that
    has every parameter of the model is in the model's order. Otherwise the names have to be given.
    """

    def __init__(
        self,
        files: RankFiles,
        weights: Mapping[str, torch.Tensor],
        names: Sequence[Sequence[str]] | None,
    ) -> None:
        self.files, self._weights = files, weights
        self._masters: dict[str, torch.Tensor] = {}
        self._states: dict[str, Mapping[str, Any]] = {}
        self.groups: list[dict[str, Any]] | None = None
        self.why_nameless = ""
        # Parameters that the optimizer has not got are frozen. Unless they are known, none is.
        group_of = self._name(names) or dict.fromkeys(weights, 0)
        self.places = {
            name: Place(weights[name].shape, group, slot, 0)
            for slot, (name, group) in enumerate(group_of.items())
        }
        self._names = list(self.places)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds: "fp32" and the names of the per-element optimizer states."""
        found = {MASTER: None}
        for name in self._states:
            found.update(dict.fromkeys(self._elementwise(name)))
        return tuple(found)

    def pieces(self, name: str, begin: int, end: int) -> Iterator[Piece]:
        """Yield the one place where elements `begin` to `end` of a parameter lie."""
        if begin < end:
            yield Piece(0, self.places[name].slot, begin, end - begin)

    def flat(self, rank: int, slot: int, kind: str) -> torch.Tensor:  # noqa: ARG002
        """Return a whole parameter, or a state of it, as a flat tensor."""
        name = self._names[slot]
        if kind == MASTER:
            if self.why_nameless and self._weights[name].dtype != torch.float32:
                raise CheckpointError(f"{self.files.folder}: {self.why_nameless}")
            return self._masters.get(name, self._weights[name]).reshape(-1)
        if self.why_nameless:
            raise CheckpointError(f"{self.files.folder}: {self.why_nameless}")
        found = self._elementwise(name)
        if kind not in found:
            raise CheckpointError(f'{self.files.folder}: "{name}" has no state "{kind}"')
        return found[kind].reshape(-1)

    def has(self, name: str, kind: str) -> bool:
        """Whether there is such a state; a parameter that never had a gradient has none."""
        return kind == MASTER or kind in self._elementwise(name)

    def scalars(self, name: str) -> dict[str, Any]:
        """Return the states that are one value for the whole parameter, such as "step"."""
        arrays = self._elementwise(name)
        return {k: v for k, v in self._states.get(name, {}).items() if k not in arrays}

    def _elementwise(self, name: str) -> dict[str, torch.Tensor]:
        shape = self._weights[name].shape
        return {
            key: value
            for key, value in self._states.get(name, {}).items()
            if torch.is_tensor(value) and value.shape == shape and key != "step"
        }

    def _name(self, names: Sequence[Sequence[str]] | None) -> dict[str, int]:
        """Give the numbered states their names; return the group of each name."""
        found = self.files.model().get("optimizer")
        if not found:
            return {}
        # With 16-bit weights, DeepSpeed wraps the optimizer and keeps float32 masters beside it.
        base = found.get("optimizer_state_dict", found)
        masters = found.get("fp32_groups")
        numbered = [group["params"] for group in base["param_groups"]] if "state" in base else None
        if numbered is None or "fp32_groups_flat" in found:
            self.why_nameless = (
                "is of stage 0 with an optimizer wrapper whose layout Lowtide does not know "
                f"({', '.join(sorted(found))}); load it with DeepSpeed"
            )
            return {}
        self.groups = hyperparameters(base["param_groups"])
        counts = [len(group) for group in numbered]
        # One group with all parameters is in the model's order, whatever it was asked for.
        whole = [list(self._weights)]
        names = next((g for g in (names, whole) if g and [*map(len, g)] == counts), None)
        if names is None:
            self.why_nameless = (
                f"is of stage 0, whose optimizer state has numbers ({counts} per group) instead of "
                "names; give names=, the names of its parameters group by group"
            )
            return {}
        for index, group in enumerate(names):
            for position, name in enumerate(group):
                if name not in self._weights:
                    raise CheckpointError(
                        f'{self.files.folder}: names= has "{name}", which the checkpoint has not'
                    )
                self._states[name] = base["state"].get(numbered[index][position], {})
                if masters is not None:
                    self._masters[name] = masters[index][position].detach()
                self._check(name)
        return {name: index for index, group in enumerate(names) for name in group}

    def _check(self, name: str) -> None:
        shape = self._weights[name].shape
        for key, value in [(MASTER, self._masters.get(name)), *self._states[name].items()]:
            if torch.is_tensor(value) and value.numel() != 1 and value.shape != shape:
                raise CheckpointError(
                    f'{self.files.folder}: "{name}" has shape {tuple(shape)}, the "{key}" at its '
                    f"place in the optimizer {tuple(value.shape)}; give names= in the order in "
                    "which the optimizer was given its parameters"
                )
