"""Fill the tensors of a live engine from a checkpoint: this rank's intervals, and no others."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from lowtide.checkpoint.adapters.live_state import LiveState, Slot
from lowtide.checkpoint.state.view import CheckpointState
from lowtide.checkpoint.state.zero_layout import MASTER
from lowtide.core.errors import CheckpointError


def fill(
    state: CheckpointState, live: LiveState, module: torch.nn.Module, loads_optimizer: bool
) -> None:
    """Read this rank's parts into its tensors. Nothing here waits for another rank.

    Raises:
        CheckpointError: a file is damaged, or states that differ would have to become one.
    """
    with torch.no_grad():
        for name, buffer in persistent_buffers(module).items():
            if name in state.buffers:
                buffer.copy_(state.buffers[name])
        for name, (tensor, begin) in live.frozen.items():
            if name in state.parameters or name in state.shared:
                state.read_into(tensor, name, MASTER, begin)
        for slot in live.slots:
            _fill_flat(state, slot, slot.key.data.view(-1), MASTER)
            if loads_optimizer:
                _fill_states(state, slot, live.base)
    if loads_optimizer and state.groups is not None:
        for group, saved in zip(live.base.param_groups, state.groups, strict=True):
            group.update(copied(saved))


def _fill_flat(state: CheckpointState, slot: Slot, flat: torch.Tensor, kind: str) -> None:
    # What is padding here may have been anything before; zero is what stock puts there.
    flat.zero_()
    for part in slot.parts:
        if state.has(part.name, kind):
            state.read_into(flat.narrow(0, part.offset, part.count), part.name, kind, part.begin)


def _fill_states(state: CheckpointState, slot: Slot, base: Any) -> None:
    """Give one slot the optimizer states of its parameters."""
    kinds = [k for k in state.kinds if k != MASTER and any(state.has(n, k) for n in slot.members)]
    live = base.state.get(slot.key, {})
    kept = {kind: live[kind] for kind in kinds if kind in live}
    filled: dict[str, Any] = {}
    for kind in kinds:
        array = kept.get(kind)
        if array is None or array.shape != slot.key.shape:
            dtype = _state_dtype(state, slot, base, kind)
            array = torch.zeros_like(slot.key.data, dtype=dtype)
        _fill_flat(state, slot, array.view(-1), kind)
        filled[kind] = array
    filled.update(_scalars(state, slot, base))
    if filled:
        base.state[slot.key] = filled
    elif slot.key in base.state:
        del base.state[slot.key]


def _state_dtype(state: CheckpointState, slot: Slot, base: Any, kind: str) -> torch.dtype:
    # DeepSpeed's CPU Adam keeps float32 moments beside 16-bit masters if told so; torch's
    # optimizers keep moments in the dtype of what they step.
    if getattr(base, "fp32_optimizer_states", False):
        name = next(name for name in slot.members if state.has(name, kind))
        return state.dtype(name, kind)
    return slot.key.dtype


def _scalars(state: CheckpointState, slot: Slot, base: Any) -> dict[str, Any]:
    """Return "step" and the like, which must be the same for all parameters of a slot."""
    found: dict[str, Any] = {}
    first: dict[str, str] = {}
    for name in slot.members:
        for key, value in state.scalars(name).items():
            if key in found and found[key] != value:
                raise CheckpointError(
                    f'{state.folder}: "{key}" is {found[key]} for "{first[key]}" and {value} for '
                    f'"{name}", which share one optimizer state here; keep them in separate '
                    "parameter groups, or load with the ZeRO stage that saved it"
                )
            found.setdefault(key, value)
            first.setdefault(key, name)
    return {
        key: _as_step(value, slot, base) if key == "step" else copied(value)
        for key, value in found.items()
    }


def _as_step(value: Any, slot: Slot, base: Any) -> Any:
    """Return the step count as this optimizer keeps it: torch's as a tensor, DeepSpeed's not."""
    if not type(base).__module__.startswith("torch.optim"):
        is_own = type(base).__module__.startswith("deepspeed.")
        return int(value) if is_own else copied(value)
    step = torch.tensor(float(value), dtype=torch.float32)
    group = base.param_groups[slot.group]
    is_on_device = group.get("capturable") or group.get("fused")
    return step.to(slot.key.device) if is_on_device else step


def copied(value: Any) -> Any:
    """Return `value` without a tensor that is mapped to a file."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    return value


def persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that ``state_dict`` has, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, inner in module.named_modules()
        for name, buffer in inner.named_buffers(recurse=False)
        if name not in inner._non_persistent_buffers_set
    }
