"""The ends of the network: tied embedding, last norm, head, and the loss over a spread vocabulary.

The residual stream is gathered once in a model, before the head; the head's gradient comes back
in one reduce-scatter, which carries the norm's statistic too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lowtide.tensor_parallel import statistic
from lowtide.tensor_parallel.functions import rms_norm
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import (
    NormSetting,
    ParallelEmbedding,
    Part,
    Sharded,
    check_same_data,
)


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.scatter_sum_columns(partial, phase="forward")

    @staticmethod
    def backward(ctx: Any, d_mine: Tensor) -> Any:
        return ctx.group.gather_columns(d_mine, phase="backward"), None


class TiedEmbedding(ParallelEmbedding):
    """Token embedding that is the head's matrix too, so each rank holds a slice of the vocabulary.

    The ranks' terms (a token's vector on one rank, zero on the others) are summed and spread over
    the width in one reduce-scatter, half of an all-reduce. Its weight is ``[ceil(V / p), d]``.
    """

    @torch.compiler.disable
    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[..., n]``."""
        check_same_data(tokens, self.group)
        if self.group.size == 1:
            return F.embedding(tokens, self.weight, self.padding)
        rows = self.weight.shape[0]
        local = tokens - self.group.rank * rows
        is_elsewhere = (local < 0) | (local >= rows)
        # A token that is nowhere fails here as in an ordinary embedding, on every rank.
        (vocabulary,) = self.parts["weight"][0].blocks
        is_nowhere = (tokens < 0) | (tokens >= vocabulary)
        local = local.masked_fill(is_elsewhere, 0).masked_fill(is_nowhere, -1)
        vectors = F.embedding(local, self.weight)
        vectors = vectors.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
        if self.padding is not None:
            is_padding = (tokens == self.padding).unsqueeze(-1)
            vectors = torch.where(is_padding, vectors.detach(), vectors)
        mine: Tensor = _ScatterSum.apply(vectors, self.group)
        return mine


class _GatherNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, norm: NormSetting, group: TensorGroup) -> Tensor:
        wide = statistic.statistic_dtype(x.dtype)
        squares = torch.linalg.vector_norm(x, dim=-1, dtype=wide).square_()
        is_half = x.dtype == torch.float16
        scaled = x / statistic.local_scale(squares, x.shape[-1]) if is_half else x
        # Bits, not values: a gather does no arithmetic, so a wide number travels as narrow ones.
        bits = squares.unsqueeze(-1).view(x.dtype)
        message = torch.cat(((scaled * gain).to(x.dtype), bits), -1)
        both = group.gather_columns(message, phase="forward").unflatten(-1, (group.size, -1))
        scaled, bits = both.split((x.shape[-1], bits.shape[-1]), -1)
        by_rank = bits.contiguous().view(wide).squeeze(-1)
        rms = (by_rank.sum(-1) / norm.width + norm.epsilon).sqrt_().unsqueeze(-1)
        scaled = scaled.to(wide)
        if is_half:
            scaled.mul_(statistic.local_scale(by_rank, x.shape[-1]))
        normed = (scaled.flatten(-2) / rms).to(x.dtype)
        ctx.save_for_backward(x, gain, normed, rms)
        ctx.norm, ctx.group = norm, group
        return normed

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor) -> Any:
        x, gain, normed, rms = ctx.saved_tensors
        norm: NormSetting = ctx.norm
        group: TensorGroup = ctx.group
        wide = rms.dtype
        # The head's gradient is this rank's term of a sum, over parts of the vocabulary. So is
        # its product with the normed stream, which travels with it.
        d_normed = d_normed.reshape(-1, d_normed.shape[-1])
        inner = torch.linalg.vecdot(d_normed.to(wide), normed.view_as(d_normed).to(wide))
        columns = max(statistic.columns(x.dtype, group.size), 1)
        message = torch.empty(
            (d_normed.shape[0], group.size, x.shape[-1] + columns),
            dtype=statistic.message_dtype(x.dtype), device=x.device,
        )  # fmt: skip
        message[..., :-columns] = d_normed.unflatten(-1, (group.size, -1))
        room = torch.empty_like(message[:, 0, -columns:])
        statistic.write(room, inner, group.rank)
        message[..., -columns:] = room.unsqueeze(1)
        mine = group.scatter_sum_columns(message.flatten(-2), phase="backward")
        inner = statistic.read(mine[:, -columns:]).to(wide).view_as(rms)
        back = mine[:, :-columns].view(x.shape).to(wide) / rms
        d_gain = d_x = None
        if ctx.needs_input_grad[1]:
            rows, back_rows = x.reshape(-1, x.shape[-1]), back.reshape(-1, x.shape[-1])
            d_gain = torch.linalg.vecdot(rows.to(wide), back_rows, dim=0).to(gain.dtype)
        if ctx.needs_input_grad[0]:
            correction = inner.div_(rms.square()).div_(norm.width)
            d_x = (back * gain).addcmul_(x.to(wide), correction, value=-1).to(x.dtype)
        return d_x, d_gain, None, None


class GatherNorm(Sharded):
    """The last norm: the whole width leaves it, on every rank.

    Args:
        group: The ranks.
        gain: ``[n]``.
        part: Where it comes from.
        norm: Width and epsilon.
    """

    gain: Tensor

    def __init__(self, group: TensorGroup, gain: Tensor, part: Part, norm: NormSetting) -> None:
        super().__init__(group)
        self.norm = norm
        self.own("gain", gain, part)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Take ``[..., n]``, return ``[..., d]``.

        The gradient that comes back is taken as this rank's term of a sum over the ranks, which
        is what `VocabularyHead` gives.
        """
        if self.group.size == 1:
            return rms_norm(x, self.gain, self.norm.epsilon)
        normed: Tensor = _GatherNorm.apply(x, self.gain, self.norm, self.group)
        return normed


class _GatherVocabulary(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return group.gather_columns(logits, phase="forward")

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> Any:
        # Every rank computes the same with the whole logits, so each gradient is complete.
        return d_logits[..., ctx.group.slice_of(d_logits.shape[-1])].contiguous(), None


class VocabularyHead(Sharded):
    """The output projection, of which each rank holds a slice of the vocabulary.

    Args:
        group: The ranks.
        weight: ``[ceil(V / p), d]``; a tied embedding's own parameter is passed as it is.
        part: Where it comes from.
        vocabulary: V.
        bias: ``[ceil(V / p)]``, or None.
        bias_part: Where it comes from.

    Attributes:
        is_spread: Whether the next call returns this rank's part of the logits, for
            `loss.vocabulary_cross_entropy`, or all of them.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        group: TensorGroup,
        weight: Tensor,
        part: Part,
        vocabulary: int,
        bias: Tensor | None = None,
        bias_part: Part | None = None,
    ) -> None:
        super().__init__(group)
        self.vocabulary = vocabulary
        self.is_spread = False
        if isinstance(weight, nn.Parameter):
            self.weight = weight
            self.parts["weight"] = (part,)  # a second name of the same tensor
        else:
            self.own("weight", weight, part)
        self.own("bias", bias, *([bias_part] if bias_part is not None else []))

    @torch.compiler.disable
    def forward(self, normed: Tensor) -> Tensor:
        """Take ``[..., d]``, return ``[..., V]``, or ``[..., ceil(V / p)]`` if `is_spread`."""
        logits = F.linear(normed, self.weight, self.bias)
        if self.group.size == 1 or self.is_spread:
            return logits
        whole: Tensor = _GatherVocabulary.apply(logits, self.group)
        return whole[..., : self.vocabulary]
