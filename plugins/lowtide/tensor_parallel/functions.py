"""The differentiable pieces of a bottleneck layer whose full-width side is spread over ranks.

``y = B sigma(A norm(x) + a)``: the residual stream x and the outputs y are sharded on their width,
latents are whole on every rank. Between A and B stands the only collective forward; between dy and
the latent's gradient stands the only one backward:

    partial_down   u_i = A_i (gamma_i * x_i), s_i = sum x_i^2          local
    reduce         U = sum u_i, S = sum s_i                            one all-reduce, one message
    recover        z = U / sqrt(S/d + eps)                             local, replicated
    up             y_i = B_i sigma(z); backward: dz = sum B_i^T dy_i   one all-reduce, under dB_i

`reduce` and `recover` stand in reduction.py, with LayerNorm's algebra. The gradient that arrives at
z is complete and the same on all ranks, so they need no collective backward.

Shapes: T tokens (all leading dimensions flattened), n = d/p local width, R latents of a group.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lowtide.tensor_parallel import statistic
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.norms import NormSetting
from lowtide.tensor_parallel.reduction import Room, exactly

_recomputing = threading.local()


def set_recomputing(value: bool) -> None:
    """Tell this thread's `partial_down` that its product will not be read."""
    _recomputing.value = value


def is_recomputing() -> bool:
    """Whether a checkpointed segment is running for the second time."""
    return getattr(_recomputing, "value", False)


class _PartialDown(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        norm: NormSetting | None,
        room: Room,
    ) -> tuple[Tensor, ...]:
        wide = statistic.statistic_dtype(x.dtype)
        rows, width = x.numel() // max(x.shape[-1], 1), weight.shape[0]
        dtype = statistic.message_dtype(x.dtype)
        buffer = torch.empty(
            (rows + room.all_rows, width + room.all_columns), dtype=dtype, device=x.device
        )
        by_token = buffer[:rows, :width]
        viewed = by_token.view(*x.shape[:-1], width)
        # To autograd no view: the sum over the ranks overwrites it before anything else reads it.
        partial = buffer.new_empty(0).set_(
            buffer.untyped_storage(), 0, viewed.shape, viewed.stride()
        )
        statistics: tuple[Tensor, ...] = ()
        centred, mean = x, None
        if norm is not None:
            if norm.is_centred:
                mean = x.mean(-1, dtype=wide)
                centred = x.to(wide) - mean.unsqueeze(-1)
            squares = torch.linalg.vector_norm(centred, dim=-1, dtype=wide).square_()
            statistics = (squares,)
            if mean is not None:
                statistics = (squares, mean, _vectors(weight, gain, bias, wide))
        ctx.save_for_backward(x, weight, gain, bias, mean)
        ctx.has_norm = norm is not None
        if not is_recomputing():  # the sum was kept: this product would be thrown away
            scale = None
            if statistics and x.dtype == torch.float16:
                scale = statistic.local_scale(statistics[0], x.shape[-1])
            _product(
                _scaled(centred, gain, weight, scale, norm is not None), weight, scale, by_token
            )
        return (partial, *statistics)

    @staticmethod
    def backward(ctx: Any, d_partial: Tensor, *d_statistics: Tensor) -> Any:
        x, weight, gain, bias, mean = ctx.saved_tensors
        need_x, need_weight, need_gain, need_bias, _, _ = ctx.needs_input_grad
        wide = statistic.statistic_dtype(x.dtype)
        d_weight = d_x = d_gain = d_bias = of_vectors = None
        if not ctx.has_norm:
            d_weight = _weight_gradient(d_partial, x, weight, gain, False) if need_weight else None
            return d_partial.to(weight.dtype) @ weight if need_x else None, d_weight, *(None,) * 4
        centred = x if mean is None else x.to(wide) - mean.unsqueeze(-1)
        if need_weight:
            d_weight = _weight_gradient(d_partial, centred, weight, gain, True)
        if mean is not None:
            d_vectors = d_statistics[2].to(wide)
            if d_weight is not None:
                d_weight += _of_vectors(d_vectors, gain, bias, x).to(d_weight.dtype)
            if need_gain or need_bias:
                with exactly(x):
                    of_vectors = d_vectors @ weight.to(wide)  # [1 or 2, n]
        if need_bias and of_vectors is not None:
            d_bias = of_vectors[1].to(bias.dtype)
        if not (need_x or need_gain):
            return None, d_weight, None, d_bias, None, None
        back = _input_gradient(d_partial, weight)
        if need_gain:
            d_gain = torch.linalg.vecdot(_flat(centred).to(wide), _flat(back).to(wide), dim=0)
            if of_vectors is not None:
                d_gain = d_gain + of_vectors[0]
            d_gain = d_gain.to(gain.dtype)
        if need_x:
            d_x = back.to(wide) if gain is None else back.to(wide) * gain
            d_x.addcmul_(centred.to(wide), 2 * d_statistics[0].unsqueeze(-1))
            if mean is not None:
                # What reaches x through its mean: all columns alike.
                d_x += (d_statistics[1] / x.shape[-1] - d_x.mean(-1)).unsqueeze(-1)
            d_x = d_x.to(x.dtype)
        return d_x, d_weight, d_gain, d_bias, None, None


def _vectors(weight: Tensor, gain: Tensor | None, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return A times the gain and, if there is one, A times the norm's bias: ``[1 or 2, R]``."""
    with exactly(weight):
        wide_weight = weight.to(wide)
        of_gain = wide_weight.sum(-1) if gain is None else wide_weight @ gain.to(wide)
        if bias is None:
            return of_gain.unsqueeze(0)
        return torch.stack((of_gain, wide_weight @ bias.to(wide)))


def _of_vectors(d_vectors: Tensor, gain: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the part of A's gradient that comes from `_vectors`, ``[R, n]``."""
    wide = d_vectors.dtype
    gain = torch.ones(x.shape[-1], dtype=wide, device=x.device) if gain is None else gain.to(wide)
    result = torch.outer(d_vectors[0], gain)
    return result if bias is None else result.addr_(d_vectors[1], bias.to(wide))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled(
    centred: Tensor, gain: Tensor | None, weight: Tensor, scale: Tensor | None, has_norm: bool
) -> Tensor:
    """Return ``gain * centred`` in A's dtype, each token divided by `scale` if there is one."""
    if scale is not None:
        wide = centred.float() / scale
        return (wide if gain is None else wide * gain).to(weight.dtype)
    scaled = centred if gain is None else centred * gain
    return scaled.to(weight.dtype) if has_norm else scaled


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
    """Write ``scale * x weight^T`` to `out`, ``[T, R]`` with any distance between rows."""
    x = _flat(x)
    if scale is not None:
        torch.mul((x @ weight.T).float(), scale.view(-1, 1), out=out)
    elif out.dtype == weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type):
        torch.mm(x, weight.T, out=out)
    else:
        out.copy_(x @ weight.T)


def _weight_gradient(
    d_partial: Tensor, centred: Tensor, weight: Tensor, gain: Tensor | None, has_norm: bool
) -> Tensor:
    """Return ``d_partial^T (gain * centred)``, ``[R, n]``."""
    scale = None
    if has_norm and weight.dtype == torch.float16:
        squares = torch.linalg.vector_norm(centred, dim=-1, dtype=torch.float32).square_()
        scale = statistic.local_scale(squares, centred.shape[-1])
        d_partial = d_partial * scale
    scaled = _scaled(centred, gain, weight, scale, has_norm)
    return _flat(d_partial.to(weight.dtype)).T @ _flat(scaled.to(weight.dtype))


def _input_gradient(d_partial: Tensor, weight: Tensor) -> Tensor:
    """Return ``d_partial weight``, ``[..., n]``."""
    if weight.dtype != torch.float16:
        return d_partial.to(weight.dtype) @ weight
    # It is divided by the norm already, so small where x is large: bring each row near 1.
    level = d_partial.float().abs().amax(-1, keepdim=True).clamp_(min=1e-30)
    return ((d_partial / level).to(weight.dtype) @ weight).float().mul_(level)


def partial_down(
    x: Tensor,
    weight: Tensor,
    group: TensorGroup,
    norm: NormSetting | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Multiply this rank's part of the width by its part of A.

    Args:
        x: ``[..., n]``, this rank's part.
        weight: ``[R, n]``.
        group: The ranks.
        norm: The norm before A, or None.
        gain: ``[n]``, the norm's gain; None is 1 (LayerNorm only).
        bias: ``[n]``, a LayerNorm's bias; None is 0.

    Returns:
        ``u`` of shape ``[..., R]`` (with room for the statistics behind it in memory), and the
        statistics. Without a norm none; with RMSNorm the sums of squares ``[...]``; with LayerNorm
        those of ``x - mean``, the means of this rank's columns ``[...]``, and A times gain, with a
        bias also A times that: ``[1 or 2, R]``. All but u are float32 (float64 where x is).
    """
    room = Room.of(x.dtype, group.size, norm, 1 if bias is None else 2)
    result: tuple[Tensor, ...] = _PartialDown.apply(x, weight, gain, bias, norm, room)
    return result


class _Up(Function):
    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        weight: Tensor,
        sizes: Sequence[int],
        group: TensorGroup,
        is_last: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(latent, weight)
        ctx.sizes, ctx.group = sizes, group
        if is_last and is_recomputing():
            return tuple(latent.new_empty((*latent.shape[:-1], size)) for size in sizes)
        by_member = _members(latent, weight.shape[1])
        outputs = []
        for first, count, begin, size in _runs(sizes):
            part = weight[begin : begin + count * size]
            lead = latent.shape[:-1]
            if count == 1:
                outputs.append((by_member[first] @ part.T).view(*lead, size))
                continue
            batch = torch.bmm(
                by_member[first : first + count], part.view(count, size, -1).transpose(1, 2)
            )
            outputs.extend(each.view(*lead, size) for each in batch.unbind())
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> Any:
        latent, weight = ctx.saved_tensors
        group: TensorGroup = ctx.group
        d_flat = [_flat(each).to(weight.dtype) for each in d_outputs]
        rank = weight.shape[1]
        pending = None
        if ctx.needs_input_grad[0]:
            d_members = latent.new_empty((len(d_flat), d_flat[0].shape[0], rank))
            begin = 0
            for member, (d_output, size) in enumerate(zip(d_flat, ctx.sizes, strict=True)):
                torch.mm(d_output, weight[begin : begin + size], out=d_members[member])
                begin += size
            pending = group.start_sum(d_members, phase="backward")
        d_weight = None
        if ctx.needs_input_grad[1]:  # while the message is under way
            d_weight = torch.empty_like(weight)
            by_member = _members(latent, rank)
            begin = 0
            for member, (d_output, size) in enumerate(zip(d_flat, ctx.sizes, strict=True)):
                torch.mm(d_output.T, by_member[member], out=d_weight[begin : begin + size])
                begin += size
        d_latent = None
        if pending is not None:
            d_latent = pending.wait().transpose(0, 1).reshape(latent.shape)
        return d_latent, d_weight, None, None, None


def _members(latent: Tensor, rank: int) -> Tensor:
    """View ``[..., c r]`` as ``[c, T, r]``."""
    return _flat(latent).unflatten(-1, (-1, rank)).transpose(0, 1)


def _runs(sizes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Return neighbours of equal size together: (first member, count, first row, size)."""
    runs: list[tuple[int, int, int, int]] = []
    begin = 0
    for member, size in enumerate(sizes):
        if runs and runs[-1][3] == size:
            first, count, row, _ = runs[-1]
            runs[-1] = (first, count + 1, row, size)
        else:
            runs.append((member, 1, begin, size))
        begin += size
    return runs


def up(
    latent: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    group: TensorGroup,
    *,
    is_last: bool = False,
) -> tuple[Tensor, ...]:
    """Multiply the latents of c projections by this rank's rows of their B.

    Neighbours of equal size are one batched product. Backward, the gradients of all latents are
    one message, which flies while the weights' gradients are computed.

    Args:
        latent: ``[..., c r]``, the same on all ranks.
        weight: ``[sum of sizes, r]``, projections one after another.
        sizes: Local rows of each projection, c of them.
        group: The ranks.
        is_last: Whether the result of a checkpointed segment's second run is never read.

    Returns:
        c tensors ``[..., size]``.
    """
    if group.size == 1:
        members = latent.split(weight.shape[1], -1)
        parts = weight.split(tuple(sizes))
        return tuple(F.linear(each, part) for each, part in zip(members, parts, strict=True))
    outputs: tuple[Tensor, ...] = _Up.apply(latent, weight, tuple(sizes), group, is_last)
    return outputs


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, group: TensorGroup, *parameters: Tensor) -> Any:
        ctx.group = group
        return tuple(each.view_as(each) for each in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        joined = torch.cat([each.flatten() for each in gradients])
        total = ctx.group.sum(joined, phase="backward")
        parts = total.split([each.numel() for each in gradients])
        return (None, *(p.view(g.shape) for p, g in zip(parts, gradients, strict=True)))


def shared(group: TensorGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Return parameters that are the same on all ranks but meet different activations there.

    Backward sums their gradients over the ranks, in one message for all of them.
    """
    if group.size == 1:
        return parameters
    result: tuple[Tensor, ...] = _Shared.apply(group, *parameters)
    return result
