"""ZeRO-1 and ZeRO-2: one flat master per parameter group, updated by plan in virtual pieces.

Stock unscales the gradients in place; update and rounding are ours. All groups are updated at the
turn of the first one: by then the factor of all of them is known. What stock would round after each
group's turn is hidden from it until the last one's is over (DeepSpeed 0.19.8,
``runtime/zero/stage_1_and_2.py``).

DeepSpeed reads and writes optimizer state through fragments of the host's tensors, without calling
anybody. So the newest copy is on the host after each update: nothing is resident on the device, and
the host's tensors stay where they are. Where state is in files, the tensors become maps of these,
the fragments are made anew, and whoever looks at one has the newest state brought there first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import HostError
from lowtide.offload.adapters.entry_points import Holder, after, drained_state
from lowtide.offload.gradients import LeafGradients
from lowtide.offload.updater import Master

CLASS = "DeepSpeedZeroOptimizer"
# Entry points that write optimizer state on the host, or put it into other tensors.
_WRITERS = (
    "load_state_dict",
    "refresh_fp32_params",
    "load_hp_checkpoint_state_from_checkpoint_dir",
    "offload_states",
    "reload_states",
)
_READERS = ("state_dict", "update_lp_params")
METHODS = (
    *_WRITERS,
    *_READERS,
    "step",
    "unscale_and_clip_grads",
    "reset_cpu_buffers",
    "get_bit16_param_group",
    "_optimizer_step",
    "_link_all_hp_params",
    "_lazy_init_hp_params_optimizer_state",
)
_ROUNDED = (
    "single_partition_of_fp32_groups",
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "parallel_partitioned_bit16_groups",
)


_MISSING = "DeepSpeed updates a partition that has no gradient; report this with its configuration"


class Zero12(Holder):
    """One ZeRO-1 or ZeRO-2 optimizer's state and what its methods need."""

    allows_residents = False

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._leaves: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.unscale: Callable[[list[Tensor], Any], None] = lambda _grads, _norm: None
        self._is_unscaled: set[int] = set()
        self._norm: Any = None
        self._hidden: dict[int, list[Any]] = {}  # of a group: its entries in `_ROUNDED`
        self._linked: list[int] = []  # addresses of the state that fragments are parts of

    def masters(self) -> list[Master]:
        """Return the partitions of this rank, one per parameter group."""
        return [
            Master(leaf, group, LeafGradients(leaf, _MISSING), self._weights(group), may_move=False)
            for group, leaf in enumerate(self._leaves)
        ]

    def _weights(self, group: int) -> Tensor:
        weights: Tensor = self._optimizer.get_bit16_param_group(group)[0]
        return weights.data

    def leaves(self) -> list[Tensor]:
        """Return the flat masters."""
        return list(self._leaves)

    def connected(self) -> None:
        """Make fragments of what masters and moments are now, once the updater is there."""
        self._link()

    def give_back(self) -> None:
        """Undo what was done to the optimizer beside its class."""
        self.show_rounded()
        for mapping in self._fragments():
            if isinstance(type(mapping), _WatchedType):
                mapping.__class__ = type(mapping).__mro__[1]

    # -- fragments ----------------------------------------------------------------------------

    def watch(self) -> None:
        """Bring the newest state to the fragments whenever somebody looks at one."""
        if self.updater is None or self.updater.tier is None:
            return
        watched: dict[type, type] = {}
        for mapping in self._fragments():
            kind = type(mapping)
            if kind not in watched:
                watched[kind] = _watched(kind, self.drain)
            mapping.__class__ = watched[kind]

    def give_out(self) -> None:
        """Bring the newest state to the host; DeepSpeed may make other fragments there."""
        self._linked.clear()
        self.drain()

    def _fragments(self) -> Iterator[Any]:
        for group in self._optimizer.bit16_groups:
            for parameter in group:
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is not None:
                    yield mapping

    def _link(self) -> None:
        """Make new fragments where storage has moved what they were parts of."""
        if self.updater is None or self.updater.tier is None:
            return
        optimizer = self._optimizer
        states = [optimizer.optimizer.state.get(leaf, {}) for leaf in self._leaves]
        parts = [*self._leaves, *(e for state in states for e in state.values())]
        found = [each.data_ptr() for each in parts if torch.is_tensor(each)]
        if found != self._linked:
            self._linked = found
            optimizer._link_all_hp_params()
            optimizer._hp_optimizer_states_linked = False

    # -- what the subclass calls --------------------------------------------------------------

    def note(self, gradients: list[Tensor], total_norm: Any) -> None:
        """Unscale a group's gradients, unless that was done with the first group's."""
        first = self._leaves[0].grad
        if first is not None and any(e.data_ptr() == first.data_ptr() for e in gradients):
            self._is_unscaled.clear()  # a new update; the last one may have been broken off
        self._norm = total_norm
        todo = [each for each in gradients if each.data_ptr() not in self._is_unscaled]
        if todo:
            self.unscale(todo, total_norm)
        self._is_unscaled.update(each.data_ptr() for each in todo)

    def update_at(self, group: int) -> None:
        """Update all groups at the turn of the first one; there is nothing left to round."""
        if self.updater is None:
            raise HostError("offload: no updater is connected")
        if group == 0:
            later = [each.grad for each in self._leaves[1:] if each.grad is not None]
            self.note(later, self._norm)
            for number, master in enumerate(self.updater.masters):
                master.weights = self._weights(number)  # `reload_states` moves them
            self.updater.update(1.0)
            self._link()
            self._optimizer._lazy_init_hp_params_optimizer_state()
        self._hide_rounded(group)

    def _hide_rounded(self, group: int) -> None:
        """Let stock round nothing: it would read whole masters, from files perhaps."""
        lists = [getattr(self._optimizer, name) for name in _ROUNDED]
        self._hidden[group] = [each[group] for each in lists]
        nothing = torch.empty(0)
        masters, buffers, partitions = lists
        masters[group] = buffers[group] = nothing
        partitions[group] = [nothing] * len(partitions[group])

    def show_rounded(self) -> None:
        """Undo `_hide_rounded`."""
        for group, entries in self._hidden.items():
            for name, entry in zip(_ROUNDED, entries, strict=True):
                getattr(self._optimizer, name)[group] = entry
        self._hidden.clear()


class _WatchedType(type):
    """Classes of fragments that are watched."""


def _watched(base: type, look: Callable[[], None]) -> type:
    """Return a class of fragments that calls `look` before it names a tensor."""

    def through(name: str) -> property:
        def get(self: Any) -> Any:
            look()
            return self.__dict__[name]

        def put(self: Any, value: Any) -> None:
            self.__dict__[name] = value

        return property(get, put)

    names = ("hp_fragment", "optim_fragment")
    return _WatchedType(base.__name__, (base,), {name: through(name) for name in names})


def planned_class(base: Any) -> dict[str, Any]:
    """Return the methods of the subclass; instances keep a `Zero12` in ``_lowtide_offload``."""

    def unscale_and_clip_grads(self: Any, grad_groups_flat: list[Tensor], total_norm: Any) -> None:
        holder = self._lowtide_offload
        holder.unscale = lambda grads, norm: base.unscale_and_clip_grads(self, grads, norm)
        holder.note(grad_groups_flat, total_norm)

    def _optimizer_step(self: Any, group_no: int) -> None:
        self._lowtide_offload.update_at(group_no)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return base.step(self, *args, **kwargs)
        finally:
            self._lowtide_offload.show_rounded()

    def _link_all_hp_params(self: Any) -> None:
        base._link_all_hp_params(self)
        self._lowtide_offload.watch()

    body: dict[str, Any] = {
        "unscale_and_clip_grads": unscale_and_clip_grads,
        "_optimizer_step": _optimizer_step,
        "step": step,
        "_link_all_hp_params": _link_all_hp_params,
        # The first thing that stock does behind the last group's turn.
        "reset_cpu_buffers": after(base, "reset_cpu_buffers", "show_rounded"),
        "state": drained_state(base),
    }
    body |= {name: after(base, name, "give_out") for name in _WRITERS}
    body |= {name: after(base, name, "show") for name in _READERS}
    return body


def refusals(optimizer: Any) -> dict[str, bool]:
    """Return what this optimizer has that a planned update cannot do, with whether it has it."""
    masters = optimizer.single_partition_of_fp32_groups
    return {
        "16-bit masters": any(each.dtype != torch.float32 for each in masters),
        "masters outside of host memory": any(each.device.type != "cpu" for each in masters),
        "mixture of experts": bool(optimizer.has_moe_layers),
    }
