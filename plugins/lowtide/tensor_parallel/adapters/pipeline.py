"""A sharded decoder under DeepSpeed's pipeline engine (DeepSpeed 0.19.8).

DeepSpeed takes what stages exchange for replicas on the tensor-parallel ranks, and sends a part of
it from each. Here each rank has a part already, so that is switched off in the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lowtide.core.config import load_block, load_config, resolve
from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.build import Builder
from lowtide.tensor_parallel.config import PATH, TensorParallelConfig
from lowtide.tensor_parallel.factorisation import Factorisation, factorise
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.patterns import find_pattern
from lowtide.tensor_parallel.sharding import (
    Shards,
    check_division,
    sharded_parameters,
    unsharded_state_dict,
)
from lowtide.tensor_parallel.stages import (
    DecoderStage,
    EmbeddingStage,
    NextTokenLoss,
    NormStage,
    OutputStage,
    Stages,
    logits,
)

_ATTRIBUTE = "lowtide_stages"


def pipeline_module(
    model: nn.Module,
    config: TensorParallelConfig | Mapping[str, Any] | str | Path,
    *,
    num_stages: int,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    partition_method: str = f"type:{DecoderStage.__name__}",
    **options: Any,
) -> Any:
    """Turn a decoder into a pipeline of low-rank, tensor-parallel stages. All ranks call this.

    Give the result to ``lowtide.initialize`` with the same configuration; batches are
    ``(token ids, labels)``, both ``[B, T]``, and positions count from 0. `model` is factorised in
    place and not needed any more.

    Args:
        model: Any decoder that a pattern matches, the same on all ranks.
        config: The DeepSpeed configuration (a dict or the path of its JSON) whose ``"lowtide"``
            block has the ``"tensor_parallel"`` key, or that key's settings.
        num_stages: Pipeline stages. With the degree it has to divide the number of ranks; the rest
            are data-parallel replicas.
        loss: Takes logits ``[B, T, V]`` and labels. None: the mean cross-entropy of the next
            token, computed without gathering logits.
        partition_method: As DeepSpeed's; by default the decoder layers are spread evenly.
        **options: Further arguments of ``deepspeed.PipelineModule``.

    Returns:
        A ``deepspeed.PipelineModule``; its grid has the axes pipe, data and model.

    Raises:
        ConfigError: The numbers of ranks do not fit, or see `factorise`.
        ModelError: The model cannot be factorised, divided or cut into stages.

    Source: BOOST (arXiv 2512.12131).
    """
    import deepspeed
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    settings = _settings(config)
    if not dist.is_initialized():
        deepspeed.init_distributed()
    replicas = _check_ranks(settings.degree, num_stages)
    topology = PipeModelDataParallelTopology(num_stages, settings.degree, replicas)
    group = _tensor_group(topology, settings)
    stages = _convert(model, settings, group, num_stages, loss is None)
    # DeepSpeed's own checkpointing would cut off the gradient of an embedding, whose input has none
    options.setdefault("checkpointable_layers", [DecoderStage.__name__])
    module = deepspeed.PipelineModule(
        _layers(stages),
        topology=topology,
        loss_fn=loss or NextTokenLoss(group, stages.shape.vocabulary),
        partition_method=partition_method,
        **options,
    )
    stages.builder = None  # and with it the whole model
    _count_once(module, group)
    setattr(module, _ATTRIBUTE, stages)
    is_last = module.stage_id == num_stages - 1
    last = module.forward_funcs[-1]
    if not is_last and isinstance(last, DecoderStage):
        last.is_boundary = True
    return module


def _settings(config: TensorParallelConfig | Mapping[str, Any] | str | Path) -> Any:
    if isinstance(config, TensorParallelConfig):
        return config
    block = load_block(config)
    plugins = {} if block is None else resolve(block, host_config=load_config(config)).plugins
    if "tensor_parallel" not in plugins:
        raise ConfigError(
            f"{PATH}: is not in the configuration that pipeline_module was given; add it, with the "
            f'"degree" that the stages shall have'
        )
    return plugins["tensor_parallel"]


def _check_ranks(degree: int, num_stages: int) -> int:
    """Return the number of data-parallel replicas."""
    world_size = dist.get_world_size()
    if num_stages < 1 or world_size % (degree * num_stages):
        raise ConfigError(
            f"{PATH}.degree: {degree} times num_stages {num_stages} does not divide the "
            f"{world_size} rank(s) of this job; change one of the three"
        )
    return world_size // (degree * num_stages)


def _tensor_group(topology: Any, settings: TensorParallelConfig) -> TensorGroup:
    mine = None
    if settings.degree > 1:
        for ranks in topology.get_axis_comm_lists("model"):
            group = dist.new_group(ranks)  # every rank takes part in forming every group
            if dist.get_rank() in ranks:
                mine = group
    result = TensorGroup(mine)
    result.check_data = settings.check_data
    return result


def _convert(
    model: nn.Module,
    settings: TensorParallelConfig,
    group: TensorGroup,
    num_stages: int,
    spreads_loss: bool,
) -> Stages:
    pattern = find_pattern(model)
    shape = pattern.shape(model)
    check_division(pattern, shape, group.size)
    if num_stages > shape.layers:
        raise ModelError(
            f"{pattern.name} model: {shape.layers} decoder layer(s) cannot be cut into "
            f"{num_stages} stages; num_stages may be at most {shape.layers}"
        )
    bind = pattern.inputs_of_layers(model)
    everyone = dist.group.WORLD if dist.get_world_size() > 1 else None
    factorisation = factorise(model, settings, group=everyone)
    builder = Builder(
        model, pattern, factorisation.shape, group,
        settings.activation_checkpointing, overlaps_forward=settings.overlap_forward,
    )  # fmt: skip
    return Stages(
        config=settings,
        group=group,
        pattern=pattern,
        shape=factorisation.shape,
        factorisation=factorisation,
        bind=bind,
        spreads_loss=spreads_loss,
        builder=builder,
        must_prepare=group.size > 1 and num_stages > 1,
    )


def _layers(stages: Stages) -> list[Any]:
    """Return one description per layer; DeepSpeed builds those of this rank's stage."""
    from deepspeed.runtime.pipe.module import LayerSpec, TiedLayerSpec

    decoder = [LayerSpec(DecoderStage, stages, index) for index in range(stages.shape.layers)]
    if not stages.shape.is_tied:
        return [LayerSpec(EmbeddingStage, stages), *decoder, LayerSpec(OutputStage, stages)]

    def tied(forward: Any) -> Any:
        return TiedLayerSpec(
            "embedding",
            EmbeddingStage,
            stages,
            forward_fn=forward,
            tied_weight_attr="embedding.weight",
        )

    return [tied(None), *decoder, LayerSpec(NormStage, stages), tied(logits)]


def _count_once(module: Any, group: TensorGroup) -> None:
    """Have each gradient counted once in norms, whichever of DeepSpeed's functions computes them.

    Without ZeRO, the function that does goes by one flag alone: it takes unflagged parameters of
    the very first rank only, which is on the first stage, and tied ones on both stages.
    """
    for parameter in module.parameters():
        if parameter.ds_pipe_replicated:
            parameter.tensor_model_parallel = False
        elif group.rank == 0:
            parameter.model_parallel = True


def is_pipeline(model: Any) -> bool:
    """Tell whether `model` is a DeepSpeed pipeline, ours or not."""
    import deepspeed

    return isinstance(model, deepspeed.PipelineModule)


def adopt(module: Any, config: TensorParallelConfig) -> tuple[Shards, Factorisation]:
    """Return what a module of `pipeline_module` was made of.

    Raises:
        ModelError: It is another pipeline module.
        ConfigError: It was made with other settings than `config`.
    """
    stages: Stages | None = getattr(module, _ATTRIBUTE, None)
    if stages is None:
        raise ModelError(
            "lowtide.tensor_parallel: the model is a DeepSpeed PipelineModule, whose layers no "
            "pattern describes; make it with "
            "lowtide.tensor_parallel.adapters.pipeline.pipeline_module"
        )
    for name in type(config).model_fields:
        theirs, ours = getattr(stages.config, name), getattr(config, name)
        if theirs != ours:
            raise ConfigError(
                f"{PATH}.{name}: got {ours}, but the pipeline module was made with {theirs}; give "
                f"the same configuration to pipeline_module and to initialize"
            )
    renamed = {part.name: name for name, parts in sharded_parameters(module) for part in parts}
    return Shards(module, stages.group, stages.pattern, stages.shape, renamed), stages.factorisation


def prepare_engine(engine: Any) -> None:
    """Make the engine exchange what the stages hand it, as it is."""
    stages: Stages | None = getattr(engine.module, _ATTRIBUTE, None)
    if stages is not None:
        engine.is_pipe_partitioned = False
        engine.is_grad_partitioned = False
        stages.must_prepare = False


def whole_state_dict(module: Any, group: TensorGroup, *, on_rank: int | None) -> dict[str, Tensor]:
    """Return the unsharded low-rank model's state dict. Every rank calls it.

    Args:
        module: Made by `pipeline_module`.
        group: The tensor-parallel ranks.
        on_rank: The rank of each tensor-parallel group that gets it, the others get an empty
            dict; None: all of them.
    """
    mine = unsharded_state_dict(module, group, on_rank=on_rank)
    grid = module.mpu()
    parts: list[Any] = [None] * grid.get_pipe_parallel_world_size()
    dist.all_gather_object(parts, mine, group=grid.get_pipe_parallel_group())
    return {name: value for part in parts for name, value in part.items()}
