"""What DeepSpeed's compiled CPUAdam computes here, found out by asking it.

The op is compiled on the user's machine, so its vector width and what its compiler contracts are
not known before (see `lowtide.offload.adam` about the tail). Tests and benchmarks ask here what to
compare with; the adapters need not know, they leave the tail to the op itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowtide.core.errors import HostError
from lowtide.offload.adam import update
from lowtide.offload.adam_scalars import Powers, adam_step

_SIZE = 47  # leaves another remainder for every width below
_WIDTHS = (1, 4, 8, 16)
_ROUNDS = 48
_OBJECT = -47  # DeepSpeed numbers its CPUAdam objects from 0
_LR, _BETAS, _EPS, _DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class StockTail:
    """Which of a tensor's elements the op computes in the order of its scalar loop.

    Attributes:
        width: The last ``numel % width`` elements; 1 for none; 0 for all of them.
    """

    width: int

    def of(self, count: int) -> int:
        """Return the `tail` that `update` needs for a tensor of `count` elements."""
        return count % self.width if self.width else count


def measure_tail(op: Any) -> StockTail:
    """Run the op on random state and return the rule that explains all of its bits.

    Args:
        op: The loaded extension, ``CPUAdamBuilder().load()`` or ``optimizer.ds_opt_adam``.

    Raises:
        HostError: No rule does: this op is not the one that `update` reproduces.
    """
    candidates = {width: StockTail(width=width) for width in (*_WIDTHS, 0)}
    source = torch.Generator().manual_seed(0)
    op.create_adam(_OBJECT, _LR, *_BETAS, _EPS, _DECAY, True, False)
    try:
        for _ in range(_ROUNDS):
            before = torch.rand((4, _SIZE), generator=source)
            theirs = before.clone()
            scalars = (1, _LR, *_BETAS, _EPS, _DECAY, True)
            op.adam_update(_OBJECT, *scalars, *theirs)
            for width, tail in list(candidates.items()):
                if not torch.equal(theirs, _ours(before, tail.of(_SIZE))):
                    del candidates[width]
    finally:
        op.destroy_adam(_OBJECT)
    if not candidates:
        raise HostError(
            "DeepSpeed's cpu_adam op: got results that no known order of operations gives, allowed "
            "is the arithmetic of DeepSpeed 0.19; leave the offload plugin off, or install a "
            "DeepSpeed of that version and build its op again"
        )
    return next(iter(candidates.values()))


def _ours(before: Tensor, tail: int) -> Tensor:
    after = before.clone()
    step = adam_step(
        Powers(*_BETAS).advance(1, *_BETAS), lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY
    )
    param, grad, exp_avg, exp_avg_sq = after
    update(param, grad, exp_avg, exp_avg_sq, step, tail=tail, threads=1)
    return after
