"""Connects the projections of a low-rank model to chains of crossings (see `crossing`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowtide.core.errors import ConfigError
from lowtide.tensor_parallel.bottleneck import BottleneckLinear
from lowtide.tensor_parallel.config import PATH, TensorParallelConfig
from lowtide.tensor_parallel.crossing import LatentGate, Place, hook_model
from lowtide.tensor_parallel.factors import seeded_generator
from lowtide.tensor_parallel.patterns import ModelPattern
from lowtide.tensor_parallel.projection_groups import Group


def check_chains(groups: Sequence[Group], settings: TensorParallelConfig) -> None:
    """Refuse a crossing that the model cannot have, before anything is changed.

    Args:
        groups: All groups of the model, layer by layer.
        settings: With the wanted gate.

    Raises:
        ConfigError: The model has crossings of another kind, or the gate needs equal ranks and two
            decoder layers differ.
    """
    wanted = settings.crossing
    for member in (member for group in groups for member in group.members):
        module = member.module
        gate = module.crossing if isinstance(module, BottleneckLinear) else None
        if gate is not None and wanted not in (None, gate.kind):
            raise ConfigError(
                f'{PATH}.crossing: asks for "{wanted}", but {member.path} has a "{gate.kind}" '
                f"crossing already; leave it out, or start from a model without"
            )
    if wanted not in ("identity", "scalar"):
        return
    before: dict[str, Group] = {}
    for group in groups:
        last = before.get(group.kind, group)
        if last.rank != group.rank:
            raise ConfigError(
                f'{PATH}.crossing: "{wanted}" needs one rank in all decoder layers, but '
                f"{last.members[0].path} has {last.rank} and {group.members[0].path} has "
                f'{group.rank}; set it to "linear" or "low_rank"'
            )
        before[group.kind] = group


def add_crossings(
    model: nn.Module, pattern: ModelPattern, settings: TensorParallelConfig
) -> dict[str, list[str]]:
    """Give every projection but those of the first decoder layer a gate, in place.

    A model that has crossings keeps them.

    Args:
        model: All projections are `BottleneckLinear`.
        pattern: Of the model.
        settings: Gate and seed; no gate changes nothing.

    Returns:
        Names of the new parameters, by the path of their projection.

    Raises:
        ModelError: See `crossing.hook_model` and `gates.gate_shapes`.
    """
    layers = [layer for _, layer in model.get_submodule(pattern.layers).named_children()]
    paths = [projection.path for projection in pattern.layer.projections]
    chains: list[list[BottleneckLinear]] = [
        [layer.get_submodule(path) for layer in layers]  # type: ignore[misc]
        for path in paths
    ]
    if settings.crossing is None or any(each.place is not None for each in chains[0]):
        return {}
    hook_model(model, pattern.layers, pattern.layer.attention_inputs[0].path.rpartition(".")[0])
    names: dict[str, list[str]] = {}
    for path, chain in zip(paths, chains, strict=True):
        for index, module in enumerate(chain):
            module.place = Place(path, index, is_last=index + 1 == len(chain))
            if index == 0:
                continue
            whole = f"{pattern.layers}.{index}.{path}"
            module.crossing = LatentGate(
                settings.crossing,
                chain[index - 1].rank,
                module.rank,
                generator=seeded_generator(settings.seed, f"{whole}.crossing"),
                device=module.down.weight.device,
                dtype=module.down.weight.dtype,
            )
            names[whole] = [
                f"{whole}.crossing.{name}" for name, _ in module.crossing.named_parameters()
            ]
    return names
