"""Where ZeRO keeps each element of each parameter: from names and intervals to rank files.

Stages 1 and 2 lay the parameters of a group end to end and cut the whole into equal partitions, so
a parameter may begin in one rank's file and end in another's. Stage 3 cuts every parameter by
itself into equal parts, one per rank, and lays a rank's parts of a sub-group end to end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lowtide.checkpoint.state.rank_files import RankFiles
from lowtide.core.errors import CheckpointError, listed

MASTER = "fp32"


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of one parameter that lie side by side in one tensor of one rank.

    Attributes:
        rank: Whose file.
        slot: Which of its flat tensors: the parameter group, or stage 3's sub-group.
        offset: First element in that tensor.
        count: Number of elements.
    """

    rank: int
    slot: int
    offset: int
    count: int


@dataclass(frozen=True)
class Place:
    """Where a parameter that the optimizer updates lies.

    Attributes:
        shape: Its shape.
        group: Its parameter group.
        slot: The flat tensor it lies in.
        offset: First element: in the undivided group, or in each rank's sub-group for stage 3.
    """

    shape: torch.Size
    group: int
    slot: int
    offset: int


class Layout(Protocol):
    """What `CheckpointState` asks about the parameters that the optimizer updates."""

    places: dict[str, Place]
    groups: list[dict[str, Any]] | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds: "fp32" and the names of the per-element optimizer states."""

    def pieces(self, name: str, begin: int, end: int) -> Iterator[Piece]:
        """Yield where elements `begin` to `end` of a parameter lie, in order."""

    def flat(self, rank: int, slot: int, kind: str) -> torch.Tensor:
        """Return a flat tensor of one rank."""

    def scalars(self, name: str) -> dict[str, Any]:
        """Return the states that are one value for the whole parameter, such as "step"."""


def shapes_of(found: Any) -> list[dict[str, torch.Size]]:
    """Return ``param_shapes`` of a model file with plain torch sizes."""
    return [{name: torch.Size(shape) for name, shape in group.items()} for group in found]


def hyperparameters(groups: Any) -> list[dict[str, Any]]:
    """Return parameter groups without their parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


class _FlatLayout(ABC):
    """What the stages have in common: the tensors of slots."""

    places: dict[str, Place]
    groups: list[dict[str, Any]] | None

    def __init__(self, files: RankFiles) -> None:
        self.files = files
        self._checked = {0}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds: "fp32" and the names of the per-element optimizer states."""
        found = {MASTER: None}
        for slot in range(len(self._masters(0))):
            found.update(dict.fromkeys(self._elementwise(0, slot)))
        return tuple(found)

    def flat(self, rank: int, slot: int, kind: str) -> torch.Tensor:
        """Return a flat tensor of one rank."""
        if rank not in self._checked:
            self._check_rank(rank)
        if kind == MASTER:
            return self._masters(rank)[slot]
        found = self._elementwise(rank, slot)
        if kind not in found:
            known = listed([MASTER, *found])
            raise CheckpointError(
                f'{self.files.folder}: rank {rank} has no state "{kind}" in group {slot}; there '
                f"are {known}"
            )
        return found[kind]

    def scalars(self, name: str) -> dict[str, Any]:
        """Return the states that are one value for the whole parameter, such as "step"."""
        slot = self.places[name].slot
        arrays = self._elementwise(0, slot)
        return {key: value for key, value in self._state(0, slot).items() if key not in arrays}

    def _elementwise(self, rank: int, slot: int) -> dict[str, torch.Tensor]:
        sizes = self._sizes(rank, slot)
        found = {}
        for key, value in self._state(rank, slot).items():
            if torch.is_tensor(value) and value.dim() == 1 and value.numel() in sizes:
                found[key] = value
            elif torch.is_tensor(value) and value.numel() != 1:
                raise CheckpointError(
                    f'{self.files.folder}: state "{key}" of group {slot} has shape '
                    f"{tuple(value.shape)}, not one value per element ({sizes[-1]}); Lowtide "
                    "cannot divide it again; load with the number of ranks that saved it"
                )
        return found

    @abstractmethod
    def _masters(self, rank: int) -> list[torch.Tensor]: ...

    @abstractmethod
    def _state(self, rank: int, slot: int) -> Mapping[str, Any]: ...

    def _sizes(self, rank: int, slot: int) -> tuple[int, ...]:
        return (self._masters(rank)[slot].numel(),)

    def _check_rank(self, rank: int) -> None:
        """Refuse a file that a run of the same name left at another step."""
        for slot in range(len(self._masters(0))):
            first, found = (self._state(r, slot).get("step") for r in (0, rank))
            if (first is None) != (found is None) or (first is not None and first != found):
                raise CheckpointError(
                    f"{self.files.folder}: rank {rank} is at step {found}, rank 0 at step {first}; "
                    "the folder mixes two checkpoints, load another"
                )
        self._checked.add(rank)

    def _check_sizes(self, found: list[int], wanted: list[int]) -> None:
        if found != wanted:
            raise CheckpointError(
                f"{self.files.folder}: rank 0 keeps {found} elements per group, its parameters "
                f"need {wanted}; this is a layout that Lowtide does not know (NVMe offload, MiCS "
                "or Muon); load it with DeepSpeed and the number of ranks that saved it"
            )


class GroupLayout(_FlatLayout):
    """Stages 1 and 2: groups laid end to end, then cut."""

    def __init__(self, files: RankFiles) -> None:
        super().__init__(files)
        first, shapes = files.optimizer(0), shapes_of(files.model()["param_shapes"])
        paddings = first.get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        self.places, self._partition_sizes, needed = {}, [], []
        for slot, (group, padding) in enumerate(zip(shapes, paddings, strict=True)):
            offset = 0
            for (name, shape), gap in zip(group.items(), padding, strict=True):
                self.places[name] = Place(shape, slot, slot, offset)
                offset += shape.numel() + gap
            # Cut into even parts of an even number of elements (NCCL's start alignment).
            part = 2 * math.ceil(offset / (2 * files.world_size))
            self._partition_sizes.append(part)
            # The padding at the end is left out, but for the class that writes no stage.
            needed.append(min(part, offset) if "zero_stage" in first else part)
        self._check_sizes([tensor.numel() for tensor in self._masters(0)], needed)
        base = first["base_optimizer_state"]
        self.groups = hyperparameters(base["param_groups"]) if isinstance(base, dict) else None

    def pieces(self, name: str, begin: int, end: int) -> Iterator[Piece]:
        """Yield where elements `begin` to `end` of a parameter lie, in order."""
        place = self.places[name]
        part = self._partition_sizes[place.slot]
        position, stop = place.offset + begin, place.offset + end
        while position < stop:
            rank, offset = divmod(position, part)
            count = min(part - offset, stop - position)
            yield Piece(rank, place.slot, offset, count)
            position += count

    def _masters(self, rank: int) -> list[torch.Tensor]:
        return self.files.optimizer(rank)["single_partition_of_fp32_groups"]

    def _state(self, rank: int, slot: int) -> Mapping[str, Any]:
        base = self.files.optimizer(rank)["base_optimizer_state"]
        if isinstance(base, list):  # "elastic_checkpoint"
            return base[slot]
        (key,) = base["param_groups"][slot]["params"]
        return base["state"].get(key, {})

    def _sizes(self, rank: int, slot: int) -> tuple[int, ...]:
        # States are stored with the padding at the end of the group, masters without.
        return (self._masters(rank)[slot].numel(), self._partition_sizes[slot])


class PartLayout(_FlatLayout):
    """Stage 3: every parameter cut by itself."""

    def __init__(self, files: RankFiles) -> None:
        super().__init__(files)
        base = files.optimizer(0)["optimizer_state_dict"]
        shapes = shapes_of(files.model()["param_shapes"])
        group_of = {key: i for i, g in enumerate(base["param_groups"]) for key in g["params"]}
        self.places, needed = {}, []
        for slot, sub_group in enumerate(shapes):
            offset = 0
            for name, shape in sub_group.items():
                self.places[name] = Place(shape, group_of.get(slot, 0), slot, offset)
                offset += self.part_size(shape)
            needed.append(offset)
        self._check_sizes([tensor.numel() for tensor in self._masters(0)], needed)
        self.groups = hyperparameters(base["param_groups"])

    def part_size(self, shape: torch.Size) -> int:
        """Return how many elements of a parameter each rank keeps; the last may have padding."""
        return math.ceil(shape.numel() / self.files.world_size)

    def pieces(self, name: str, begin: int, end: int) -> Iterator[Piece]:
        """Yield where elements `begin` to `end` of a parameter lie, in order."""
        place = self.places[name]
        part = self.part_size(place.shape)
        while begin < end:
            rank, offset = divmod(begin, part)
            count = min(part - offset, end - begin)
            yield Piece(rank, place.slot, place.offset + offset, count)
            begin += count

    def _masters(self, rank: int) -> list[torch.Tensor]:
        return self.files.optimizer(rank)["fp32_flat_groups"]

    def _state(self, rank: int, slot: int) -> Mapping[str, Any]:
        return self.files.optimizer(rank)["optimizer_state_dict"]["state"].get(slot, {})
