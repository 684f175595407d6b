"""The differentiable pieces of a bottleneck layer whose full-width side is spread over ranks.

``y = B sigma(A norm(x) + a)``: the residual stream x and the outputs y are sharded on their width,
latents are whole on every rank. Between A and B stands the only collective forward; between dy and
the latent's gradient stands the only one backward:

    partial_down   u_i = A_i (gamma_i * x_i), s_i = sum x_i^2          local
    reduce         U = sum u_i, S = sum s_i                            one all-reduce, one message
    recover        z = U / sqrt(S/d + eps)                             local, replicated
    up             y_i = B_i sigma(z); backward: dz = sum B_i^T dy_i   one all-reduce, under dB_i

The gradient that arrives at z is complete and the same on all ranks, so `reduce` and the norm need
no collective backward (BOOST's online RMSNorm: the division commutes with A; brief, section 4).

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
        ctx: Any, x: Tensor, weight: Tensor, gain: Tensor | None, room: int
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, weight, gain)
        dtype = statistic.message_dtype(x.dtype)
        buffer = torch.empty((*x.shape[:-1], weight.shape[0] + room), dtype=dtype, device=x.device)
        partial = buffer[..., : weight.shape[0]]
        squares = None
        if gain is not None:
            kind = statistic.statistic_dtype(x.dtype)
            squares = torch.linalg.vector_norm(x, dim=-1, dtype=kind).square_()
        if not is_recomputing():  # the sum was kept: this product would be thrown away
            _product(x, weight, gain, squares, partial)
        return partial, squares

    @staticmethod
    def backward(ctx: Any, d_partial: Tensor, d_squares: Tensor | None) -> Any:
        x, weight, gain = ctx.saved_tensors
        need_x, need_weight, need_gain, _ = ctx.needs_input_grad
        d_weight = d_x = d_gain = None
        if need_weight:
            d_weight = _weight_gradient(d_partial, x, weight, gain)
        if not (need_x or need_gain):
            return None, d_weight, None, None
        if gain is None:
            return d_partial.to(weight.dtype) @ weight, d_weight, None, None
        wide = statistic.statistic_dtype(x.dtype)
        back = _input_gradient(d_partial, weight)
        if need_gain:
            d_gain = torch.linalg.vecdot(_flat(x).to(wide), _flat(back).to(wide), dim=0)
            d_gain = d_gain.to(gain.dtype)
        if need_x:
            d_x = back.to(wide) * gain
            if d_squares is not None:
                d_x.addcmul_(x.to(wide), 2 * d_squares.unsqueeze(-1))
            d_x = d_x.to(x.dtype)
        return d_x, d_weight, d_gain, None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _product(
    x: Tensor, weight: Tensor, gain: Tensor | None, squares: Tensor | None, out: Tensor
) -> None:
    """Write ``(gain * x) weight^T`` to `out`, ``[..., R]`` with any distance between rows."""
    if x.dtype == torch.float16 and gain is not None and squares is not None:
        scale = statistic.local_scale(squares, x.shape[-1])
        scaled = (x.float() / scale * gain).to(x.dtype)
        torch.mul((scaled @ weight.T).float(), scale, out=out)
        return
    scaled = x if gain is None else (x * gain).to(weight.dtype)
    if out.dtype == weight.dtype == scaled.dtype and not torch.is_autocast_enabled(x.device.type):
        rows = out.view(-1, out.shape[-1]) if out.is_contiguous() else _rows(out)
        torch.mm(_flat(scaled), weight.T, out=rows)
    else:
        out.copy_(scaled @ weight.T)


def _weight_gradient(d_partial: Tensor, x: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
    """Return ``d_partial^T (gain * x)``, ``[R, n]``."""
    scaled = x if gain is None else x * gain
    if x.dtype == torch.float16 and gain is not None:
        squares = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_()
        scale = statistic.local_scale(squares, x.shape[-1])
        scaled = x.float() / scale * gain
        d_partial = d_partial * scale
    return _flat(d_partial.to(weight.dtype)).T @ _flat(scaled.to(weight.dtype))


def _input_gradient(d_partial: Tensor, weight: Tensor) -> Tensor:
    """Return ``d_partial weight``, ``[..., n]``."""
    if weight.dtype != torch.float16:
        return d_partial.to(weight.dtype) @ weight
    # It is divided by the norm already, so small where x is large: bring each row near 1.
    level = d_partial.float().abs().amax(-1, keepdim=True).clamp_(min=1e-30)
    return ((d_partial / level).to(weight.dtype) @ weight).float().mul_(level)


def _rows(strided: Tensor) -> Tensor:
    """Return ``[..., R]`` whose rows are all the same distance apart as ``[T, R]``, no copy."""
    width = strided.shape[-1]
    return strided.as_strided((strided.numel() // max(width, 1), width), strided.stride()[-2:])


def partial_down(
    x: Tensor, weight: Tensor, gain: Tensor | None, group: TensorGroup
) -> tuple[Tensor, Tensor | None]:
    """Multiply this rank's part of the width by its part of A.

    Args:
        x: ``[..., n]``, this rank's part.
        weight: ``[R, n]``.
        gain: ``[n]``, the norm's gain, or None where there is no norm.
        group: The ranks.

    Returns:
        ``u`` of shape ``[..., R]`` (followed in memory by room for the statistic), and
        ``s`` of shape ``[...]``, the sum of squares, or None without a norm.
    """
    room = 0 if gain is None else statistic.columns(x.dtype, group.size)
    partial, squares = _PartialDown.apply(x, weight, gain, room)
    return partial, squares


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, squares: Tensor | None, group: TensorGroup) -> Any:
        ctx.set_materialize_grads(False)
        if squares is None:
            return group.sum(partial.detach(), phase="forward"), None
        width = partial.shape[-1]
        room = statistic.columns(partial.dtype, group.size)
        rows = partial.numel() // max(width, 1)
        message = partial.as_strided((rows, width + room), (width + room, 1))
        statistic.write(message[:, width:], squares.flatten(), group.rank)
        group.sum(message, phase="forward")
        total = statistic.read(message[:, width:]).to(squares.dtype).view(squares.shape)
        return message[:, :width].unflatten(0, partial.shape[:-1]), total

    @staticmethod
    def backward(_ctx: Any, d_sum: Tensor | None, d_total: Tensor | None) -> Any:
        return d_sum, d_total, None


def reduce(
    partial: Tensor, squares: Tensor | None, group: TensorGroup
) -> tuple[Tensor, Tensor | None]:
    """Sum what `partial_down` returned over the ranks, in one message.

    The buffer of `partial` is used up. Backward this is the identity: what follows is computed
    alike on all ranks, so the gradient is already complete.

    Returns:
        ``U`` of shape ``[..., R]`` and ``S`` of shape ``[...]``, the same bits on all ranks.
    """
    if group.size == 1:
        return partial, squares
    total, squares = _Reduce.apply(partial, squares, group)
    return total, squares


class _Recover(Function):
    @staticmethod
    def forward(
        ctx: Any, total: Tensor, squares: Tensor, width: int, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        rms = (squares / width + epsilon).sqrt_().unsqueeze(-1)
        latent = (total.to(rms.dtype) / rms).to(dtype)
        ctx.save_for_backward(latent, rms)
        ctx.width, ctx.dtype = width, total.dtype
        return latent

    @staticmethod
    def backward(ctx: Any, d_latent: Tensor) -> Any:
        latent, rms = ctx.saved_tensors
        wide = d_latent.to(rms.dtype)
        # All columns that this norm feeds, before bias and activation.
        inner = torch.linalg.vecdot(wide, latent.to(rms.dtype))
        d_squares = inner.div_(rms.squeeze(-1).square()).mul_(-0.5 / ctx.width)
        return (wide / rms).to(ctx.dtype), d_squares, None, None, None


def recover(
    total: Tensor, squares: Tensor, width: int, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """Divide by the root mean square that the whole width has: ``z = U / sqrt(S/d + eps)``.

    Args:
        total: ``[..., R]``.
        squares: ``[...]``, float32 or float64, the sum over the whole width.
        width: d, the whole width.
        epsilon: Of the norm.
        dtype: Of the result.
    """
    latent: Tensor = _Recover.apply(total, squares, width, epsilon, dtype)
    return latent


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Normalise the last dimension, all of which is here; gains may be of a wider dtype than x."""
    wide = torch.promote_types(x.dtype, gain.dtype)
    return F.rms_norm(x.to(wide), gain.shape, gain.to(wide), epsilon).to(x.dtype)


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
