"""From an ordinary decoder to an ordinary decoder of low rank, in place.

The result is a valid unsharded model: its own forward runs unchanged, with `BottleneckLinear` where
its linear layers were. Sharding starts from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn

from lowtide.core.errors import ConfigError
from lowtide.tensor_parallel.bottleneck import BottleneckLinear
from lowtide.tensor_parallel.chains import add_crossings, check_chains
from lowtide.tensor_parallel.config import PATH, TensorParallelConfig
from lowtide.tensor_parallel.factors import Factors, random_factors
from lowtide.tensor_parallel.patterns import ModelPattern, ModelShape, find_pattern
from lowtide.tensor_parallel.projection_groups import Group, Member, collect_groups
from lowtide.tensor_parallel.recognise import renaming, to_bottleneck
from lowtide.tensor_parallel.shared_svd import approximate, check_same_model


@dataclass(frozen=True, kw_only=True)
class LayerRanks:
    """The ranks of one decoder layer, one per group of projections that share an input."""

    attention_inputs: int
    attention_output: int
    mlp_inputs: int
    mlp_output: int


@dataclass(frozen=True, kw_only=True)
class ProjectionReport:
    """What became of one projection.

    Attributes:
        path: Where it is, from the root of the model.
        rank: Its rank.
        relative_error: Frobenius norm of weight minus product of factors, over that of the
            weight; an activation on the latent is not part of it. None where nothing was
            approximated: random factors, or a projection that was low-rank already.
    """

    path: str
    rank: int
    relative_error: float | None


@dataclass(frozen=True, kw_only=True)
class Factorisation:
    """A low-rank model and how it came about.

    Attributes:
        pattern: Where the model keeps its parts.
        shape: Its sizes, as they are now.
        layers: Ranks, one per decoder layer.
        projections: One report per projection, in the order of the computation.
        parameters_before: Number of parameters of the whole model, tied ones once.
        parameters_after: The same, now.
        renamed: Names of parameters that are gone, and of those that took their place. Names that
            are not in it are as they were.
    """

    pattern: ModelPattern
    shape: ModelShape
    layers: tuple[LayerRanks, ...]
    projections: tuple[ProjectionReport, ...]
    parameters_before: int
    parameters_after: int
    renamed: dict[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "pattern": self.pattern.name,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "layers": [asdict(each) for each in self.layers],
            "projections": [asdict(each) for each in self.projections],
        }


def factorise(
    model: nn.Module,
    settings: TensorParallelConfig,
    *,
    group: dist.ProcessGroup | None = None,
) -> Factorisation:
    """Replace every projection of `model` by a `BottleneckLinear`, in place.

    Projections that are low-rank already keep their factors, and their parameters where the layout
    allows. Dtype, device and ``requires_grad`` stay as they are. After one of the errors below the
    model is untouched.

    Args:
        model: A decoder that a pattern matches, unsharded, alike on all ranks of `group`.
        settings: Rank, start and activations.
        group: Ranks that share the decompositions and end up with the same bits. All of them have
            to call. None does everything here.

    Raises:
        ModelError: No pattern matches, the model differs between ranks, or see `collect_groups`
            and `approximate`.
        ConfigError: See `collect_groups` and `check_chains`; or ``mlp_activation`` is ``none``
            and the pattern does not name the activation.

    Source: BOOST (arXiv 2512.12131), Sec. 2; CoLA (arXiv 2502.10940) for random factors.
    """
    pattern = find_pattern(model)
    shape = pattern.shape(model)
    before = _count(model)
    groups = collect_groups(pattern, model, settings, shape.width)
    activation_path = _activation_to_drop(pattern, shape, settings)
    check_chains(groups, settings)
    if group is not None:
        check_same_model(model, group)
    ranks: list[dict[str, int]] = [{} for _ in range(shape.layers)]
    reports: list[ProjectionReport] = []
    renamed: dict[str, tuple[str, ...]] = {}
    for place, found in enumerate(_new_factors(groups, settings, group)):
        each, groups[place] = groups[place], replace(groups[place], members=())  # frees weights
        results = iter(found)
        for member in each.members:
            factors, error = (member.factors, None) if member.factors is not None else next(results)
            renamed |= _replace(model, member, factors, settings.activation)
            reports.append(
                ProjectionReport(path=member.path, rank=factors.rank, relative_error=error)
            )
        ranks[each.layer][each.kind] = reports[-1].rank
    for path, added in add_crossings(model, pattern, settings).items():
        _adopt(renamed, f"{path}.down.weight", added)
    if activation_path is not None:
        for layer in model.get_submodule(pattern.layers).children():
            layer.set_submodule(activation_path, nn.Identity())
        shape = replace(shape, mlp_activation=None)
    return Factorisation(
        pattern=pattern,
        shape=shape,
        layers=tuple(LayerRanks(**each) for each in ranks),
        projections=tuple(reports),
        parameters_before=before,
        parameters_after=_count(model),
        renamed=renamed,
    )


def _new_factors(
    groups: Sequence[Group], settings: TensorParallelConfig, group: dist.ProcessGroup | None
) -> Iterator[list[tuple[Factors, float | None]]]:
    """Yield, for each group, factors and errors of its full-rank members."""
    if settings.init == "svd":
        for found in approximate(groups, seed=settings.seed, process_group=group):
            yield [(each.factors, each.relative_error) for each in found]
        return
    for each in groups:
        yield [
            (
                random_factors(
                    member.in_features,
                    int(each.rank or 0),
                    member.out_features,
                    seed=settings.seed,
                    name=member.path,
                    dtype=member.module.weight.dtype,
                    device=member.module.weight.device,
                ),
                None,
            )
            for member in each.full_members
        ]


def _replace(
    model: nn.Module, member: Member, factors: Factors, activation: str | None
) -> dict[str, tuple[str, ...]]:
    """Put a bottleneck in the place of `member`; return which names became which."""
    if isinstance(member.module, BottleneckLinear):
        return {}
    names: dict[str, tuple[str, ...]] = {}
    if member.factors is not None:
        new = to_bottleneck(member.factors)
        names |= {old: (name,) for old, name in renaming(member.module).items()}
    else:
        linear: nn.Linear = member.module
        new = to_bottleneck(replace(factors, up_bias=linear.bias, activation=activation))
        new.down.weight.requires_grad_(linear.weight.requires_grad)
        new.up.weight.requires_grad_(linear.weight.requires_grad)
        names["weight"] = ("down.weight", "up.weight")
        if linear.bias is not None:
            names["bias"] = ("up.bias",)
    new.train(member.module.training)
    model.set_submodule(member.path, new)
    return {
        f"{member.path}.{old}": tuple(f"{member.path}.{each}" for each in now)
        for old, now in names.items()
    }


def _adopt(renamed: dict[str, tuple[str, ...]], sibling: str, added: Sequence[str]) -> None:
    """Count new parameters to what became of the one that is called `sibling` now."""
    old = next((name for name, names in renamed.items() if sibling in names), sibling)
    renamed[old] = (*renamed.get(old, (sibling,)), *added)


def _activation_to_drop(
    pattern: ModelPattern, shape: ModelShape, settings: TensorParallelConfig
) -> str | None:
    """Return where the activation on the gate is, or None where it is to stay or there is none."""
    if settings.mlp_activation == "keep" or shape.mlp_activation is None:
        return None
    if pattern.layer.mlp_activation is None:
        raise ConfigError(
            f'{PATH}.mlp_activation: is "none", but pattern "{pattern.name}" does not say where '
            f"the activation of the feed-forward block is; name it in its LayerPattern"
        )
    return pattern.layer.mlp_activation


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
