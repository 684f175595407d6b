"""From an unsharded low-rank model to one rank's share of it, in place.

The model keeps its own class and forward; its decoder layers, embedding, last norm and head are
replaced. What each parameter is made of is written down in `layers.Part`, by the names of the
unsharded model's state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowtide.core.errors import ConfigError, ModelError, listed, near
from lowtide.tensor_parallel.build import Builder
from lowtide.tensor_parallel.calls import CallCheck, SameDraws, SpreadLoss
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import Part, Sharded
from lowtide.tensor_parallel.patterns import ModelPattern, ModelShape, find_pattern
from lowtide.tensor_parallel.recompute import TIERS


@dataclass
class Shards:
    """A sharded model and what it was made of.

    Attributes:
        model: The user's model, changed in place.
        group: The ranks.
        pattern: Its family.
        shape: Its sizes, unsharded.
        renamed: For each parameter that is no more, the names of those that hold its values now.
    """

    model: nn.Module
    group: TensorGroup
    pattern: ModelPattern
    shape: ModelShape
    renamed: dict[str, str]


def shard(
    model: nn.Module,
    group: TensorGroup,
    *,
    tier: str = "none",
    overlaps_forward: bool = False,
    shape: ModelShape | None = None,
) -> Shards:
    """Replace the parts of a low-rank `model` by this rank's share of them, in place.

    Args:
        model: All projections are `BottleneckLinear` (see `factorise`), the same on all ranks.
        group: The ranks.
        tier: Of activation checkpointing, one of `recompute.TIERS`.
        overlaps_forward: Whether halves of the batch take turns in each layer, see
            `decoder.DecoderLayer`.
        shape: What `factorise` returned; None: what the model's pattern says.

    Raises:
        ConfigError: there is no such tier.
        ModelError: something does not divide by the number of ranks, or cannot be sharded. Nothing
            was changed then, and no message was sent.
    """
    if tier not in TIERS:
        raise ConfigError(
            f'lowtide.tensor_parallel.activation_checkpointing: got "{tier}", allowed are '
            f"{listed(TIERS)}.{near(tier, TIERS)}"
        )
    pattern = find_pattern(model)
    shape = pattern.shape(model) if shape is None else shape
    check_division(pattern, shape, group.size)
    rehearsal = Builder(model, pattern, shape, group, tier, is_rehearsal=True)
    for index in range(shape.layers):
        rehearsal.layer(index)
    rehearsal.ends()
    builder = Builder(model, pattern, shape, group, tier, overlaps_forward=overlaps_forward)
    layers = model.get_submodule(pattern.layers)
    for index in range(shape.layers):  # one by one: each frees what it was made of
        layers[index] = builder.layer(index)  # type: ignore[operator]
    embedding, norm, head = builder.ends()
    _replace(model, pattern.embedding, embedding)
    _replace(model, pattern.final_norm, norm)
    _replace(model, pattern.head, head)
    model.register_forward_pre_hook(CallCheck(pattern, group), with_kwargs=True)
    loss = SpreadLoss(pattern, shape.vocabulary, head, group)
    if pattern.set_loss(model, loss) is not None:  # else users compute it, from whole logits
        model.register_forward_pre_hook(loss.choose, with_kwargs=True)
    if hasattr(model, "generate") and group.size > 1:
        model.generate = SameDraws(model, group)  # type: ignore[assignment]
    if hasattr(model, "supports_gradient_checkpointing"):  # of transformers: it would do nothing
        model.supports_gradient_checkpointing = False  # type: ignore[assignment]
    renamed = {part.name: name for name, parts in sharded_parameters(model) for part in parts}
    return Shards(model, group, pattern, shape, renamed)


def sharded_parameters(model: nn.Module) -> Iterable[tuple[str, tuple[Part, ...]]]:
    """Yield each sharded parameter's name and the whole tensors it is made of."""
    for prefix, module in model.named_modules():
        if isinstance(module, Sharded):
            for name, parts in module.parts.items():
                yield f"{prefix}.{name}" if prefix else name, parts


def check_division(pattern: ModelPattern, shape: ModelShape, size: int) -> None:
    """Refuse a model whose sizes do not divide among `size` ranks.

    Raises:
        ModelError: One does not.
    """
    for what, length in (
        ("width", shape.width),
        ("query heads", shape.heads),
        ("key/value heads", shape.kv_heads),
        ("feed-forward width", shape.mlp_width),
    ):
        if length % size:
            allowed = [p for p in range(1, length + 1) if length % p == 0][:12]
            raise ModelError(
                f"{pattern.name} model: {length} {what} cannot be divided among {size} ranks; "
                f"lowtide.tensor_parallel.degree may be one of {allowed} as far as this goes"
            )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def unsharded_state_dict(
    model: nn.Module,
    group: TensorGroup,
    *,
    fetch: Callable[[Tensor], Tensor] = Tensor.detach,
    on_rank: int | None = None,
) -> dict[str, Tensor]:
    """Return the state dict that the unsharded low-rank model would have. All ranks call it.

    Args:
        model: Sharded by `shard`.
        group: The ranks.
        fetch: Returns a parameter's values, where the host keeps them elsewhere (ZeRO 3).
        on_rank: The only rank of the group that gets it, the others get an empty dict; None: all.

    Returns:
        Tensors in host memory, by the unsharded names.
    """
    result: dict[str, Tensor] = {}
    handled: set[str] = set()
    wanted = on_rank is None or group.rank == on_rank
    for name, parts in sharded_parameters(model):
        handled.add(name)
        local = fetch(model.get_parameter(name))
        by_rank = group.gather_rows(local.unsqueeze(0), phase="export").cpu()
        for part in parts if wanted else ():
            taken = [each[part.rows] for each in by_rank]
            result[part.name] = part.join(taken).clone()
    if not wanted:
        return result
    for name, value in model.state_dict().items():
        if name not in handled and name not in result and not _is_of_sharded(model, name):
            result[name] = value.detach().cpu().clone()
    return result


def whole_of_one(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the unsharded state dict from that of a sharded model on one rank.

    Args:
        model: Sharded by `shard` over a group of one.
        state: Its state dict.

    Raises:
        ModelError: a parameter is missing.
    """
    result: dict[str, Tensor] = {}
    handled: set[str] = set()
    for name, parts in sharded_parameters(model):
        if name not in state:
            raise ModelError(
                f"{name}: is not in the state dict that was to be saved; it must be the model's "
                f"own (state_dict) or that of the unsharded low-rank model (unsharded_state_dict)"
            )
        handled.add(name)
        for part in parts:
            result[part.name] = part.join([state[name][part.rows]]).clone()
    return result | {
        name: each for name, each in state.items() if name not in handled | result.keys()
    }


def load_unsharded_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], group: TensorGroup
) -> None:
    """Fill a sharded model from an unsharded model's state dict, whatever ranks wrote it.

    Raises:
        ModelError: a tensor is missing or has another shape. Nothing was changed then.
    """
    targets = [
        (part, model.get_parameter(name)[part.rows])
        for name, parts in sharded_parameters(model)
        for part in parts
    ]
    for part, target in targets:
        if part.name not in state:
            raise ModelError(
                f"{part.name}: is not in the state dict that was to be loaded; it must be "
                f"that of the unsharded low-rank model (unsharded_state_dict)"
            )
        found, wanted = tuple(state[part.name].shape), part.whole_shape(target)
        if found != wanted:
            raise ModelError(
                f"{part.name}: has shape {found} in the state dict that was to be loaded, allowed "
                f"is {wanted}; load the state dict of a model of the same sizes"
            )
    with torch.no_grad():
        for part, target in targets:
            target.copy_(part.cut(state[part.name], group))


def _is_of_sharded(model: nn.Module, name: str) -> bool:
    path = name.rpartition(".")[0]
    return isinstance(model.get_submodule(path), Sharded)
