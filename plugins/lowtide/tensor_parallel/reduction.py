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
statistic; for LayerNorm the ranks' a_i and ``A_i beta_i`` in rows of their own. In 16 bits a number
of the statistic is three numbers, which hold it exactly. Backward needs no message: all that
follows the sum is computed alike on all ranks.

Shapes: T tokens (all leading dimensions flattened), R latents of a group, p ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowtide.tensor_parallel import statistic
from lowtide.tensor_parallel.group import Pending, TensorGroup
from lowtide.tensor_parallel.norms import NormSetting

Statistics = tuple[Tensor, ...]


@dataclass(frozen=True)
class Room:
    """What a message has beside the latents of its tokens.

    Attributes:
        columns: Behind each token's latents, for the sum of squares.
        of_each: Behind those, for every rank's mean.
        vectors: Of length R that each rank sends.
        rows: Behind all tokens, for each of these vectors.
        size: Number of ranks.
    """

    columns: int = 0
    of_each: int = 0
    vectors: int = 0
    rows: int = 0
    size: int = 1

    @classmethod
    def of(cls, dtype: torch.dtype, size: int, norm: NormSetting | None, vectors: int) -> Room:
        """Return the room of a message.

        Args:
            dtype: Of the residual stream, or of the message.
            size: Number of ranks.
            norm: The norm before A, or None.
            vectors: That each rank sends with a LayerNorm: 1, or 2 if it has a bias.
        """
        if size == 1 or norm is None:
            return cls()
        columns = statistic.columns(dtype, size)
        if not norm.is_centred:
            return cls(columns, size=size)
        is_narrow = statistic.message_dtype(dtype) == torch.bfloat16
        of_each = statistic.columns_of_each(dtype, size)
        return cls(columns, of_each, vectors, statistic.PIECES if is_narrow else 1, size)

    @property
    def all_columns(self) -> int:
        """Columns of a row beside the latents."""
        return self.columns + self.of_each

    @property
    def all_rows(self) -> int:
        """Rows beside those of tokens."""
        return self.size * self.vectors * self.rows

    def write_vectors(self, block: Tensor, mine: Tensor, rank: int) -> None:
        """Write this rank's vectors ``[vectors, R]`` to ``[all_rows, R]``, zeros elsewhere."""
        block.zero_()
        of_rank = block.unflatten(0, (self.size, self.vectors, self.rows))[rank]
        for out, vector in zip(of_rank, mine, strict=True):
            if self.rows == 1:
                out[0] = vector
            else:
                statistic.split(out, vector)

    def read_vectors(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the ranks' first vectors and, if there are two, the sum of the second.

        Returns:
            ``[p, R]`` or ``[p + 1, R]``; no view of the message.
        """
        by_rank = block.unflatten(0, (self.size, self.vectors, self.rows))
        if self.rows == 1:
            numbers = by_rank[:, :, 0].to(dtype, copy=True)
        else:
            numbers = statistic.joined(by_rank.movedim(2, 0)).to(dtype)
        if self.vectors == 1:
            return numbers[:, 0]
        return torch.cat((numbers[:, 0], numbers[:, 1].sum(0, keepdim=True)))


class _Reduce(Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: TensorGroup,
        pending: Pending,
        room: Room,
        partial: Tensor,
        *statistics: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rank, ctx.vectors = group.rank, room.vectors
        message = pending.wait()
        if not statistics:
            return (message.view(partial.shape),)
        width, (tokens, kind) = partial.shape[-1], (statistics[0].numel(), statistics[0].dtype)
        shape = partial.shape[:-1]
        total = message[:tokens, :width].view(partial.shape)
        behind = message[:tokens, width:]
        squares = statistic.read(behind[:, : room.columns]).to(kind).view(shape)
        if len(statistics) == 1:
            return total, squares
        means = statistic.read_each(behind[:, room.columns :]).to(kind).view(*shape, group.size)
        return total, squares, means, room.read_vectors(message[tokens:, :width], kind)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, *d_statistics: Tensor | None) -> Any:
        gradients: tuple[Tensor | None, ...] = d_statistics
        if len(d_statistics) > 1:
            d_squares, d_means, d_vectors = d_statistics
            d_mean = None if d_means is None else d_means[..., ctx.rank]
            if d_vectors is not None:
                # The last is the sum of all ranks' A beta, the others are one rank's each.
                mine = (d_vectors[ctx.rank], d_vectors[-1])[: ctx.vectors]
                d_vectors = torch.stack(mine)
            gradients = (d_squares, d_mean, d_vectors)
        return None, None, None, d_total, *gradients


class Reduction:
    """What `functions.partial_down` returned, being summed over the ranks in one message.

    Backward this is the identity: what follows is computed alike on all ranks, so the gradient is
    already complete.

    Args:
        partial: ``u`` of `functions.partial_down`; its buffer is used up.
        statistics: What came with it.
        group: The ranks.
        norm: The norm before A, or None.
    """

    def __init__(
        self,
        partial: Tensor,
        statistics: Statistics,
        group: TensorGroup,
        norm: NormSetting | None = None,
    ) -> None:
        self._partial = partial
        self._statistics = statistics
        self._group = group
        self._pending: Pending | None = None
        if group.size > 1:
            vectors = len(statistics[2]) if len(statistics) > 1 else 0
            self._room = Room.of(partial.dtype, group.size, norm, vectors)
            message = _message(partial.detach(), statistics, self._room, group.rank)
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
            self._group, self._pending, self._room, self._partial, *self._statistics
        )
        return total, tuple(statistics)


@torch.no_grad()
def _message(partial: Tensor, statistics: Statistics, room: Room, rank: int) -> Tensor:
    """Return the buffer that `partial` lies in, with the statistics filled in."""
    if not statistics:
        return partial
    width, tokens = partial.shape[-1], statistics[0].numel()
    length = width + room.all_columns
    message = partial.as_strided((tokens + room.all_rows, length), (length, 1))
    behind = message[:tokens, width:]
    statistic.write(behind[:, : room.columns], statistics[0].flatten(), rank)
    if len(statistics) > 1:
        _, mean, vectors = statistics
        statistic.write_each(behind[:, room.columns :], mean.flatten(), rank)
        message[tokens:, width:] = 0
        room.write_vectors(message[tokens:, :width], vectors, rank)
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
        with exactly(total):
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
        with exactly(d_total):
            d_slopes = deviations.reshape(-1, deviations.shape[-1]).T @ by_token
            # Each mean is in the numerator, and in the variance; all of them in each deviation.
            d_means = d_total @ slopes.T
        d_means -= d_means.mean(-1, keepdim=True)
        local = ctx.width / deviations.shape[-1]
        d_means.addcmul_(deviations, d_squares.unsqueeze(-1), value=2 * local)
        return d_total.to(ctx.dtype), d_squares, d_means, d_slopes, None, None


def exactly(tensor: Tensor) -> torch.autocast:
    """Keep autocast from rounding the statistics' products."""
    return torch.autocast(tensor.device.type, enabled=False)


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
            `Room.read_vectors`.
        norm: The norm.
        dtype: Of the result.
    """
    if not norm.is_centred:
        latent: Tensor = _RecoverRms.apply(total, statistics[0], norm, dtype)
        return latent
    squares, means, vectors = statistics
    size = means.shape[-1]
    latent = _RecoverLayer.apply(total, squares, means, vectors[:size], norm, dtype)
    if len(vectors) == size:
        return latent
    # Added here, not in there: backward needs the latent without it, to its last digit.
    return latent + vectors[-1].to(dtype)
