"""The files of one DeepSpeed checkpoint folder: which there are, and opening them one by one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.compact.table import refuse_compact
from lowtide.core.errors import CheckpointError, listed

_OPTIMIZER_FILE = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_EXPERT_KEYS = ("num_experts", "ds_autoep_layers", "autoep_layers")


def tag_folder(checkpoint: Path) -> Path:
    """Return the folder that holds the files: `checkpoint` itself, or what its ``latest`` names.

    Raises:
        CheckpointError: there is neither, or it is a compact copy.
    """
    if next(checkpoint.glob("*_states.pt"), None) is not None:
        return checkpoint
    refuse_compact(checkpoint)
    latest = checkpoint / "latest"
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{checkpoint}: holds neither *_states.pt nor a readable file latest ({error}); "
            "give the folder of one tag, or the folder that save_checkpoint was given"
        ) from error
    if tag and next((checkpoint / tag).glob("*_states.pt"), None) is not None:
        return checkpoint / tag
    if tag:
        refuse_compact(checkpoint / tag)
    raise CheckpointError(
        f'{latest}: names "{tag}", which is no checkpoint; give the folder of a tag that is one'
    )


class RankFiles:
    """The files that the ranks of one run wrote; each is opened when it is first needed.

    Opening maps a file into memory: only what is then read of its tensors comes from the disk.
    As everything that DeepSpeed stores, the files are pickles: load only what you trust.

    Attributes:
        folder: Where they are.
        stage: ZeRO stage that wrote them.
        world_size: Number of ranks that ZeRO divided the optimizer over; 1 for stage 0.
        own: The rank whose files are looked at first. Other than None, the folder may hold only
            those: it is on a disk that only one node sees.
        opened: Names of the files opened so far.
    """

    def __init__(self, folder: Path, *, own: int | None = None) -> None:
        self.folder = folder
        self.own = own
        self.opened: list[str] = []
        self._models: dict[int, dict[str, Any]] = {}
        self._optimizers: dict[int, dict[str, Any]] = {}
        self._prefix, found = self._look()
        self.stage, self.world_size = 0, 1
        if found:
            first = self._first_optimizer()
            # ZeRO 1 in bfloat16 with float32 accumulation has an optimizer class of its own,
            # which does not write the stage.
            self.stage = int(first.get("zero_stage", 1))
            self.world_size = self._count(first)
            if found != set(range(self.world_size)) and own is None:
                raise CheckpointError(
                    f"{folder}: was written by {self.world_size} ranks, but has the optimizer "
                    f"files of ranks {sorted(found)}; a part is missing or an older checkpoint of "
                    "the same name was overwritten; load another checkpoint"
                )
        self._refuse_model_parallel()

    @property
    def is_bf16(self) -> bool:
        """Whether the names of the optimizer files carry the prefix of bfloat16 training."""
        return self._prefix == "bf16_"

    def model(self, rank: int | None = None) -> dict[str, Any]:
        """Return what the model file of `rank` holds; below stage 3 there is only rank 0's.

        Args:
            rank: A rank, or None for `own` or else 0.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        rank = (self.own or 0) if rank is None else rank
        if rank not in self._models:
            prefix = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
            self._models[rank] = self._open(f"{prefix}mp_rank_00_model_states.pt")
        return self._models[rank]

    def optimizer(self, rank: int) -> dict[str, Any]:
        """Return the ZeRO optimizer state of `rank`.

        Raises:
            CheckpointError: the file is missing, damaged or of another checkpoint.
        """
        if rank not in self._optimizers:
            name = f"{self._prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            found = self._open(name).get("optimizer_state_dict")
            if not isinstance(found, dict):
                raise CheckpointError(
                    f"{self.folder / name}: has no optimizer_state_dict; load another checkpoint"
                )
            self._optimizers[rank] = found
            first = self._optimizers.get(0, found)
            for key in ("zero_stage", "partition_count"):
                here, there = (getattr(x.get(key), "value", x.get(key)) for x in (found, first))
                if here != there:
                    raise CheckpointError(
                        f"{self.folder / name}: its {key} is {here}, that of rank 0 is {there}; "
                        "the folder mixes two checkpoints, load another"
                    )
        return self._optimizers[rank]

    def _look(self) -> tuple[str, set[int]]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is no folder; give the folder of one tag")
        found: dict[str, set[int]] = {}
        for path in self.folder.iterdir():
            optimizer = _OPTIMIZER_FILE.fullmatch(path.name)
            model = _MODEL_FILE.fullmatch(path.name)
            parallel_rank = (optimizer or model or (0, 0, 0))[3 if optimizer else 2]
            is_other = path.name.endswith("_states.pt") and not (optimizer or model)
            if int(parallel_rank) or is_other:
                raise CheckpointError(
                    f"{path}: is a file of tensor, pipeline or expert parallelism; Lowtide reads "
                    "data-parallel checkpoints (ZeRO 0 to 3); use DeepSpeed's ds_to_universal"
                )
            if optimizer:
                found.setdefault(optimizer[1] or "", set()).add(int(optimizer[2]))
        if len(found) > 1:
            raise CheckpointError(
                f"{self.folder}: has optimizer files with and without the prefix bf16_; it mixes "
                "two checkpoints; remove the older files or load another checkpoint"
            )
        return next(iter(found.items()), ("", set()))

    def _first_optimizer(self) -> dict[str, Any]:
        return self.optimizer(self.own or 0)

    def _count(self, first: dict[str, Any]) -> int:
        counts = first.get("partition_count", 1)
        different = set(counts) if isinstance(counts, list | tuple) else {counts}
        if len(different) != 1 or first.get("ds_zero_partition_groups"):
            raise CheckpointError(
                f"{self.folder}: its parameter groups are divided over different sets of ranks "
                f"({counts}), as expert parallelism does; Lowtide reads data-parallel checkpoints; "
                "use DeepSpeed's ds_to_universal"
            )
        return int(different.pop())

    def _refuse_model_parallel(self) -> None:
        model = self.model()
        degrees = model.get("checkpoint_parallel_dimensions") or {}
        found = {
            "mp_world_size": model.get("mp_world_size", 1),
            "tp_degree": degrees.get("tp_degree", 1),
            "pp_degree": degrees.get("pp_degree", 1),
        }
        parallel = [f"{key} {value}" for key, value in found.items() if value not in (None, 1)]
        parallel += [key for key in _EXPERT_KEYS if model.get(key)]
        if parallel or not isinstance(model.get("module"), dict):
            why = ", ".join(parallel) or "no module in its model file"
            raise CheckpointError(
                f"{self.folder}: was written with model parallelism ({why}); Lowtide reads "
                "data-parallel checkpoints (ZeRO 0 to 3); use DeepSpeed's ds_to_universal"
            )

    def _open(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            with open(path, "rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
            # "checkpoint_serialization": false writes the old format, which cannot be mapped.
            found = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=False)
        except FileNotFoundError as error:
            there = listed(p.name for p in self.folder.glob("*.pt"))
            raise CheckpointError(
                f"{path}: is missing; the folder has {there}; load another checkpoint"
            ) from error
        except Exception as error:  # unpickling raises whatever the bytes say
            raise CheckpointError(
                f"{path}: cannot be read ({type(error).__name__}: {error}); load another checkpoint"
            ) from error
        self.opened.append(name)
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{path}: holds a {type(found).__name__} instead of a dict; load another checkpoint"
            )
        return found
