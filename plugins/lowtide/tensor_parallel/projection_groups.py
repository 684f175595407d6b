"""Which projections share a rank, and which rank the settings ask for.

Projections that read the same input share one rank, so that their latents can travel in one
message (BOOST, arXiv 2512.12131, linear-layer grouping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.config import PATH, Family, RankRule, TensorParallelConfig
from lowtide.tensor_parallel.factors import Factors
from lowtide.tensor_parallel.patterns import ModelPattern, Projection
from lowtide.tensor_parallel.recognise import factors_of

Kind = Literal["attention_inputs", "attention_output", "mlp_inputs", "mlp_output"]
_FAMILIES: dict[Kind, Family] = {
    "attention_inputs": "attention",
    "attention_output": "attention",
    "mlp_inputs": "mlp",
    "mlp_output": "mlp",
}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One projection of a model.

    Attributes:
        path: Where it is, from the root of the model.
        roles: What its output holds.
        module: What stands there now.
        factors: Its factors, or None where it is full-rank.
        in_features: Input width.
        out_features: Output width.
    """

    path: str
    roles: tuple[str, ...]
    module: Any
    factors: Factors | None
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Projections of one layer that share an input and therefore a rank.

    Attributes:
        layer: Index of the layer.
        kind: Which group of the layer.
        members: Its projections.
        rank: The rank, or None where `energy` decides.
        energy: Share of the squared singular values to keep, or None.
        limit: The largest rank that is of use to a member.
    """

    layer: int
    kind: Kind
    members: tuple[Member, ...]
    rank: int | None
    energy: float | None
    limit: int

    @property
    def full_members(self) -> tuple[Member, ...]:
        """Members that have to be factorised."""
        return tuple(member for member in self.members if member.factors is None)


def collect_groups(
    pattern: ModelPattern, model: nn.Module, settings: TensorParallelConfig, width: int
) -> list[Group]:
    """Return all groups of `model`, layer by layer, in the order of its computation.

    Args:
        pattern: Of the model.
        model: Full-rank, low-rank, or mixed.
        settings: Where ranks come from.
        width: Model width.

    Raises:
        ConfigError: A projection is full-rank and no rank is given, or a rank is given that the
            model's own does not agree with or that no projection of the group can use.
        ModelError: Members of one group have different ranks or activations, or a projection
            shares its weight with another part of the model.
    """
    layout = pattern.layer
    parts: tuple[tuple[Kind, tuple[Projection, ...]], ...] = (
        ("attention_inputs", layout.attention_inputs),
        ("attention_output", (layout.attention_output,)),
        ("mlp_inputs", layout.mlp_inputs),
        ("mlp_output", (layout.mlp_output,)),
    )
    groups = []
    for index, (child, layer) in enumerate(model.get_submodule(pattern.layers).named_children()):
        for kind, projections in parts:
            members = tuple(
                _member(layer, projection, f"{pattern.layers}.{child}")
                for projection in projections
            )
            groups.append(_group(index, kind, members, settings, width))
    _refuse_shared_weights(model, groups)
    return groups


def _member(layer: nn.Module, projection: Projection, where: str) -> Member:
    path = f"{where}.{projection.path}"
    module: Any = layer.get_submodule(projection.path)
    factors = factors_of(module, path)
    sizes: Any = module if factors is None else factors
    return Member(
        path=path,
        roles=projection.roles,
        module=module,
        factors=factors,
        in_features=sizes.in_features,
        out_features=sizes.out_features,
    )


def _group(
    layer: int, kind: Kind, members: tuple[Member, ...], settings: TensorParallelConfig, width: int
) -> Group:
    family = _FAMILIES[kind]
    rule = settings.rank_rule(family)
    limit = min(members[0].in_features, max(member.out_features for member in members))
    asked = None if rule is None else rule.fixed_rank(width, limit)
    known = _common_rank(members)
    full = [member for member in members if member.factors is None]
    if known is not None:
        _check_known(members, rule, known, asked, settings, family)
    elif rule is None:
        raise ConfigError(
            f"{PATH}: {full[0].path} is full-rank and no rank is given for {family}; set "
            f'"rank", "rank_ratio" or "energy", here or under "{family}"'
        )
    if known is not None and full and asked is None:
        raise ModelError(
            f"{full[0].path}: is full-rank beside {members[0].path} and others of rank {known}, "
            f'and they share an input; give "rank": {known} under "{family}"'
        )
    if known is None and asked is not None and rule is not None and asked > limit:
        raise ConfigError(
            f"{rule.key}: got {asked}, but {full[0].path} has {full[0].in_features} inputs and "
            f"its group at most {max(m.out_features for m in members)} outputs, so allowed is at "
            f'most {limit}; choose a lower rank, or another one under "{family}"'
        )
    energy = rule.energy if rule is not None and known is None else None
    return Group(
        layer=layer,
        kind=kind,
        members=members,
        rank=known if known is not None else asked,
        energy=energy,
        limit=limit,
    )


def _common_rank(members: Sequence[Member]) -> int | None:
    """Return the rank of the low-rank members, or None where there are none."""
    low = [(member, member.factors) for member in members if member.factors is not None]
    for what in ("rank", "activation"):
        found = {member.path: getattr(factors, what) for member, factors in low}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{path} has {value}" for path, value in found.items())
            raise ModelError(
                f"{what} differs among projections that share an input ({text}); allowed is one "
                f"{what} for all of them"
            )
    return low[0][1].rank if low else None


def _check_known(
    members: Sequence[Member],
    rule: RankRule | None,
    known: int,
    asked: int | None,
    settings: TensorParallelConfig,
    family: Family,
) -> None:
    """Raise `ConfigError` where the settings ask for other than the model's own factors."""
    member = next(each for each in members if each.factors is not None)
    if rule is not None and asked is not None and asked != known:
        raise ConfigError(
            f"{rule.key}: asks for rank {asked}, but {member.path} is low-rank already, with rank "
            f"{known}; leave the rank of {family} out, or start from the full-rank model"
        )
    own = member.factors.activation if member.factors is not None else None
    has_full = any(each.factors is None for each in members)
    if (settings.activation is not None or has_full) and settings.activation != own:
        raise ConfigError(
            f"{PATH}.activation: asks for {settings.activation}, but {member.path} is low-rank "
            f"already, with {own or 'none'} on its latent; set it to the model's own"
        )


def _refuse_shared_weights(model: nn.Module, groups: Sequence[Group]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for group in groups:
        for member in group.members:
            for parameter in member.module.parameters():
                owners = names[id(parameter)]
                if len(owners) > 1:
                    raise ModelError(
                        f"{member.path}: shares a parameter ({' = '.join(owners)}), allowed is a "
                        f"weight of its own; untie it first"
                    )
