"""A checkpoint as parameters, whatever number of ranks and ZeRO stage wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.state.plain_layout import PlainLayout
from lowtide.checkpoint.state.rank_files import RankFiles, tag_folder
from lowtide.checkpoint.state.zero_layout import MASTER, GroupLayout, Layout, PartLayout
from lowtide.core.errors import CheckpointError, listed, near


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model.

    Attributes:
        name: Its name in the model.
        shape: Its whole shape.
        group: Number of its parameter group in the optimizer, or None when the optimizer has not
            got it (frozen, or without elements).
    """

    name: str
    shape: torch.Size
    group: int | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


class CheckpointState:
    """A view of one checkpoint in which any interval of any parameter can be read.

    Kinds are "fp32" (the optimizer's master copy; a frozen parameter as it is stored) and the
    names of the optimizer's per-element states, such as "exp_avg". Reading an interval opens only
    the rank files that hold a part of it, and takes only its bytes from the disk.

    Attributes:
        folder: The checkpoint's folder.
        files: Its files.
        stage: ZeRO stage that wrote it.
        world_size: Number of ranks that ZeRO divided the optimizer over.
        parameters: All parameters by name; tied ones once.
        shared: For each further name of a tied parameter, the name it has in `parameters`.
    """

    def __init__(self, folder: Path, *, names: Sequence[Sequence[str]] | None = None) -> None:
        """Open `folder`, that of one tag; see `open_state`."""
        self.folder = folder
        self.files = RankFiles(folder)
        self.stage, self.world_size = self.files.stage, self.files.world_size
        model = self.files.model()
        self._module: dict[str, torch.Tensor] = {
            name: value for name, value in model["module"].items() if torch.is_tensor(value)
        }
        self._buffer_names = [name for name in model["buffer_names"] if name in self._module]
        self.shared: dict[str, str] = dict(model.get("shared_params") or self._tied())
        self._layout: Layout
        if self.stage == 0:
            self._plain = PlainLayout(self.files, self._rest(set()), names)
            self._layout = self._plain
        elif self.stage == 3:
            self._layout = PartLayout(self.files)
        else:
            self._layout = GroupLayout(self.files)
        frozen = self._frozen_shapes()
        self.parameters = {name: Parameter(name, shape, None) for name, shape in frozen.items()}
        for name, place in self._layout.places.items():
            self.parameters[name] = Parameter(name, place.shape, place.group)

    @property
    def model(self) -> Mapping[str, Any]:
        """What rank 0's model file holds: scheduler, counters, the script's own state."""
        return self.files.model()

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """What rank 0's optimizer file holds; the wrapper's state for stage 0."""
        if self.stage:
            return self.files.optimizer(0)
        return self.model.get("optimizer") or {}

    @property
    def groups(self) -> list[dict[str, Any]] | None:
        """Hyperparameters per group, or None where they are not stored ("elastic_checkpoint")."""
        return self._layout.groups

    @property
    def why_nameless(self) -> str:
        """Why the optimizer's states cannot be told apart (stage 0), or an empty string."""
        return self._plain.why_nameless if self.stage == 0 else ""

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds: "fp32" and the names of the optimizer's per-element states."""
        return self._layout.kinds

    @cached_property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers by name, as they are stored."""
        return {name: self._module[name] for name in self._buffer_names}

    def canonical(self, name: str) -> str:
        """Return the name under which a parameter, tied or not, is in `parameters`.

        Raises:
            CheckpointError: the checkpoint has no such parameter.
        """
        found = name if name in self.parameters else self.shared.get(name, name)
        if found not in self.parameters:
            raise CheckpointError(
                f'{self.folder}: has no parameter "{name}".{near(name, self.parameters)} It has '
                f"{listed(self.parameters)}"
            )
        return found

    def has(self, name: str, kind: str) -> bool:
        """Whether a parameter has a state of this kind (frozen ones have "fp32" only)."""
        parameter = self.parameters[self.canonical(name)]
        if kind == MASTER:
            return True
        if parameter.group is None or kind not in self.kinds:
            return False
        return self.stage != 0 or self._plain.has(parameter.name, kind)

    def scalars(self, name: str) -> dict[str, Any]:
        """Return the states that are one value for the whole parameter, such as "step"."""
        parameter = self.parameters[self.canonical(name)]
        return {} if parameter.group is None else self._layout.scalars(parameter.name)

    def runs(self, name: str, kind: str, begin: int, end: int) -> Iterator[torch.Tensor]:
        """Yield elements `begin` to `end` of the flat parameter as views of the mapped files.

        Raises:
            CheckpointError: there is no such parameter, kind or interval, or a file is damaged.
        """
        parameter = self.parameters[self.canonical(name)]
        if not 0 <= begin <= end <= parameter.numel:
            raise CheckpointError(
                f'{self.folder}: "{name}" has elements 0 to {parameter.numel}, not {begin} to {end}'
            )
        if parameter.group is None:
            if kind != MASTER:
                raise CheckpointError(
                    f'{self.folder}: "{name}" is frozen and has no "{kind}"; allowed is "{MASTER}"'
                )
            yield from self._frozen_runs(parameter, begin, end)
            return
        for piece in self._layout.pieces(parameter.name, begin, end):
            flat = self._layout.flat(piece.rank, piece.slot, kind)
            if piece.offset + piece.count > flat.numel():
                raise CheckpointError(
                    f'{self.folder}: rank {piece.rank} keeps {flat.numel()} elements of "{kind}" '
                    f'in group {piece.slot}, "{name}" needs {piece.offset + piece.count}; the '
                    "folder mixes two checkpoints, load another"
                )
            yield flat.detach().narrow(0, piece.offset, piece.count)

    def read(self, name: str, kind: str, begin: int, end: int) -> torch.Tensor:
        """Return elements `begin` to `end` of the flat parameter, as a copy.

        Raises:
            CheckpointError: there is no such parameter, kind or interval, or a file is damaged.
        """
        return torch.cat([*self.runs(name, kind, begin, end)] or [torch.empty(0)])

    def read_into(self, out: torch.Tensor, name: str, kind: str, begin: int) -> None:
        """Fill the flat tensor `out` with the elements from `begin` on, in the dtype of `out`.

        Raises:
            CheckpointError: there is no such parameter, kind or interval, or a file is damaged.
        """
        position = 0
        for run in self.runs(name, kind, begin, begin + out.numel()):
            out.narrow(0, position, run.numel()).copy_(run)
            position += run.numel()

    def dtype(self, name: str, kind: str = MASTER) -> torch.dtype:
        """Return in which dtype a state of a parameter is stored."""
        parameter = self.parameters[self.canonical(name)]
        if parameter.numel == 0:
            return self._module[parameter.name].dtype
        return next(self.runs(name, kind, 0, 1)).dtype

    def tensor(self, name: str, kind: str = MASTER) -> torch.Tensor:
        """Return a whole parameter, or a whole state of it, as a copy.

        Raises:
            CheckpointError: there is no such parameter or kind, or a file is damaged.
        """
        parameter = self.parameters[self.canonical(name)]
        if parameter.numel == 0:
            return torch.empty(parameter.shape, dtype=self.dtype(name))
        return self.read(name, kind, 0, parameter.numel).view(parameter.shape)

    def _rest(self, known: set[str]) -> dict[str, torch.Tensor]:
        """Return what the model file has beside buffers, further names and `known` parameters."""
        leave = {*self._buffer_names, *self.shared, *known}
        return {name: value for name, value in self._module.items() if name not in leave}

    def _frozen_shapes(self) -> dict[str, torch.Size]:
        stored = self.model.get("frozen_param_shapes")
        if stored is not None or self.stage == 3:
            return {name: torch.Size(shape) for name, shape in (stored or {}).items()}
        # Stage 1 does not list them, but its model file has them, as below stage 3 it has all.
        rest = self._rest(set(self._layout.places))
        return {name: value.shape for name, value in rest.items()}

    def _frozen_runs(self, parameter: Parameter, begin: int, end: int) -> Iterator[torch.Tensor]:
        if self.stage != 3:
            whole = self._module[parameter.name]
            yield whole.detach().reshape(-1)[begin:end]
            return
        part = max(1, math.ceil(parameter.numel / self.world_size))
        while begin < end:
            rank, offset = divmod(begin, part)
            count = min(part - offset, end - begin)
            fragment = self.files.model(rank)["frozen_param_fragments"][parameter.name]
            yield fragment.reshape(-1).narrow(0, offset, count)
            begin += count

    def _tied(self) -> dict[str, str]:
        """Find tied parameters where nothing lists them (stage 0): they share their storage."""
        first: dict[tuple[Any, ...], str] = {}
        found = {}
        for name, value in self._module.items():
            if name in self._buffer_names or value.numel() == 0:
                continue
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
            if first.setdefault(key, name) != name:
                found[name] = first[key]
        return found


def open_state(
    checkpoint: Path, *, names: Sequence[Sequence[str]] | None = None
) -> CheckpointState:
    """Open a checkpoint that DeepSpeed 0.19 wrote with ZeRO stage 0, 1, 2 or 3.

    Args:
        checkpoint: The folder of one tag, or a folder with the file ``latest``.
        names: For stage 0 with several groups or with frozen parameters: the names of the
            parameters in the order in which the optimizer was given them, group by group. The
            file does not have them. Only what needs them asks for them.

    Raises:
        CheckpointError: there is no checkpoint, files are missing or damaged, or it was written
            with tensor, pipeline or expert parallelism.
    """
    folder = tag_folder(Path(checkpoint))
    try:
        return CheckpointState(folder, names=names)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: "
            f"{error}); load it with the version that wrote it"
        ) from error
