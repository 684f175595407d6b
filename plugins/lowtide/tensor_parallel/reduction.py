"""The one message between A and B, and what turns its sum into a normed latent.

A norm over a width that is spread over ranks divides by a number that no rank has. Since that
division commutes with A, each rank multiplies its columns as they are, its part of the statistic
travels behind its part of the product, and every rank divides the sum (BOOST's online RMSNorm):

    z = sum_i A_i (gamma_i x_i) / sqrt(S/d + eps),    S = sum_i |x_i|^2

LayerNorm also takes the mean away, which would cancel badly if it were done after the product. So
rank i takes away the mean m_i of its own n = d/p columns before it, and the sum is put right with
``a_i = A_i gamma_i``, which no token changes (derived here; deviations m_i - mu are never larger
than the standard deviation times sqrt(p), so nothing cancels):

    z = (sum_i A_i (gamma_i (x_i - m_i)) + sum_i (m_i - mu) a_i) / sqrt(V + eps) + sum_i A_i beta_i
    V = (sum_i |x_i - m_i|^2 + n sum_i (m_i - mu)^2) / d

One message, laid out in rows of ``R + columns``: a row per token, the latents first and then the
statistic; for LayerNorm p + 1 rows more, of which rank i fills row i with a_i, and the last is
summed to ``A beta``. Backward needs no message: all that follows the sum is computed alike on all
ranks.

Shapes: T tokens (all leading dimensions flattened), R latents of a group, p ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowtide.tensor_parallel import statistic
from lowtide.tensor_parallel.group import Pending, TensorGroup
from lowtide.tensor_parallel.norms import NormSetting

Statistics = tuple[Tensor, ...]


def room(dtype: torch.dtype, size: int, norm: NormSetting) -> tuple[int, int]:
    """Return how many rows and columns a message has beside the latents of its tokens.

    Args:
        dtype: Of the residual stream.
        size: Number of ranks.
        norm: The norm before A.
    """
    if size == 1:
        return 0, 0
    columns = statistic.columns(dtype, size)
    if not norm.is_centred:
        return 0, columns
    return size + 1, columns + statistic.columns_of_each(dtype, size)


class _Reduce(Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: TensorGroup,
        pending: Pending,
        partial: Tensor,
        *statistics: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group = group
        message = pending.wait()
        if not statistics:
            return (message.view(partial.shape),)
        width, (tokens, kind) = partial.shape[-1], (statistics[0].numel(), statistics[0].dtype)
        shape = partial.shape[:-1]
        total = message[:tokens, :width].view(partial.shape)
        columns = statistic.columns(message.dtype, group.size)
        behind = message[:tokens, width:]
        squares = statistic.read(behind[:, :columns]).to(kind).view(shape)
        if len(statistics) == 1:
            return total, squares
        means = statistic.read_each(behind[:, columns:]).to(kind).view(*shape, group.size)
        return total, squares, means, message[tokens:, :width].to(kind)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, *d_statistics: Tensor | None) -> Any:
        gradients: tuple[Tensor | None, ...] = d_statistics
        if len(d_statistics) > 1:
            d_squares, d_means, d_rows = d_statistics
            rank = ctx.group.rank
            d_mean = None if d_means is None else d_means[..., rank]
            # The last row is the sum of all ranks' A beta, the others are one rank's each.
            d_constants = None if d_rows is None else d_rows[[rank, -1]]
            gradients = (d_squares, d_mean, d_constants)
        return None, None, d_total, *gradients


class Reduction:
    """A sum over the ranks under way.

    Args:
        partial: ``u`` of `functions.partial_down`; its buffer is used up.
        statistics: What came with it.
        group: The ranks.
    """

    def __init__(self, partial: Tensor, statistics: Statistics, group: TensorGroup) -> None:
        self._partial = partial
        self._statistics = statistics
        self._group = group
        self._pending: Pending | None = None
        if group.size > 1:
            with torch.no_grad():
                message = _message(partial.detach(), [s.detach() for s in statistics], group)
            self._pending = group.start_sum(message, phase="forward")

    def finish(self) -> tuple[Tensor, Statistics]:
        """Wait for it.

        Returns:
            ``U`` of shape ``[..., R]`` and the statistics of the whole width, the same bits on all
            ranks, for `recover`.
        """
        if self._pending is None:
            return self._partial, self._statistics
        total, *statistics = _Reduce.apply(
            self._group, self._pending, self._partial, *self._statistics
        )
        return total, tuple(statistics)


def reduce(
    partial: Tensor, statistics: Statistics, group: TensorGroup
) -> tuple[Tensor, Statistics]:
    """Sum what `functions.partial_down` returned over the ranks, in one message.

    The buffer of `partial` is used up. Backward this is the identity: what follows is computed
    alike on all ranks, so the gradient is already complete.

    Returns:
        As `Reduction.finish`.
    """
    return Reduction(partial, statistics, group).finish()


def _message(partial: Tensor, statistics: list[Tensor], group: TensorGroup) -> Tensor:
    """Return the buffer that `partial` lies in, with the statistics filled in."""
    if not statistics:
        return partial
    width, size = partial.shape[-1], group.size
    tokens = statistics[0].numel()
    columns = statistic.columns(partial.dtype, size)
    is_centred = len(statistics) > 1
    of_each = statistic.columns_of_each(partial.dtype, size) if is_centred else 0
    extra = size + 1 if is_centred else 0
    length = width + columns + of_each
    message = partial.as_strided((tokens + extra, length), (length, 1))
    statistic.write(message[:tokens, width : width + columns], statistics[0].flatten(), group.rank)
    if is_centred:
        _, mean, constants = statistics
        statistic.write_each(message[:tokens, width + columns :], mean.flatten(), group.rank)
        rows = message[tokens:].zero_()
        rows[group.rank, :width] = constants[0]
        rows[-1, :width] = constants[1]
    return message


class _RecoverRms(Function):
    @staticmethod
    def forward(
        ctx: Any, total: Tensor, squares: Tensor, norm: NormSetting, dtype: torch.dtype
    ) -> Tensor:
        rms = (squares / norm.width + norm.epsilon).sqrt_().unsqueeze(-1)
        latent = (total.to(rms.dtype) / rms).to(dtype)
        ctx.save_for_backward(latent, rms)
        ctx.width, ctx.dtype = norm.width, total.dtype
        return latent

    @staticmethod
    def backward(ctx: Any, d_latent: Tensor) -> Any:
        latent, rms = ctx.saved_tensors
        wide = d_latent.to(rms.dtype)
        d_squares = _of_squares(wide, latent, rms, ctx.width)
        return (wide / rms).to(ctx.dtype), d_squares, None, None


class _RecoverLayer(Function):
    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        squares: Tensor,
        means: Tensor,
        slopes: Tensor,
        norm: NormSetting,
        dtype: torch.dtype,
    ) -> Tensor:
        deviations = means - means.mean(-1, keepdim=True)  # [..., p]
        local = norm.width / means.shape[-1]
        variance = (squares + local * deviations.square().sum(-1)) / norm.width
        deviation = (variance + norm.epsilon).sqrt_().unsqueeze(-1)
        latent = (total.to(deviation.dtype) + deviations @ slopes).div_(deviation).to(dtype)
        ctx.save_for_backward(latent, deviation, deviations, slopes)
        ctx.width, ctx.dtype = norm.width, total.dtype
        return latent

    @staticmethod
    def backward(ctx: Any, d_latent: Tensor) -> Any:
        latent, deviation, deviations, slopes = ctx.saved_tensors
        wide = d_latent.to(deviation.dtype)
        d_squares = _of_squares(wide, latent, deviation, ctx.width)
        d_total = wide / deviation
        by_token = d_total.reshape(-1, d_total.shape[-1])
        d_slopes = deviations.reshape(-1, deviations.shape[-1]).T @ by_token
        # Each mean is in the numerator, and in the variance; the mean of all is in each deviation.
        d_means = d_total @ slopes.T
        d_means -= d_means.mean(-1, keepdim=True)
        local = ctx.width / deviations.shape[-1]
        d_means.addcmul_(deviations, d_squares.unsqueeze(-1), value=2 * local)
        return d_total.to(ctx.dtype), d_squares, d_means, d_slopes, None, None


def _of_squares(d_latent: Tensor, latent: Tensor, root: Tensor, width: int) -> Tensor:
    """Return the gradient of the sum of squares, ``[...]``, through the division by `root`."""
    # All columns that this norm feeds, before bias and activation.
    inner = torch.linalg.vecdot(d_latent, latent.to(d_latent.dtype))
    return inner.div_(root.squeeze(-1).square()).mul_(-0.5 / width)


def recover(total: Tensor, statistics: Statistics, norm: NormSetting, dtype: torch.dtype) -> Tensor:
    """Return the latent of the normed stream, from the sums.

    Args:
        total: ``[..., R]``.
        statistics: Of the whole width: squares ``[...]``; for LayerNorm also means ``[..., p]`` and
            ``[p + 1, R]``, see the head of this file.
        norm: The norm.
        dtype: Of the result.
    """
    if not norm.is_centred:
        latent: Tensor = _RecoverRms.apply(total, statistics[0], norm, dtype)
        return latent
    squares, means, constants = statistics
    latent = _RecoverLayer.apply(total, squares, means, constants[:-1], norm, dtype)
    return latent + constants[-1].to(dtype)
