"""Activation checkpointing whose segments end where a collective begins.

What a segment reads is a reduced latent, which is kept; so its second run needs no message of the
reduction, and the product whose sum was kept is not computed again either (`set_recomputing`).
``sharded_latents`` keeps of each latent only this rank's tokens, and gathers them for the second
run: 1/p of the memory for half of an all-reduce's bytes.

Latents that cross from the block before (`crossing`) are read in the segments too. They come out of
an activation in the block before, so they are kept besides what that block keeps: for each token
and block 2d/p + 14r elements in place of 2d/p + 7r, or 2d/p + 14r/p in place of 2d/p + 7r/p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lowtide.tensor_parallel.functions import set_recomputing
from lowtide.tensor_parallel.group import TensorGroup

TIERS = ("none", "latents", "sharded_latents")


class _TokenShard:
    """This rank's tokens of a latent that all ranks had."""

    def __init__(self, latent: Tensor, group: TensorGroup) -> None:
        self.shape = latent.shape
        self.group = group
        rows = latent.reshape(-1, latent.shape[-1])
        part = -(-rows.shape[0] // group.size)
        mine = rows[group.rank * part : (group.rank + 1) * part]
        self.rows = rows.new_zeros((part, rows.shape[1]))
        self.rows[: mine.shape[0]] = mine

    def gather(self) -> Tensor:
        """Return the whole latent. All ranks come here in the same order."""
        rows = self.group.gather_rows(self.rows, phase="recompute")
        count = 1
        for length in self.shape[:-1]:
            count *= length
        return rows[:count].view(self.shape)


def run_segment(
    segment: Callable[..., Any],
    *inputs: Tensor | None,
    replicated: int = 1,
    tier: str,
    group: TensorGroup,
    modules: Sequence[nn.Module | None] = (),
) -> Any:
    """Call ``segment(*inputs)``, keeping for backward what `tier` says.

    Args:
        segment: Reads a reduced latent and ends with `partial_down` or with an output.
        *inputs: All are kept. The first is a reduced latent, ``[..., R]``.
        replicated: How many of the first inputs are latents, the same on all ranks; those that
            are absent count.
        tier: One of `TIERS`.
        group: The ranks.
        modules: What the segment calls; whether they are trained decides what backward does where
            nothing before them is.
    """
    if tier == "none" or not torch.is_grad_enabled():
        return segment(*inputs)
    if not any(each is not None and each.requires_grad for each in inputs):
        if not _is_trained(modules) or inputs[0] is None:
            return segment(*inputs)  # backward does not come here
        inputs = (inputs[0].detach().requires_grad_(), *inputs[1:])

    def twice(*inputs: Any) -> Any:
        # Gradients are recorded in the second run alone.
        set_recomputing(torch.is_grad_enabled())
        try:
            return segment(*inputs)
        finally:
            set_recomputing(False)

    # Reentrant: the second run is an ordinary forward and backward, whose hooks ZeRO 3 needs to
    # gather parameters. It looks at its inputs alone: one of them must require gradients.
    if tier == "latents" or group.size == 1:
        return checkpoint(twice, *inputs, use_reentrant=True)

    # Not the latents themselves: autograd keeps the hooks, which would keep what they refer to.
    shapes = {each.data_ptr(): each.shape for each in inputs[:replicated] if each is not None}

    def pack(tensor: Tensor) -> Any:
        is_latent = shapes.get(tensor.data_ptr()) == tensor.shape
        return _TokenShard(tensor, group) if is_latent else tensor

    def unpack(kept: Any) -> Tensor:
        return kept.gather() if isinstance(kept, _TokenShard) else kept

    with saved_tensors_hooks(pack, unpack):
        return checkpoint(twice, *inputs, use_reentrant=True)


def _is_trained(modules: Sequence[nn.Module | None]) -> bool:
    present = [each for each in modules if each is not None]
    return any(parameter.requires_grad for each in present for parameter in each.parameters())
