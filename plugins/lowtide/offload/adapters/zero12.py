"""ZeRO-1 and ZeRO-2: one flat master per parameter group, updated by plan in virtual pieces.

Stock unscales the gradients in place and rounds the parameters by itself, so only the update in
between is ours. All groups are updated at the turn of the first one: by then the factor of all of
them is known (DeepSpeed 0.19.8, ``runtime/zero/stage_1_and_2.py``).

DeepSpeed reads and writes optimizer state through fragments of the host's tensors, without calling
anybody. So the newest copy is on the host after each update: nothing is resident on the device, and
the host's tensors stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import HostError
from lowtide.offload.gradients import LeafGradients
from lowtide.offload.updater import Master, Updater

CLASS = "DeepSpeedZeroOptimizer"
METHODS = (
    "step",
    "unscale_and_clip_grads",
    "_optimizer_step",
    "_lazy_init_hp_params_optimizer_state",
)


_MISSING = "DeepSpeed updates a partition that has no gradient; report this with its configuration"


class Zero12:
    """One ZeRO-1 or ZeRO-2 optimizer's state and what its methods need."""

    allows_residents = False
    allows_storage = False

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.updater: Updater | None = None
        self.unscale: Callable[[list[Tensor], Any], None] = lambda _grads, _norm: None
        self._is_unscaled: set[int] = set()
        self._norm: Any = None

    def masters(self) -> list[Master]:
        """Return the partitions of this rank, one per parameter group."""
        return [
            Master(leaf, group, LeafGradients(leaf, _MISSING), weights=None, may_move=False)
            for group, leaf in enumerate(self.leaves())
        ]

    def leaves(self) -> list[Tensor]:
        """Return the flat masters."""
        return list(self._optimizer.single_partition_of_fp32_groups)

    def give_back(self) -> None:
        """Undo what was done to the optimizer beside its class."""

    # -- what the subclass calls --------------------------------------------------------------

    def note(self, gradients: list[Tensor], total_norm: Any) -> None:
        """Unscale a group's gradients, unless that was done with the first group's."""
        first = self.leaves()[0].grad
        if first is not None and any(e.data_ptr() == first.data_ptr() for e in gradients):
            self._is_unscaled.clear()  # a new update; the last one may have been broken off
        self._norm = total_norm
        todo = [each for each in gradients if each.data_ptr() not in self._is_unscaled]
        if todo:
            self.unscale(todo, total_norm)
        self._is_unscaled.update(each.data_ptr() for each in todo)

    def update_at(self, group: int) -> None:
        """Update all groups at the turn of the first one."""
        if self.updater is None:
            raise HostError("offload: no updater is connected")
        if group == 0:
            later = [each.grad for each in self.leaves()[1:] if each.grad is not None]
            self.note(later, self._norm)
            self.updater.update(1.0)
        self._optimizer._lazy_init_hp_params_optimizer_state()


def planned_class(base: Any) -> dict[str, Any]:
    """Return the methods of the subclass; instances keep a `Zero12` in ``_lowtide_offload``."""

    def unscale_and_clip_grads(self: Any, grad_groups_flat: list[Tensor], total_norm: Any) -> None:
        holder = self._lowtide_offload
        holder.unscale = lambda grads, norm: base.unscale_and_clip_grads(self, grads, norm)
        holder.note(grad_groups_flat, total_norm)

    def _optimizer_step(self: Any, group_no: int) -> None:
        self._lowtide_offload.update_at(group_no)

    return {"unscale_and_clip_grads": unscale_and_clip_grads, "_optimizer_step": _optimizer_step}


def refusals(optimizer: Any) -> dict[str, bool]:
    """Return what this optimizer has that a planned update cannot do, with whether it has it."""
    masters = optimizer.single_partition_of_fp32_groups
    return {
        "16-bit masters": any(each.dtype != torch.float32 for each in masters),
        "masters outside of host memory": any(each.device.type != "cpu" for each in masters),
        "mixture of experts": bool(optimizer.has_moe_layers),
    }
