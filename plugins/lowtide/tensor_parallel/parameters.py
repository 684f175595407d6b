"""Parameters that a user's optimizer or parameter groups hold, found again after conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lowtide.core.errors import ModelError


def listed_groups(given: Any) -> list[Any] | None:
    """Return ``model_parameters`` (parameters, or groups of them) with every generator read."""
    if given is None:
        return None
    if isinstance(given, (nn.Parameter, Mapping)):
        given = [given]
    return [
        {**entry, "params": _listed(entry["params"])} if isinstance(entry, Mapping) else entry
        for entry in given
    ]


def _listed(parameters: Any) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)


class Successors:
    """Which parameters of the converted model hold what a parameter of the old one held.

    Made before the conversion; `follow` is called after it. It keeps no parameter alive, so it can
    be asked of those alone that somebody else has held since before.

    Args:
        model: The model before.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {
            id(parameter): name for name, parameter in model.named_parameters()
        }  # a tied parameter by its first name
        self._trained = [id(each) for each in model.parameters() if each.requires_grad]
        self._new: dict[str, tuple[str, nn.Parameter]] = {}
        self._renamed: list[Mapping[str, Sequence[str]]] = []

    def follow(self, model: nn.Module, *renamed: Mapping[str, Sequence[str]]) -> None:
        """Take note of the converted model.

        Args:
            model: The model after.
            *renamed: One step each: old names to the names that replaced them.
        """
        self._renamed = list(renamed)
        self._new = {
            name: (name, parameter)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    def of(self, parameter: nn.Parameter) -> list[tuple[str, nn.Parameter]]:
        """Return names and parameters that hold `parameter`'s values now.

        Raises:
            ModelError: it was no parameter of the model.
        """
        name = self._names.get(id(parameter))
        if name is None:
            raise ModelError(
                f"a parameter of shape {tuple(parameter.shape)} in model_parameters or in the "
                f"optimizer is not one of the model's; pass parameters of the model itself"
            )
        return self._successors(name)

    def _successors(self, name: str) -> list[tuple[str, nn.Parameter]]:
        names: list[str] = [name]
        for step in self._renamed:
            names = [new for each in names for new in step.get(each, (each,))]
        return [self._new[each] for each in names]

    def groups(self, given: Iterable[Any]) -> list[Any]:
        """Return ``model_parameters``, or an optimizer's groups, with the new parameters.

        Args:
            given: Parameters, or dicts with a list of them under ``"params"``.

        Raises:
            ModelError: parameters that are one now were in groups of different settings.
        """
        entries = list(given)
        owner: dict[int, int] = {}
        if not any(isinstance(entry, Mapping) for entry in entries):
            mapped = self._mapped(entries, 0, owner)
            self._check_all(owner, entries)
            return mapped
        result: list[Any] = []
        for number, entry in enumerate(entries):
            parameters = _listed(entry["params"])
            result.append({**entry, "params": self._mapped(parameters, number, owner)})
        self._check_all(owner, [p for entry in entries for p in _listed(entry["params"])])
        return result

    def _check_all(self, owner: Mapping[int, int], given: Sequence[nn.Parameter]) -> None:
        """Refuse a joined parameter of which the user wanted a part trained and a part not."""
        chosen = {id(parameter) for parameter in given}
        for old in (self._names[each] for each in self._trained if each not in chosen):
            for name, new in self._successors(old):
                if id(new) in owner:
                    raise ModelError(
                        f"{old} is in no parameter group, but it is one "
                        f"parameter ({name}) with projections that are; put projections that read "
                        f"the same input into one group, or freeze all of them"
                    )

    def _mapped(
        self, parameters: Iterable[nn.Parameter], number: int, owner: dict[int, int]
    ) -> list[nn.Parameter]:
        mapped: list[nn.Parameter] = []
        for parameter in parameters:
            for name, new in self.of(parameter):
                before = owner.get(id(new))
                if before is None:
                    owner[id(new)] = number
                    mapped.append(new)
                elif before != number:
                    raise ModelError(
                        f"{name} joins projections that were in parameter groups {before} and "
                        f"{number}; projections that read the same input must be in one group"
                    )
        return mapped
