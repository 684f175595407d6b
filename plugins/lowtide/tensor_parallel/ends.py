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
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import (
    ParallelEmbedding,
    Part,
    Sharded,
    check_same_data,
)
from lowtide.tensor_parallel.norms import NormSetting, normalised
from lowtide.tensor_parallel.reduction import exactly


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
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        norm: NormSetting,
        group: TensorGroup,
    ) -> Tensor:
        wide = statistic.statistic_dtype(x.dtype)
        centred, numbers = x, []
        if norm.is_centred:
            numbers = [x.mean(-1, dtype=wide)]
            centred = x.to(wide) - numbers[0].unsqueeze(-1)
        squares = torch.linalg.vector_norm(centred, dim=-1, dtype=wide).square_()
        is_half = x.dtype == torch.float16
        scaled = centred / statistic.local_scale(squares, x.shape[-1]) if is_half else centred
        if gain is not None and not norm.is_centred:
            scaled = scaled * gain
        # Bits, not values: a gather does no arithmetic, so a wide number travels as narrow ones.
        bits = torch.stack((squares, *numbers), -1).view(x.dtype)
        message = torch.cat((scaled.to(x.dtype), bits), -1).flatten(0, -2)
        vectors = [each for each in (gain, bias) if each is not None and norm.is_centred]
        rows = _as_rows(vectors, message, wide)
        both = group.gather_columns(torch.cat((message, rows)), phase="forward")
        both = both.unflatten(-1, (group.size, -1))
        both, rows = both.split((message.shape[0], rows.shape[0]))
        scaled, bits = both.split((x.shape[-1], bits.shape[-1]), -1)
        squares, *numbers = bits.contiguous().view(wide).unbind(-1)  # [T, p] each
        scaled = scaled.to(wide)
        if is_half:
            scaled.mul_(statistic.local_scale(squares, x.shape[-1]))
        mean, total = None, squares.sum(-1)
        if norm.is_centred:
            mean = numbers[0].mean(-1, keepdim=True)
            deviations = numbers[0] - mean
            total = total + x.shape[-1] * deviations.square().sum(-1)
            scaled = scaled + deviations.unsqueeze(-1)
        root = (total / norm.width + norm.epsilon).sqrt_().unsqueeze(-1)
        normed = scaled.flatten(-2) / root
        whole = _from_rows(rows, len(vectors), x.shape[-1], wide)
        whole_gain = whole.pop(0) if gain is not None and whole else None
        if whole_gain is not None:
            normed = normed * whole_gain
        # Backward needs it without the bias, to its last digit.
        kept = normed.to(x.dtype)
        result = (normed + whole[0]).to(x.dtype) if whole else kept
        shape = (*x.shape[:-1], norm.width)
        ctx.save_for_backward(x, gain, bias, kept, root, mean, whole_gain)
        ctx.norm, ctx.group = norm, group
        return result.view(shape)

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor) -> Any:
        x, gain, bias, normed, root, mean, whole_gain = ctx.saved_tensors
        norm: NormSetting = ctx.norm
        group: TensorGroup = ctx.group
        wide = root.dtype
        # The head's gradient is this rank's term of a sum, over parts of the vocabulary. So is
        # its product with the normed stream, which travels with it.
        d_normed = d_normed.reshape(normed.shape)
        wide_d = d_normed.to(wide)
        sums = [torch.linalg.vecdot(wide_d, normed.to(wide))]
        if norm.is_centred:
            with exactly(x):
                sums.append(wide_d.sum(-1) if whole_gain is None else wide_d @ whole_gain)
        back, sums = _scatter(d_normed, sums, x, group)
        flat = x.reshape(back.shape).to(wide)
        centred = (flat if mean is None else flat - mean) / root
        back = back.to(wide)
        inner, *level = [each.view_as(root) / norm.width for each in sums]
        d_gain = d_bias = d_x = None
        _, need_gain, need_bias = ctx.needs_input_grad[:3]
        if need_gain:
            d_gain = torch.linalg.vecdot(centred, back, dim=0).to(gain.dtype)
        if need_bias:
            d_bias = back.sum(0).to(bias.dtype)
        if ctx.needs_input_grad[0]:
            d_x = (back if gain is None else back * gain).addcmul_(centred, inner, value=-1)
            d_x = ((d_x - level[0] if level else d_x) / root).to(x.dtype).view(x.shape)
        return d_x, d_gain, d_bias, None, None


def _as_rows(vectors: list[Tensor], message: Tensor, wide: torch.dtype) -> Tensor:
    """Return vectors ``[n]`` as rows of a message ``[T, n + columns]``, by their bits."""
    narrow = [each.to(wide).view(message.dtype) for each in vectors]
    if not narrow:
        return message[:0]
    rows = torch.cat(narrow).view(-1, vectors[0].shape[0])
    return F.pad(rows, (0, message.shape[-1] - rows.shape[-1]))


def _from_rows(rows: Tensor, count: int, width: int, wide: torch.dtype) -> list[Tensor]:
    """Return the whole vectors ``[p n]`` that `_as_rows` wrote on each of p ranks."""
    if not count:
        return []
    by_rank = rows[..., :width].unflatten(0, (count, -1)).transpose(1, 2)  # [count, p, parts, n]
    return list(by_rank.contiguous().flatten(-2).view(wide).flatten(1))


def _scatter(
    d_normed: Tensor, sums: list[Tensor], x: Tensor, group: TensorGroup
) -> tuple[Tensor, list[Tensor]]:
    """Sum gradients ``[T, d]`` and numbers per token over the ranks, in one message.

    Returns:
        This rank's columns of the sum, ``[T, n]``, and the sums of the numbers, ``[T]``.
    """
    width, each = x.shape[-1], max(statistic.columns(x.dtype, group.size), 1)
    columns = each * len(sums)
    message = torch.empty(
        (d_normed.shape[0], group.size, width + columns),
        dtype=statistic.message_dtype(x.dtype), device=x.device,
    )  # fmt: skip
    message[..., :width] = d_normed.unflatten(-1, (group.size, -1))
    room = torch.empty_like(message[:, 0, width:])
    for part, number in zip(room.split(each, -1), sums, strict=True):
        statistic.write(part, number, group.rank)
    message[..., width:] = room.unsqueeze(1)
    mine = group.scatter_sum_columns(message.flatten(-2), phase="backward")
    read = [statistic.read(part).to(sums[0].dtype) for part in mine[:, width:].split(each, -1)]
    return mine[:, :width], read


class GatherNorm(Sharded):
    """The last norm: the whole width leaves it, on every rank.

    Args:
        group: The ranks.
        norm: Kind, width and epsilon.
        gain: ``[n]``, or None where the norm has none.
        gain_part: Where it comes from.
        bias: ``[n]``, or None.
        bias_part: Where it comes from.
    """

    gain: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        group: TensorGroup,
        norm: NormSetting,
        gain: Tensor | None = None,
        gain_part: Part | None = None,
        bias: Tensor | None = None,
        bias_part: Part | None = None,
    ) -> None:
        super().__init__(group)
        self.norm = norm
        self.own("gain", gain, *([gain_part] if gain_part is not None else []))
        self.own("bias", bias, *([bias_part] if bias_part is not None else []))

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Take ``[..., n]``, return ``[..., d]``.

        The gradient that comes back is taken as this rank's term of a sum over the ranks, which
        is what `VocabularyHead` gives.
        """
        if self.group.size == 1:
            return normalised(x, self.gain, self.bias, self.norm)
        normed: Tensor = _GatherNorm.apply(x, self.gain, self.bias, self.norm, self.group)
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
