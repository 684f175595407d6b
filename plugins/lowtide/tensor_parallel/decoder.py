"""A decoder layer whose full-width tensors are spread over ranks and whose latents are whole.

Four messages forward and four backward: queries, keys and values (3r), attention output (r), gate
and up (2r), down (r). The residual stream stays spread over its width from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.crossing import ARGUMENT, Latents
from lowtide.tensor_parallel.functions import shared
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import Activation, DownProjection, Part, Sharded, UpProjection
from lowtide.tensor_parallel.norms import rms_norm
from lowtide.tensor_parallel.patterns import LayerInputs
from lowtide.tensor_parallel.recompute import run_segment
from lowtide.tensor_parallel.reduction import Reduction

Modules = tuple[nn.Module | None, ...]


class Bottleneck(nn.Module):
    """Both halves of the projections that share an input."""

    def __init__(self, down: DownProjection, up: UpProjection) -> None:
        super().__init__()
        self.down = down
        self.up = up


@dataclass(frozen=True)
class AttentionSetting:
    """What attention does between the projections.

    Attributes:
        head_width: Of one head.
        scale: Multiplies the scores; None is ``head_width ** -0.5``.
        is_causal: Without a mask, a token sees itself and what is before it.
    """

    head_width: int
    scale: float | None = None
    is_causal: bool = True


class HeadNorms(Sharded):
    """RMSNorm over each head of queries and keys (Qwen3); the gains are the same on all ranks.

    Args:
        group: The ranks.
        gains: ``[K]`` of the queries and of the keys.
        parts: Where they come from.
        epsilon: Added to the mean square.
    """

    query_gain: Tensor
    key_gain: Tensor

    def __init__(
        self,
        group: TensorGroup,
        gains: tuple[Tensor, Tensor],
        parts: tuple[Part, Part],
        epsilon: float,
    ) -> None:
        super().__init__(group)
        self.epsilon = epsilon
        self.own("query_gain", gains[0], parts[0])
        self.own("key_gain", gains[1], parts[1])

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise ``[..., K]``. One small message backward: each rank has heads of its own."""
        of_q, of_k = shared(self.group, self.query_gain, self.key_gain)
        return rms_norm(q, of_q, self.epsilon), rms_norm(k, of_k, self.epsilon)


class DecoderLayer(nn.Module):
    """One block on one rank.

    Args:
        group: The ranks.
        attention_in: q, k and v.
        attention_out: The output projection.
        mlp_in: gate and up.
        mlp_out: down.
        attention: Settings.
        mlp_activation: On the gate; None multiplies gate and up as they are.
        head_norms: Gains of the query and key norms and their epsilon, or None.
        tier: Of activation checkpointing, one of `recompute.TIERS`.
        overlaps_forward: Whether two halves of the batch take turns, so that the messages of one
            are under way while the other computes.
        bind: Turns the arguments of a call into `LayerInputs`.
        layer_index: For the cache of keys and values.
    """

    def __init__(
        self,
        group: TensorGroup,
        *,
        attention_in: Bottleneck,
        attention_out: Bottleneck,
        mlp_in: Bottleneck,
        mlp_out: Bottleneck,
        attention: AttentionSetting,
        mlp_activation: Activation | None,
        bind: Callable[[tuple[Any, ...], dict[str, Any]], LayerInputs],
        head_norms: HeadNorms | None = None,
        tier: str = "none",
        overlaps_forward: bool = False,
        layer_index: int = 0,
    ) -> None:
        super().__init__()
        self.group = group
        self.attention_in = attention_in
        self.attention_out = attention_out
        self.mlp_in = mlp_in
        self.mlp_out = mlp_out
        self.head_norms = head_norms
        self.attention = attention
        self.mlp_activation = mlp_activation
        self.tier = tier
        self.overlaps_forward = overlaps_forward
        self.bind = bind
        self.layer_index = layer_index

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return this rank's part of the residual stream after the block, ``[B, T, n]``."""
        latents: Latents | None = kwargs.pop(ARGUMENT, None)
        previous: tuple[Tensor, ...] = ()
        if latents is not None and self.reads_latents:
            previous = latents.take(self.layer_index - 1)
        x, own = self.run(self.bind(args, kwargs), previous)
        if latents is not None and own:
            latents.put(self.layer_index, own, is_repeated=False)  # checkpoints are inside
        return x

    def run(
        self, inputs: LayerInputs, previous: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the block.

        Args:
            inputs: ``hidden`` is this rank's part, ``[B, T, n]``.
            previous: The latents that the block before passed on: of q, k and v together, of the
                attention output, of gate and up together, of down. Empty if none cross.

        Returns:
            This rank's part of the residual stream, and the latents for the block after, if any.

        Raises:
            ModelError: the residual stream is of another width, for example whole.
        """
        group, x = self.group, inputs.hidden
        norm = self.attention_in.down.norm
        if norm is not None and x.shape[-1] * group.size != norm.width:
            raise ModelError(
                f"decoder layer {self.layer_index}: got {x.shape[-1]} of the model's {norm.width} "
                f"columns, allowed are {norm.width // group.size} on each of {group.size} rank(s); "
                f"embeddings from outside (inputs_embeds) must come from the converted model's own "
                f"embedding"
            )
        if self.training and torch.is_grad_enabled():
            inputs = replace(inputs, cache=None)  # models fill one by habit; nobody will read it
        # A second run of attention would put the same keys into a cache once more.
        tier = self.tier if inputs.cache is None else "none"
        parts = self._halves(inputs, previous)
        results = _in_turn([self._block(part, latents, tier) for part, latents in parts])
        # The sums stand outside of all segments: backward reads nothing of them.
        if len(results) == 1:
            ((x, out, own),) = results
            return x + out, own
        joint: Tensor = _JoinedSum.apply(*(each for x, out, _ in results for each in (x, out)))
        return joint, tuple(map(torch.cat, zip(*(own for _, _, own in results), strict=True)))

    def _halves(
        self, inputs: LayerInputs, previous: tuple[Tensor, ...]
    ) -> list[tuple[LayerInputs, tuple[Tensor, ...]]]:
        """Return the inputs of the halves of the batch that take turns, or of all of it."""
        batch = inputs.hidden.shape[0]
        can = inputs.hidden.ndim == 3 and batch > 1 and inputs.cache is None
        if not (self.overlaps_forward and can) or self.group.size == 1:
            return [(inputs, previous)]

        def halves(each: Any, ndim: int) -> Sequence[Any]:
            is_of_batch = each is not None and each.ndim == ndim and each.shape[0] == batch
            return each.chunk(2) if is_of_batch else (each, each)

        latents = zip(*(each.chunk(2) for each in previous), strict=True) if previous else ((), ())
        parts = zip(
            halves(inputs.hidden, 3), halves(inputs.cos, 3), halves(inputs.sin, 3),
            halves(inputs.attention_mask, 4), latents, strict=True,
        )  # fmt: skip
        return [
            (replace(inputs, hidden=x, cos=cos, sin=sin, attention_mask=mask), before)
            for x, cos, sin, mask, before in parts
        ]

    def _block(
        self, inputs: LayerInputs, previous: tuple[Tensor, ...], tier: str
    ) -> Generator[None, None, tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
        """Compute the block, and give way whenever a message is under way.

        Returns:
            The residual stream, what is still to be added to it, and the latents that go on.
        """
        group, x = self.group, inputs.hidden
        of_qkv, of_o, of_mlp, of_down = previous or (None,) * 4

        def run(segment: Callable[..., Any], *inputs: Tensor | None, modules: Modules) -> Any:
            return run_segment(
                segment, *inputs, replicated=2, tier=tier, group=group, modules=modules
            )

        def send(down: DownProjection, partial: Tensor, *statistics: Tensor) -> Reduction:
            return Reduction(partial, statistics, group, down.norm)

        def attend(total: Tensor, before: Tensor | None, *statistics: Tensor) -> tuple[Tensor, ...]:
            return self._attend(total, before, statistics, inputs)

        sent = send(self.attention_in.down, *self.attention_in.down(x))
        yield
        total, statistics = sent.finish()
        inner: Modules = (self.attention_in.up, self.head_norms, self.attention_out.down)
        partial, *own_qkv = run(attend, total, of_qkv, *statistics, modules=inner)
        sent = send(self.attention_out.down, partial)
        yield
        total, _ = sent.finish()
        inner = (self.attention_out.up, self.mlp_in.down)
        x, *rest = run(self._middle, total, of_o, x, modules=inner)
        passed = 1 if self.attention_out.up.passes_on else 0
        own_o, rest = rest[:passed], rest[passed:]
        sent = send(self.mlp_in.down, *rest)
        yield
        total, statistics = sent.finish()
        inner = (self.mlp_in.up, self.mlp_out.down)
        partial, *own_mlp = run(self._multiply, total, of_mlp, *statistics, modules=inner)
        sent = send(self.mlp_out.down, partial)
        yield
        total, _ = sent.finish()
        out, *own_down = run(self._leave, total, of_down, modules=(self.mlp_out.up,))
        return x, out, (*own_qkv, *own_o, *own_mlp, *own_down)

    @property
    def reads_latents(self) -> bool:
        """Whether latents of the block before cross into this one."""
        return self.attention_in.up.gates is not None

    def _attend(
        self,
        total: Tensor,
        before: Tensor | None,
        statistics: tuple[Tensor, ...],
        inputs: LayerInputs,
    ) -> tuple[Tensor, ...]:
        q, k, v, *own = self.attention_in.up(total, statistics, before)
        q, k, v = (self._heads(each) for each in (q, k, v))
        if self.head_norms is not None:
            q, k = self.head_norms(q, k)
        if inputs.cos is not None and inputs.sin is not None:
            q, k = rotate(q, inputs.cos, inputs.sin), rotate(k, inputs.cos, inputs.sin)
        if inputs.cache is not None:
            k, v = inputs.cache.update(k, v, self.layer_index)
        mask = inputs.attention_mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:  # for each head of the model
            mask = mask[:, self.group.slice_of(mask.shape[1])]
        is_grouped = q.shape[-3] != k.shape[-3]
        if is_grouped and mask is not None:  # torch's fused kernels take groups or a mask, not both
            k, v = (each.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for each in (k, v))
            is_grouped = False
        is_first = mask is None and q.shape[-2] > 1
        context = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=self.attention.is_causal and is_first,
            scale=self.attention.scale,
            enable_gqa=is_grouped,
        )  # fmt: skip
        (partial,) = self.attention_out.down(context.transpose(-3, -2).flatten(-2))
        return (partial, *own)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.attention.head_width)).transpose(-3, -2)

    def _middle(self, total: Tensor, before: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
        out, *own = self.attention_out.up(total, (), before)
        x = x + out
        return (x, *own, *self.mlp_in.down(x))

    def _multiply(
        self, total: Tensor, before: Tensor | None, *statistics: Tensor
    ) -> tuple[Tensor, ...]:
        gate, value, *own = self.mlp_in.up(total, statistics, before)
        if self.mlp_activation is not None:
            gate = self.mlp_activation(gate)
        (partial,) = self.mlp_out.down(gate * value)
        return (partial, *own)

    def _leave(self, total: Tensor, before: Tensor | None) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.mlp_out.up(total, (), before, is_last=True)
        return outputs


class _JoinedSum(Function):
    """``cat((a + b, c + d))`` without a pass over the result for the joining."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.lengths = a.shape[0], c.shape[0]
        result = a.new_empty((sum(ctx.lengths), *a.shape[1:]))
        first, second = result.split(ctx.lengths)
        torch.add(a, b, out=first)
        torch.add(c, d, out=second)
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> Any:
        first, second = d_result.split(ctx.lengths)
        return first, first, second, second


def _in_turn(flows: Sequence[Generator[None, None, Any]]) -> list[Any]:
    """Run generators step by step, one after the other, and return what they return."""
    results: dict[int, Any] = {}
    while len(results) < len(flows):
        for place, flow in enumerate(flows):
            if place in results:
                continue
            try:
                next(flow)
            except StopIteration as end:
                results[place] = end.value
    return [results[place] for place in range(len(flows))]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (k, k + R/2) of a head by its position's angle (rotary embedding).

    Args:
        x: ``[B, H, T, K]``.
        cos: ``[T, R]`` or ``[B, T, R]``; what is behind the first R of K stays as it is.
        sin: As `cos`.
    """
    turning = cos.shape[-1]
    if turning < x.shape[-1]:
        return torch.cat((rotate(x[..., :turning], cos, sin), x[..., turning:]), dim=-1)
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)
