"""DeepSpeed's CPU Adam as the optimizer behind a planned update."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from lowtide.offload.adam import AdamStep, Powers, adam_step
from lowtide.offload.updater import Master


class CpuAdam:
    """One ``DeepSpeedCPUAdam``.

    Args:
        optimizer: Its ``param_groups`` and ``state`` stay the ones in charge.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._powers = Powers(*optimizer.defaults["betas"])

    def state_of(self, master: Master) -> MutableMapping[str, Any]:
        """Return the optimizer's state of a master."""
        state: MutableMapping[str, Any] = self._optimizer.state[master.leaf]
        return state

    def first_step(self) -> int:
        """Return what ``step`` is before the first update."""
        return 0

    def advance(
        self, master: Master, tails: tuple[Tensor, Tensor, Tensor], gradient: Tensor
    ) -> AdamStep:
        """Count the step, update the last elements and return the scalars.

        DeepSpeed's kernel is called even with no element: that keeps its running powers up to date,
        should it have to take over.
        """
        group, state = self._optimizer.param_groups[master.group], self.state_of(master)
        state["step"] += 1
        betas, bias_correction = group["betas"], bool(group["bias_correction"])
        param, exp_avg, exp_avg_sq = tails
        self._optimizer.ds_opt_adam.adam_update(
            self._optimizer.opt_id, state["step"], group["lr"], *betas, group["eps"],
            group["weight_decay"], bias_correction, param, gradient, exp_avg, exp_avg_sq,
        )  # fmt: skip
        return adam_step(
            self._powers.advance(state["step"], *betas),
            lr=group["lr"],
            betas=betas,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=bias_correction,
            adamw=self._optimizer.adam_w_mode,
        )
