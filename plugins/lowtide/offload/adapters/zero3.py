"""ZeRO-3: the optimizer's class is replaced by a subclass whose update is planned.

What stock `step` does around the update (overflow, norms, loss scale, gathering) stays as it is.
Inside its loop over sub-groups, `unscale_and_clip_grads` only takes note of the factor, and the
last `_optimizer_step` updates all sub-groups at once (DeepSpeed 0.19.8,
``runtime/zero/stage3.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import HostError
from lowtide.offload.adapters.entry_points import Holder, after, drained_state
from lowtide.offload.gradients import GroupGradients, Span, as_float32
from lowtide.offload.updater import Master

CLASS = "DeepSpeedZeroOptimizer_Stage3"

# Entry points that read or write optimizer state on the host: it must be there before.
_READERS = (
    "load_state_dict",
    "refresh_fp32_params",
    "_get_fp32_opt_state_partition",
    "load_hp_checkpoint_state",
)
# Entry points that move buffers about, those of gradients among them.
_MOVERS = ("offload_states", "reload_states")
_BUFFERS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
# Entry points that read or write float32 gradients.
_GRADIENT_READERS = (
    "get_fp32_grad_partitions",
    "_get_fp32_grad_state_partition",
    "update_fp32_grad_for_param_vectorized",
)
METHODS = (
    "state_dict",
    *_READERS,
    *_MOVERS,
    *_GRADIENT_READERS,
    "step",
    "unscale_and_clip_grads",
    "_optimizer_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_unflatten_partitioned_parameters",
    "_offload_grad_partition_at_boundary",
    "partition_grads",
    "_constant_buffered_norm2",
    "has_overflow",
    "destroy",
)


class Zero3(Holder):
    """One ZeRO-3 optimizer's state and what its methods need."""

    allows_residents = True

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.scale: float | None = None  # of the update that is under way
        self._gradients: list[GroupGradients] = []
        self._here: dict[Hashable, Tensor] = {}  # parts of the host's buffer that are not in use
        self._has_updated = False

    # -- what the updater works on ----------------------------------------------------------

    def masters(self) -> list[Master]:
        """Return the sub-groups of this rank."""
        optimizer = self._optimizer
        begin = 0
        masters = []
        for index, leaf in enumerate(optimizer.fp32_partitioned_groups_flat):
            accumulated = optimizer.grad_partitions_flat_buffer.narrow(0, begin, leaf.numel())
            begin += leaf.numel()
            gradients = GroupGradients(
                accumulated, self._spans(index), self._wide_of(leaf), self._relink
            )
            self._gradients.append(gradients)
            weights = optimizer.fp16_partitioned_groups_flat[index]
            group = optimizer.sub_group_to_group_id[index]
            masters.append(Master(leaf, group, gradients, weights.data))
        return masters

    def _spans(self, index: int) -> Iterator[Span]:
        optimizer, begin = self._optimizer, 0
        for parameter in optimizer.fp16_groups[index]:
            count = parameter.partition_numel()
            first = count * optimizer._get_param_partition_rank(parameter)
            if first < parameter.ds_numel:
                yield Span(parameter.ds_id, begin, count)
            begin += count

    def _relink(self, key: Hashable, there: Tensor | None) -> None:
        """Let DeepSpeed accumulate a parameter's gradient in `there`, None: where it began."""
        buffers = getattr(self._optimizer, _BUFFERS)
        if there is None:
            buffers[key] = self._here.pop(key)
        else:
            self._here[key] = buffers[key]
            buffers[key] = there

    @staticmethod
    def _wide_of(leaf: Tensor) -> Callable[[], Tensor]:
        # Most runs never need the float32 buffer: a quarter of the optimizer's host memory.
        leaf.grad = None

        def get() -> Tensor:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf.data)
            return leaf.grad

        return get

    def leaves(self) -> list[Tensor]:
        """Return the flat masters."""
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def give_back(self) -> None:
        """Undo what was done to the optimizer beside its class."""
        for leaf in self.leaves():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf.data)
        self.widen()

    # -- what the subclass calls --------------------------------------------------------------

    def _follow(self) -> None:
        """Look where DeepSpeed keeps gradients and weights now: `reload_states` moves them."""
        optimizer, begin = self._optimizer, 0
        flat = optimizer.grad_partitions_flat_buffer
        # Between `offload_states` and `reload_states`, DeepSpeed may have no places for gradients.
        has_places = bool(getattr(optimizer, _BUFFERS))
        for index, (gradients, leaf) in enumerate(zip(self._gradients, self.leaves(), strict=True)):
            if gradients.accumulated.data_ptr() != flat.data_ptr() + begin * flat.element_size():
                gradients.accumulated = flat.narrow(0, begin, leaf.numel())
            begin += leaf.numel()
            gradients.may_move = has_places
            if self.updater is not None:
                weights = optimizer.fp16_partitioned_groups_flat[index]
                self.updater.masters[index].weights = weights.data

    def arrive(self, parameter: Any, gradient: Tensor) -> None:
        """The window's gradient of a parameter is complete: note its norm, as stock does."""
        optimizer = self._optimizer
        number = optimizer.get_param_id(parameter)
        optimizer.norm_for_param_grads[number] = optimizer._constant_buffered_norm2(gradient)
        self._gradients[optimizer.grad_position[number][0]].arrive(parameter.ds_id)

    def overwrite(self, parameters: list[Any]) -> None:
        """A micro-batch that is not the last begins to accumulate these parameters."""
        optimizer = self._optimizer
        if optimizer.is_gradient_accumulation_boundary():
            return
        self._follow()
        for parameter in parameters:
            place = optimizer.grad_position[optimizer.get_param_id(parameter)]
            self._gradients[place[0]].overwrite(parameter.ds_id)

    def take_in(
        self, parameters: list[Any], gradients: list[Tensor], stock: Callable[[], Any]
    ) -> Any:
        """Let stock take in a window's first gradients without fetching back what it sends.

        Stock copies each one to the host and from there to the device again, for its norm. Here
        its buffer is on the device meanwhile, and goes to the host once.
        """
        optimizer = self._optimizer
        buffers = getattr(optimizer, _BUFFERS)
        lent: list[tuple[int, Tensor, Tensor]] = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            first = parameter.partition_numel() * optimizer._get_param_partition_rank(parameter)
            is_used = first < parameter.ds_numel and optimizer.micro_step_id == 0
            here = buffers[parameter.ds_id] if is_used else None
            if here is not None and self._is_far(here, gradient):
                there = gradient.to(here.dtype).view(-1)  # itself, as a rule
                lent.append((parameter.ds_id, here, there))
                buffers[parameter.ds_id] = there
        try:
            result = stock()
        finally:
            for key, here, _ in lent:
                buffers[key] = here
        for _, here, there in lent:
            here.narrow(0, 0, there.numel()).copy_(there, non_blocking=True)
        return result

    @staticmethod
    def _is_far(here: Tensor, gradient: Tensor) -> bool:
        return here.device != gradient.device

    def widen(self) -> None:
        """Make the float32 gradients what stock would hold."""
        self._follow()
        stream: Any = getattr(self._optimizer, "reduce_and_partition_stream", None)
        if hasattr(stream, "synchronize"):  # gradients may still be on their way to the host
            stream.synchronize()
        for gradients in self._gradients:
            gradients.widen()

    def settle(self) -> None:
        """Bring the newest state and all gradients to the host."""
        self.drain()
        if self.updater is not None:
            self.updater.release_gradients()

    def note_overflow(self) -> None:
        """Look for infinities where stock does not: in gradients that accumulate on the device."""
        kept = [each for gradients in self._gradients for each in gradients.kept()]
        if kept:
            is_finite = torch.stack([torch.isfinite(each).all() for each in kept]).all()
            tracker = self._optimizer.inf_or_nan_tracker
            tracker.logical_or_((~is_finite).to(tracker.device))

    def note_scale(self, total_norm: Any) -> None:
        """Take note of the factor that stock would multiply the gradients by now."""
        optimizer = self._optimizer
        combined = optimizer.loss_scale
        if optimizer.clip_grad > 0.0:
            clip = ((total_norm / optimizer.loss_scale) + 1e-6) / optimizer.clip_grad
            combined = torch.clamp(clip, min=1.0) * optimizer.loss_scale
        self.scale = as_float32(1.0 / combined)
        self._has_updated = False

    def update_after(self, index: int) -> None:
        """Update everything once the last sub-group's turn has come."""
        if self.updater is None or self.scale is None:
            raise HostError("offload: DeepSpeed updates before it has unscaled its gradients")
        if index == self._last:
            self._follow()
            self.updater.update(self.scale)
            self._has_updated = True

    def relink_after(self, index: int) -> bool:
        """Point the parameters at their new values; False: nothing of ours is under way."""
        if self.scale is None:
            return False
        if index == self._last and self._has_updated:
            self.scale = None
            for each in range(self._last + 1):
                self._optimizer._unflatten_partitioned_parameters(each)
        return True

    @property
    def _last(self) -> int:
        return len(self._optimizer.fp16_groups) - 1


def planned_class(base: Any) -> dict[str, Any]:
    """Return the methods of the subclass; instances keep a `Zero3` in ``_lowtide_offload``."""

    def unscale_and_clip_grads(self: Any, _sub_group_id: int, total_norm: Any) -> None:
        self._lowtide_offload.note_scale(total_norm)

    def _optimizer_step(self: Any, sub_group_id: int) -> None:
        self._lowtide_offload.update_after(sub_group_id)

    def _reassign_or_swap_out_partitioned_parameters(self: Any, sub_group_id: int) -> None:
        if not self._lowtide_offload.relink_after(sub_group_id):
            base._reassign_or_swap_out_partitioned_parameters(self, sub_group_id)

    def _offload_grad_partition_at_boundary(
        self: Any, param: Any, grad_buffer: Tensor, *_swapped: Any
    ) -> None:
        self._lowtide_offload.arrive(param, grad_buffer)

    def partition_grads(self: Any, params_to_release: Any, grad_partitions: Any) -> Any:
        self._lowtide_offload.overwrite(params_to_release)
        return self._lowtide_offload.take_in(
            params_to_release,
            grad_partitions,
            lambda: base.partition_grads(self, params_to_release, grad_partitions),
        )

    def has_overflow(self: Any, partition_gradients: bool = True) -> Any:
        if partition_gradients:
            with torch.no_grad():
                self._lowtide_offload.note_overflow()
        return base.has_overflow(self, partition_gradients)

    body: dict[str, Any] = {
        "has_overflow": has_overflow,
        "unscale_and_clip_grads": unscale_and_clip_grads,
        "_optimizer_step": _optimizer_step,
        "_reassign_or_swap_out_partitioned_parameters": (
            _reassign_or_swap_out_partitioned_parameters
        ),
        "_offload_grad_partition_at_boundary": _offload_grad_partition_at_boundary,
        "partition_grads": partition_grads,
    }
    body["state"] = drained_state(base)
    body |= {name: after(base, name, "drain") for name in _READERS}
    body |= {name: after(base, name, "settle") for name in _MOVERS}
    body["state_dict"] = after(base, "state_dict", "show")
    body |= {name: after(base, name, "widen") for name in _GRADIENT_READERS}
    return body


def refusals(optimizer: Any) -> dict[str, bool]:
    """Return what this optimizer has that a planned update cannot do, with whether it has it."""
    masters = optimizer.fp32_partitioned_groups_flat
    return {
        "16-bit masters": any(each.dtype != torch.float32 for each in masters),
        "masters outside of host memory": any(each.device.type != "cpu" for each in masters),
        "parameters on NVMe": any(f is None for f in optimizer.fp16_partitioned_groups_flat),
        "Muon": bool(optimizer.use_muon),
    }
