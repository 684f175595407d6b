"""torch's fused AdamW on the CPU as the optimizer behind a planned update.

Measured with torch 2.13: the kernels for AVX2 and AVX-512 give the same bits, by one order of
operations (csrc/offload/adam_element.hpp); the one for processors without them
fuses nothing and gives others. So the op is asked once, before an update stands in for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import ConfigError, HostError
from lowtide.offload.adam import AdamStep, torch_step, update
from lowtide.offload.updater import Master

_OP = "_fused_adamw_"  # what torch.optim calls for fused=True
_SIZE = 16 * 64
_ROUNDS = 8
_LR, _BETAS, _EPS, _DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


class TorchAdamW:
    """Some ``torch.optim.AdamW`` with ``fused=True`` on host tensors.

    Args:
        owners: Optimizer and number of the parameter group of each master's leaf.

    Raises:
        ConfigError: an optimizer or a group is not of that kind.
        HostError: this torch computes it in an order that Lowtide does not have.
    """

    def __init__(self, owners: Mapping[Tensor, tuple[Any, int]]) -> None:
        self.owners = dict(owners)
        for optimizer, group in self.owners.values():
            _refuse(optimizer, optimizer.param_groups[group])
        check_torch()

    def state_of(self, master: Master) -> MutableMapping[str, Any]:
        """Return the optimizer's state of a master."""
        state: MutableMapping[str, Any] = self.owners[master.leaf][0].state[master.leaf]
        return state

    def first_step(self) -> Tensor:
        """Return what ``step`` is before the first update: torch counts in a float32 tensor."""
        return torch.zeros((), dtype=torch.float32)

    def advance(
        self, master: Master, tails: tuple[Tensor, Tensor, Tensor], gradient: Tensor
    ) -> AdamStep:
        """Count the step, update the last elements with torch's kernel and return the scalars."""
        optimizer, number = self.owners[master.leaf]
        group = optimizer.param_groups[number]
        count = self.state_of(master)["step"]
        step = torch_step(
            int(count) + 1,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        count += 1
        if gradient.numel():
            stock_update(tails, gradient, count, group)
        return step


def stock_update(
    state: tuple[Tensor, Tensor, Tensor], gradient: Tensor, step: Tensor, group: Mapping[str, Any]
) -> None:
    """Update with torch's own kernel, in place.

    Args:
        state: Parameter and both moments; float32, shape (N,), on the CPU.
        gradient: As they are.
        step: Number of this update; float32, shape ().
        group: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
    """
    param, exp_avg, exp_avg_sq = state
    beta1, beta2 = group["betas"]
    getattr(torch, _OP)(
        [param], [gradient], [exp_avg], [exp_avg_sq], [], [step],
        lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
    )  # fmt: skip


@functools.cache
def check_torch() -> None:
    """Compare torch's kernel with `update` on random state, bit by bit.

    Raises:
        HostError: They differ, or torch has no such kernel.
    """
    what = f"torch {torch.__version__}"
    if not hasattr(torch, _OP):
        raise HostError(f"offload: {what} has no fused AdamW; install torch 2.6 or newer")
    group = {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}
    source = torch.Generator().manual_seed(0)
    for step in range(1, _ROUNDS + 1):
        before = torch.rand((4, _SIZE), generator=source)
        before[1] -= 0.5
        theirs, ours = before.clone(), before.clone()
        param, gradient, exp_avg, exp_avg_sq = theirs
        stock_update((param, exp_avg, exp_avg_sq), gradient, torch.tensor(float(step)), group)
        scalars = torch_step(step, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY)
        update(ours[0], ours[1], ours[2], ours[3], scalars, threads=1)
        if not torch.equal(theirs, ours):
            raise HostError(
                f"offload: the fused AdamW of {what} (CPU capability "
                f"{torch.backends.cpu.get_cpu_capability()}) gives other bits than the order of "
                f"operations that Lowtide has from torch 2.13 with AVX2 or AVX-512; leave "
                f"ATEN_CPU_CAPABILITY unset, install that torch, or remove lowtide.offload"
            )


def _refuse(optimizer: Any, group: Mapping[str, Any]) -> None:
    if type(optimizer) is not torch.optim.AdamW:
        raise ConfigError(
            f"lowtide.offload: the optimizer on the host is {type(optimizer).__module__}."
            f"{type(optimizer).__name__}, allowed is torch.optim.AdamW; set "
            f'OptimizerConfig.optimizer="adam" or remove lowtide.offload'
        )
    wanted = {"fused": True, "amsgrad": False, "maximize": False, "differentiable": False}
    for name, value in wanted.items():
        if bool(group.get(name, False)) != value:
            raise ConfigError(
                f"lowtide.offload: a parameter group of the host's AdamW has {name}="
                f"{group.get(name)!r}, allowed is {value}: the plugin reproduces the bits of "
                f"torch's fused AdamW; set it so or remove lowtide.offload"
            )
    if not 0.5 < group["betas"][0] < 1:
        raise ConfigError(
            f"lowtide.offload: OptimizerConfig.adam_beta1 is {group['betas'][0]}, allowed is more "
            f"than 0.5: below, torch computes in another order; change it or remove lowtide.offload"
        )
