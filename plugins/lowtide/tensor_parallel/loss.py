"""Cross-entropy over logits of which each rank holds a part of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.group import TensorGroup, fingerprint

IGNORED = -100
_EXACT = (1 << 24) - 1  # what a float32 holds exactly


class _TokenLosses(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocabulary: int, group: TensorGroup
    ) -> Tensor:
        part = logits.shape[-1]
        first = group.rank * part
        valid = min(part, max(vocabulary - first, 0))
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        values = logits.to(wide, copy=True)
        values[:, valid:] = float("-inf")  # rows that fill the last part up
        largest = _largest(values.amax(-1), targets, group)
        values.sub_(largest.unsqueeze(-1))
        local = targets - first
        is_mine = (local >= 0) & (local < valid)
        # A target that is nowhere fails here as in an ordinary loss, on every rank.
        is_nowhere = (targets < 0) | (targets >= vocabulary)
        index = local.masked_fill(~is_mine, 0).masked_fill(is_nowhere, -1).unsqueeze(-1)
        chosen = values.gather(-1, index).squeeze(-1).masked_fill(~is_mine, 0.0)
        values.exp_()
        both = torch.stack((values.sum(-1), chosen))
        total, chosen = group.sum(both, phase="forward").unbind()
        values.div_(total.unsqueeze(-1))
        ctx.save_for_backward(values, index, is_mine)
        ctx.dtype = logits.dtype
        return total.log() - chosen

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> Any:
        shares, index, is_mine = ctx.saved_tensors
        d_logits = shares.clone()
        d_logits.scatter_add_(-1, index, -is_mine.to(shares.dtype).unsqueeze(-1))
        d_logits.mul_(d_losses.unsqueeze(-1))
        return d_logits.to(ctx.dtype), None, None, None


def _largest(local: Tensor, targets: Tensor, group: TensorGroup) -> Tensor:
    """Return the largest logit of each token; refuse targets that differ, in the same message."""
    if not group.check_data:
        return group.maximum(local, phase="forward")
    mark = (fingerprint(targets) & _EXACT).to(local.dtype).view(1)
    largest = group.maximum(torch.cat((local, mark, -mark)), phase="forward")
    if largest[-2] != -largest[-1]:
        raise ModelError(
            f"lowtide.tensor_parallel: the {group.size} ranks of one tensor-parallel group got "
            f"different labels for the same tokens; a collator that draws random numbers must draw "
            f"the same on all of them: seed it by the data-parallel rank"
        )
    return largest[:-2]


@torch.compiler.disable
def vocabulary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocabulary: int,
    group: TensorGroup,
    *,
    ignored: int = IGNORED,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Return the cross-entropy of logits that are spread over the ranks.

    Two messages of one and two numbers per token; the softmax is computed in float32 (float64 for
    float64 logits).

    Args:
        logits: ``[..., ceil(V / p)]``, this rank's part.
        targets: ``[...]`` int64, the same on all ranks.
        vocabulary: V.
        group: The ranks.
        ignored: A target that takes no part.
        reduction: "mean" over the targets that take part, "sum", or "none" (zero where ignored).
        denominator: Divide the sum by this instead of the number of targets.

    Returns:
        A scalar, or ``[...]`` for "none", the same on all ranks.
    """
    flat = targets.flatten().to(logits.device)
    rows = logits.reshape(-1, logits.shape[-1])
    kept = flat != ignored
    if group.size == 1:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        losses = F.cross_entropy(wide, flat, ignore_index=ignored, reduction="none")
    else:
        losses = _TokenLosses.apply(rows, flat.masked_fill(~kept, 0), vocabulary, group)
        losses = losses.masked_fill(~kept, 0.0)
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    if denominator is not None:
        return total / denominator
    return total / kept.sum() if reduction == "mean" else total
