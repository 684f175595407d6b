"""When stock DeepSpeed overwrites which piece of state: its ZeRO optimizers ask before they do.

DeepSpeed 0.19.8 updates by parameter group (ZeRO 1 and 2) or sub-group (ZeRO 3), each with one call
of `_optimizer_step(number)`. Overwritten are, of what a checkpoint may hold:

- ZeRO 3 (``runtime/zero/stage3.py``): in the call the float32 partition and its optimizer state
  (moments, torch's ``step``), right behind it the 16-bit partition;
- ZeRO 1 and 2 (``stage_1_and_2.py``): the same, the 16-bit parameters being this rank's part of a
  flat buffer that the model's file is made of. The other ranks' parts arrive in the all-gather
  behind the last group, so whatever is left is asked for at that group's turn. With one group, as
  most runs have, that is everything.

Gradients, norms and clipping touch nothing that is saved, and a step that is skipped because of an
overflow never comes to the call.

What waits for the whole copy instead, because it overwrites in another way or nobody has looked:
ZeRO 0 and the bfloat16 optimizer with float32 accumulation (one call for all), Megatron-core,
plain loops, tensors on a GPU, optimizer state on NVMe, TwinFlow's second optimizer (its share of
the sub-groups is moved), Muon (its momentum changes before the loop), ZenFlow, experts (groups of
their own), torch.autocast's gradient scaler (it decides by itself whether to step), and optimizers
that are neither torch's nor DeepSpeed's own. Under the offload plugin that plugin asks instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lowtide.core.state import StateAuthority

_OWNER = "deepspeed"
_METHOD = "_optimizer_step"
_OFFLOAD = "_lowtide_offload"  # there while the offload plugin updates, and asks, instead
_HOMES = ("torch.optim.", "deepspeed.ops.")
_KNOWN = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}
_OTHERS = (  # attributes that are true of what is not known well enough
    "swap_optimizer", "use_muon", "zenflow", "has_moe_layers", "torch_autocast_gradscaler",
    "backup_optimizer",
)  # fmt: skip


class StockUpdates:
    """Asks on behalf of one engine's optimizer, as long as nothing else updates its state."""

    def __init__(self, optimizer: Any, authority: StateAuthority) -> None:
        self._optimizer = optimizer
        self._authority = authority
        if not _is_known(optimizer):
            return

        def ask_first(number: int) -> Any:
            if not self._is_taken_over():
                self._ask(number)
            return getattr(type(optimizer), _METHOD)(optimizer, number)

        optimizer.__dict__[_METHOD] = ask_first
        authority.promise(_OWNER, self._tensors)

    def close(self) -> None:
        """Give the optimizer its own method back."""
        self._authority.withdraw(_OWNER)
        getattr(self._optimizer, "__dict__", {}).pop(_METHOD, None)

    def _is_taken_over(self) -> bool:
        return hasattr(self._optimizer, _OFFLOAD)

    def _ask(self, number: int) -> None:
        if not self._authority.is_read():
            return
        last = len(self._masters()) - 1
        if number == 0:  # the order of all of them, so that copies run ahead of the update
            self._authority.coming(t for i in range(last + 1) for t in self._group(i))
        tensors = [*self._group(number), *(self._gathered() if number == last else [])]
        self._authority.before_overwrite(tensors)

    def _tensors(self) -> list[torch.Tensor]:
        if self._is_taken_over():
            return []
        groups = [t for i in range(len(self._masters())) for t in self._group(i)]
        return [*groups, *self._gathered()]

    def _masters(self) -> list[torch.Tensor]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _group(self, number: int) -> Iterator[torch.Tensor]:
        """Yield what one call overwrites."""
        optimizer, master = self._optimizer, self._masters()[number]
        state = optimizer.optimizer.state  # not the wrapper's, whose property may do more
        found = [master, *(state[master].values() if master in state else ())]
        if hasattr(optimizer, "fp16_partitioned_groups_flat"):
            found.append(optimizer.fp16_partitioned_groups_flat[number])
        else:
            import torch.distributed as dist

            rank = dist.get_rank(group=optimizer.real_dp_process_group[number])
            found.append(optimizer.parallel_partitioned_bit16_groups[number][rank])
        # What has gaps is neither promised nor asked for, so all of it is waited for.
        yield from (t.detach() for t in found if torch.is_tensor(t) and t.is_contiguous())

    def _gathered(self) -> list[torch.Tensor]:
        return list(getattr(self._optimizer, "bit16_groups_flat", []))


def _is_known(optimizer: Any) -> bool:
    base = getattr(optimizer, "optimizer", None)
    return (
        type(optimizer).__name__ in _KNOWN
        and type(base).__module__.startswith(_HOMES)
        and not any(getattr(optimizer, name, None) for name in _OTHERS)
    )
