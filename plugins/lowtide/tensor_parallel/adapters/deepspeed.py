"""Makes DeepSpeed train a model that is spread over ranks (DeepSpeed 0.19.8).

DeepSpeed learns the groups from an mpu object: then data loaders, gradient averaging, norms,
clipping and the names of checkpoint files go by them. What each parameter is of the whole model
stands in `universal_checkpoint_info`, so that DeepSpeed's own universal checkpoints can change
the degree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowtide.core.errors import ConfigError, ModelError
from lowtide.core.lifecycle import Moment
from lowtide.core.restart import read_record
from lowtide.tensor_parallel.adapters.mpu import ModelParallelUnit
from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.layers import Part
from lowtide.tensor_parallel.layout import Layout, build_layout
from lowtide.tensor_parallel.sharding import Shards, sharded_parameters, whole_of_one


def layout(moment: Moment, degree: int) -> Layout:
    """Return the groups: those of the user's mpu, or new ones.

    Raises:
        ConfigError: the user's mpu has another degree, or the degree does not divide.
    """
    import deepspeed

    if not dist.is_initialized():
        deepspeed.init_distributed()
    _choose_device()
    mpu = moment.data.get("mpu")
    if mpu is None:
        return build_layout(degree)
    tensor, data = mpu.get_model_parallel_group(), mpu.get_data_parallel_group()
    size = mpu.get_model_parallel_world_size()
    if size != degree:
        raise ConfigError(
            f"lowtide.tensor_parallel.degree: got {degree}, but the mpu given to initialize has "
            f"{size} model-parallel ranks; make them equal"
        )
    ranks = tuple(dist.get_process_group_ranks(tensor))
    return Layout(tensor, data, ranks, tuple(dist.get_process_group_ranks(data)))


def _choose_device() -> None:
    """Make this rank's GPU the current one, as the engine does, but only after the conversion.

    Without it every rank of a node would send the decompositions from GPU 0.
    """
    from deepspeed.accelerator import get_accelerator

    local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if local_rank >= 0:
        get_accelerator().set_device(local_rank)


def prepare(moment: Moment, shards: Shards, groups: Layout) -> None:
    """Tell DeepSpeed the groups, and what each parameter is part of."""
    if moment.data.get("mpu") is None:
        moment.data["mpu"] = ModelParallelUnit(groups)
    info = universal_checkpoint_info(shards.model, shards.group.size)
    shards.model.universal_checkpoint_info = info  # type: ignore[assignment]


def universal_checkpoint_info(model: nn.Module, degree: int) -> dict[str, Any]:
    """Describe the parameters for ``ds_to_universal.py``: what is copied, joined, and how.

    Each parameter also gets the description that a universal checkpoint is read back by.

    Args:
        model: Sharded.
        degree: Number of ranks.

    Returns:
        Plain data, saved with every checkpoint.
    """
    from deepspeed.checkpoint import constants

    version = constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
    lists: dict[str, list[Any]] = {
        constants.TP_REPLICATED_PARAMETER_PATTERNS: [],
        constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: [],
        constants.VOCABULARY_PARAMETER_PATTERNS: [],
        constants.PARAMETER_WITH_SUB_PARAMS: [],
    }
    widths: dict[str, list[list[int]]] = {}
    info: dict[str, Any] = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: version}
    seen: set[int] = set()
    for name, parts in sharded_parameters(model):
        parameter = model.get_parameter(name)
        if id(parameter) in seen:  # a tied head: saved once, as the embedding
            continue
        seen.add(id(parameter))
        pattern = f"^{re.escape(name)}$"
        first = parts[0]
        if first.padded is not None:  # DeepSpeed cuts the padding off and puts its own on
            lists[constants.VOCABULARY_PARAMETER_PATTERNS].append(pattern)
            info[constants.ORIGINAL_VOCAB_SIZE] = first.blocks[0]
            continue
        meta: dict[str, Any] = {
            "partition_dim": first.dim,
            "replicated": first.dim is None,
            "logical_shape": tuple(_whole_shape(parameter, parts, degree)),
            constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: version,
        }
        blocks = [block for part in parts for block in part.blocks]
        if first.dim is None:
            lists[constants.TP_REPLICATED_PARAMETER_PATTERNS].append(pattern)
        elif first.dim == 1:
            lists[constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS].append(pattern)
        elif len(blocks) > 1:
            shape = (tuple(blocks), *parameter.shape[1:])
            lists[constants.PARAMETER_WITH_SUB_PARAMS].append(
                {"patterns": [pattern], "shape": shape, "partition_dim": 0}
            )
            widths[pattern] = [[block // degree] * degree for block in blocks]
            meta["sub_param_sizes"] = tuple(blocks)
            meta["sub_param_shard_widths"] = widths[pattern]
        setattr(parameter, constants.DS_AUTOTP_UC_META, meta)
    return {**info, **lists, constants.SUB_PARAM_SHARD_WIDTHS: widths}


def _whole_shape(parameter: Tensor, parts: tuple[Part, ...], degree: int) -> list[int]:
    shape = list(parameter.shape)
    if parts[0].dim is not None:
        shape[parts[0].dim] *= degree
    return shape


_DECIDING = ("degree", "activation", "mlp_activation", "crossing")


def check_saved(moment: Moment, config: TensorParallelConfig) -> None:
    """Refuse a checkpoint of another degree, or of layers that computed something else.

    Raises:
        ConfigError: the record beside the checkpoint says so. Universal checkpoints fit any
            degree, and what has no record is left to DeepSpeed.
    """
    engine, tag = moment.data["engine"], moment.data["tag"]
    folder = Path(moment.data["path"])
    if engine.load_universal_checkpoint():
        return
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
    record = None if tag is None else read_record(folder / tag)
    saved = ((record or {}).get("config") or {}).get("tensor_parallel")
    if saved is None:
        return
    for name in _DECIDING:
        found, wanted = saved.get(name), getattr(config, name)
        if name in saved and found != wanted:
            remedy = (
                "convert it with deepspeed.checkpoint.ds_to_universal and load it with "
                '"checkpoint": {"load_universal": true}'
                if name == "degree"
                else "set it to what was trained"
            )
            raise ConfigError(
                f"lowtide.tensor_parallel.{name}: got {wanted}, but checkpoint {folder / tag} was "
                f"saved with {found}; {remedy}"
            )


def replace_savers(engine: Any, gather: Callable[[], dict[str, Tensor]], degree: int) -> None:
    """Have what would write one rank's part, or names of ours, write the whole model, or refuse.

    Args:
        engine: The engine.
        degree: Number of ranks that hold the model.
        gather: Returns the unsharded state dict on the first rank, an empty one elsewhere; all
            ranks call it.
    """

    def whole(exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        if exclude_frozen_parameters:
            raise ModelError(
                "exclude_frozen_parameters: got True, allowed is False: the low-rank model is "
                "saved whole; leave it out, and drop what is frozen from "
                "engine.lowtide.tensor_parallel.state_dict()"
            )
        return gather()

    def save_16bit_model(
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        state = whole(exclude_frozen_parameters)
        if dist.get_rank() == 0:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(save_dir) / save_filename)
        dist.barrier()
        return True

    engine.save_16bit_model = engine.save_fp16_model = save_16bit_model
    if degree > 1:
        # What Accelerate asks an engine whose weights are spread for.
        engine._consolidated_16bit_state_dict = whole
    model = engine.module
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = WholeSaver(model, degree)


class WholeSaver:
    """Stand in for ``save_pretrained``: write the unsharded state dict and nothing less.

    It may be called by one rank, so it gathers nothing. With one rank, the model's own will do.
    An object that holds the model, so that a deep copy of the model saves the copy.

    Args:
        model: Sharded, with a ``save_pretrained`` of its own.
        degree: Number of ranks that hold it.
    """

    def __init__(self, model: Any, degree: int) -> None:
        self.model = model
        self.degree = degree
        self.names = {part.name for _, parts in sharded_parameters(model) for part in parts}

    def __call__(
        self, save_directory: Any, *args: Any, state_dict: Any = None, **options: Any
    ) -> Any:
        """Save as the model does.

        Raises:
            ModelError: the state dict is not, or cannot be made, the whole model's.
        """
        model = self.model
        if self.degree == 1 and not self._is_whole(state_dict):
            state_dict = whole_of_one(
                model, model.state_dict() if state_dict is None else state_dict
            )
        if not self._is_whole(state_dict):
            raise ModelError(
                "save_pretrained: the model is spread over ranks, and this one has a part of it; "
                "pass state_dict=engine.lowtide.tensor_parallel.state_dict(), which all ranks have "
                "to call"
            )
        return type(model).save_pretrained(
            model, save_directory, *args, state_dict=state_dict, **options
        )

    def _is_whole(self, state: dict[str, Tensor] | None) -> bool:
        return state is not None and self.names <= state.keys()


def restore_savers(engine: Any) -> None:
    """Undo `replace_savers`."""
    for name in ("save_16bit_model", "save_fp16_model", "_consolidated_16bit_state_dict"):
        engine.__dict__.pop(name, None)
    engine.module.__dict__.pop("save_pretrained", None)


def mark_gradients(engine: Any) -> None:
    """Tell gradients what their parameters are told: whether they differ between ranks.

    Without ZeRO, DeepSpeed's unfused 16-bit optimizer hands gradients, not parameters, to what
    sums their norms; of those that bear no mark it counts the first rank's alone.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter

    if engine.zero_optimization_stage() > 0:
        return
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            parameter.grad.tensor_model_parallel = is_model_parallel_parameter(parameter)


def fetcher(engine: Any) -> Callable[[Tensor], Tensor]:
    """Return what reads a parameter's values, wherever ZeRO keeps them."""
    if int(engine.zero_optimization_stage()) < 3:
        return Tensor.detach
    from deepspeed import zero

    def fetch(parameter: Tensor) -> Tensor:
        with zero.GatheredParameters([parameter]), torch.no_grad():
            return parameter.detach().clone()

    return fetch
