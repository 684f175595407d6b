"""Where a live DeepSpeed engine keeps what a checkpoint restores, the same way for every stage.

A `Slot` is one tensor that the optimizer steps, with the intervals of parameters that lie in it:
this rank's partition of a group (ZeRO 1 and 2), its part of a sub-group (3), a whole parameter (0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lowtide.core.errors import CheckpointError

Names = dict[torch.nn.Parameter, str]


@dataclass(frozen=True)
class Part:
    """An interval of a parameter in a slot: `count` elements from `begin` on, at `offset`."""

    name: str
    begin: int
    count: int
    offset: int


@dataclass(frozen=True)
class Slot:
    """One tensor that the optimizer steps.

    Attributes:
        key: The tensor under which the optimizer keeps its state.
        group: Number of its parameter group.
        members: Names of the parameters of the undivided tensor; this rank may hold none of them.
        parts: What this rank holds of them.
    """

    key: torch.Tensor
    group: int
    members: list[str]
    parts: list[Part]


@dataclass
class LiveState:
    """The tensors of one engine.

    Attributes:
        base: The torch optimizer inside DeepSpeed's wrapper.
        slots: What it steps.
        trained: Shape of every parameter that it has got, by name.
        frozen: The other parameters by name: the local tensor, and where it begins in the whole.
        frozen_shapes: Their shapes.
        refresh: Makes the model's weights from the masters. Collective.
        relink: Tells DeepSpeed that the optimizer's state lies elsewhere now.
    """

    base: Any
    slots: list[Slot]
    trained: dict[str, torch.Size] = field(default_factory=dict)
    frozen: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    frozen_shapes: dict[str, torch.Size] = field(default_factory=dict)
    refresh: Callable[[], None] = lambda: None
    relink: Callable[[bool], None] = lambda _has_state: None

    def group_members(self, group: int) -> set[str]:
        """Return the names of the parameters of a group."""
        return {name for slot in self.slots if slot.group == group for name in slot.members}


def live_state(engine: Any) -> LiveState:
    """Return where `engine` keeps its state.

    Raises:
        CheckpointError: it is one whose state Lowtide cannot restore from another layout.
    """
    _refuse(engine)
    stage = int(engine.zero_optimization_stage()) if engine.zero_optimization() else 0
    build = {0: _plain, 1: _partitioned, 2: _partitioned, 3: _sharded}[stage]
    live: LiveState = build(engine)
    for parameter, name in engine.param_names.items():
        if name in live.trained:
            continue
        live.frozen_shapes[name] = _shape(parameter)
        if not hasattr(parameter, "ds_id"):
            live.frozen[name] = (parameter.data.view(-1), 0)
            continue
        part = parameter.ds_tensor.ds_numel
        begin = engine.optimizer._get_param_partition_rank(parameter) * part
        begin = min(begin, parameter.ds_numel)  # the last ranks may have nothing but padding
        count = min(part, parameter.ds_numel - begin)
        live.frozen[name] = (parameter.ds_tensor.data.view(-1).narrow(0, 0, count), begin)
    return live


def is_model_parallel(engine: Any) -> bool:
    """Whether ranks hold different parts of the model for other reasons than ZeRO."""
    return any(is_so for _, is_so in _model_parallel(engine))


def _model_parallel(engine: Any) -> list[tuple[str, bool]]:
    return [
        ("pipeline parallelism", engine.pipeline_parallelism),
        ("tensor parallelism", engine.mp_world_size > 1 or engine.autotp_size() > 1),
        ("expert parallelism", engine.has_moe_layers),
    ]


def _refuse(engine: Any) -> None:
    optimizer = engine.optimizer
    found = [
        text
        for text, is_so in [
            *_model_parallel(engine),
            ("parameters on NVMe", getattr(optimizer, "params_in_nvme_and_cpu", False)),
            ("an optimizer on NVMe", getattr(optimizer, "swap_optimizer", False)),
            ("an optimizer divided over CPU and GPU", hasattr(optimizer, "backup_optimizer")),
            ("ZenFlow", getattr(optimizer, "zenflow", False)),
            ("MiCS", type(optimizer).__name__.startswith("MiCS")),
            ("Muon", any(g.get("use_muon") for g in getattr(optimizer, "param_groups", ()))),
        ]
        if is_so
    ]
    if found:
        raise CheckpointError(
            f"this engine runs with {' and '.join(found)}; a checkpoint of another number of ranks "
            "or another ZeRO stage can be loaded into data-parallel engines (ZeRO 0 to 3) with the "
            "optimizer in CPU or GPU memory; load with the number of ranks and stage that saved it"
        )


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _partitioned(engine: Any) -> LiveState:
    """ZeRO 1 and 2, and the class of bfloat16 training with float32 accumulation under ZeRO 1."""
    optimizer, names = engine.optimizer, engine.param_names
    is_bf16_class = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if is_bf16_class else optimizer.bit16_groups
    keys = (
        optimizer.fp32_groups_flat_partition
        if is_bf16_class
        else optimizer.single_partition_of_fp32_groups
    )
    live = LiveState(optimizer.optimizer, [])
    for index, (group, key) in enumerate(zip(groups, keys, strict=True)):
        parts = []
        for parameter in group:
            live.trained[names[parameter]] = _shape(parameter)
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                parts.append(Part(names[parameter], whole.start, whole.numel, here.start))
        live.slots.append(Slot(key, index, [names[parameter] for parameter in group], parts))

    def relink(has_state: bool) -> None:
        optimizer._link_all_hp_params()
        optimizer._hp_optimizer_states_linked = False
        if has_state:
            optimizer._lazy_init_hp_params_optimizer_state()

    live.refresh, live.relink = optimizer.update_lp_params, relink
    return live


def _sharded(engine: Any) -> LiveState:
    """ZeRO 3."""
    optimizer, names = engine.optimizer, engine.param_names
    live = LiveState(optimizer.optimizer, [])
    for index, (group, key) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        parts, offset = [], 0
        for parameter in group:
            live.trained[names[parameter]] = _shape(parameter)
            part = parameter.partition_numel()
            begin = optimizer._get_param_partition_rank(parameter) * part
            count = min(part, parameter.ds_numel - begin)
            if count > 0:
                parts.append(Part(names[parameter], begin, count, offset))
            offset += part
        members = [names[parameter] for parameter in group]
        live.slots.append(Slot(key, optimizer.sub_group_to_group_id[index], members, parts))

    def refresh() -> None:
        for index in range(len(live.slots)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)

    live.refresh = refresh
    return live


def _plain(engine: Any) -> LiveState:
    """Stage 0: torch's own optimizer, or DeepSpeed's with float32 masters beside 16-bit weights."""
    optimizer, names = engine.optimizer, engine.param_names
    masters = getattr(optimizer, "fp32_groups", None)
    if optimizer is None or hasattr(optimizer, "fp32_groups_flat"):
        raise CheckpointError(
            f"this engine is of stage 0 with {type(optimizer).__name__}; a checkpoint of another "
            'stage can be loaded into one with a torch optimizer; set "stage": 1'
        )
    base = optimizer if masters is None else optimizer.optimizer
    pairs = list(_plain_pairs(base, optimizer, masters))
    live = LiveState(base, [])
    for index, parameter, key in pairs:
        name = names[parameter]
        live.trained[name] = _shape(parameter)
        live.slots.append(Slot(key, index, [name], [Part(name, 0, parameter.numel(), 0)]))

    def refresh() -> None:
        for _, parameter, key in pairs:
            if key is not parameter:
                parameter.data.copy_(key.data)

    live.refresh = refresh
    return live


def _plain_pairs(
    base: Any, optimizer: Any, masters: Any
) -> Iterator[tuple[int, torch.nn.Parameter, torch.Tensor]]:
    if masters is not None:
        for index, (group, keys) in enumerate(zip(optimizer.fp16_groups, masters, strict=True)):
            for parameter, key in zip(group, keys, strict=True):
                yield index, parameter, key
        return
    for index, group in enumerate(base.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.numel():
                yield index, parameter, parameter
