"""The two halves of a bottleneck layer as modules: what one rank holds of A and of B.

Projections that share an input are one module, so that their A is one product and one message
(paper: linear-layer grouping); names, shapes and order of the parts are in `Part`, which is also
what exports and imports of whole weights go by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.crossing import gated
from lowtide.tensor_parallel.functions import partial_down, up
from lowtide.tensor_parallel.group import TensorGroup, fingerprint
from lowtide.tensor_parallel.norms import NormSetting, normalised
from lowtide.tensor_parallel.reduction import Statistics, recover

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Where a parameter's rows or columns come from in the unsharded model.

    Attributes:
        name: The whole tensor's name in the unsharded model's state dict.
        rows: Rows of this parameter that it takes (on one rank).
        blocks: Lengths of its blocks along the sharded dimension in the whole tensor; each block
            is divided among the ranks by itself (fused k and v: two blocks).
        dim: The sharded dimension, or None: the tensor is whole on every rank.
        padded: Length to which the sharded dimension is filled up with zeros before it is divided.
    """

    name: str
    rows: slice
    blocks: tuple[int, ...]
    dim: int | None
    padded: int | None = None

    def cut(self, whole: Tensor, group: TensorGroup) -> Tensor:
        """Return this rank's part of the whole tensor."""
        if self.dim is None:
            return whole
        if self.padded is not None:
            missing = self.padded - whole.shape[self.dim]
            shape = list(whole.shape)
            shape[self.dim] = missing
            whole = torch.cat((whole, whole.new_zeros(shape)), self.dim)
        pieces = whole.split(self._lengths(), self.dim)
        mine = []
        for piece in pieces:
            at = group.slice_of(piece.shape[self.dim])
            mine.append(piece.narrow(self.dim, at.start, at.stop - at.start))
        return torch.cat(mine, self.dim)

    def join(self, by_rank: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor from the parts of all ranks."""
        if self.dim is None:
            return by_rank[0]
        lengths = [length // len(by_rank) for length in self._lengths()]
        split = [each.split(lengths, self.dim) for each in by_rank]
        blocks = [torch.cat([each[b] for each in split], self.dim) for b in range(len(lengths))]
        return torch.cat(blocks, self.dim).narrow(self.dim, 0, sum(self.blocks))

    def whole_shape(self, mine: Tensor) -> tuple[int, ...]:
        """Return the whole tensor's shape, from one rank's part of it."""
        shape = list(mine.shape)
        if self.dim is not None:
            shape[self.dim] = sum(self.blocks)
        return tuple(shape)

    def _lengths(self) -> list[int]:
        return list(self.blocks) if self.padded is None else [self.padded]


class Sharded(nn.Module):
    """A module whose parameters are parts of an unsharded model's tensors.

    Attributes:
        parts: For each of its own parameters, where its rows come from.
    """

    def __init__(self, group: TensorGroup) -> None:
        super().__init__()
        self.group = group
        self.parts: dict[str, tuple[Part, ...]] = {}

    def own(self, name: str, value: Tensor | None, *parts: Part) -> None:
        """Make `value` a parameter; hosts learn from it whether it differs between ranks."""
        if value is None:
            self.register_parameter(name, None)
            return
        parameter = nn.Parameter(value.contiguous())
        # The name DeepSpeed and Megatron look for: without it a gradient norm would count this
        # parameter on the first rank alone.
        parameter.tensor_model_parallel = any(  # type: ignore[attr-defined]
            part.dim is not None for part in parts
        )
        self.register_parameter(name, parameter)
        self.parts[name] = parts


class DownProjection(Sharded):
    """The A of projections that share an input, with the norm before it.

    Args:
        group: The ranks.
        weight: ``[R, n]``, this rank's columns.
        weight_parts: One for each projection.
        norm: The norm before it, or None.
        gain: ``[n]``, this rank's part of the norm's gain; None: the norm has none.
        gain_part: Where it comes from.
        norm_bias: ``[n]``, of the norm's bias, or None.
        norm_bias_part: Where it comes from.
    """

    weight: Tensor
    gain: Tensor | None
    norm_bias: Tensor | None

    def __init__(
        self,
        group: TensorGroup,
        weight: Tensor,
        weight_parts: Sequence[Part],
        norm: NormSetting | None = None,
        gain: Tensor | None = None,
        gain_part: Part | None = None,
        norm_bias: Tensor | None = None,
        norm_bias_part: Part | None = None,
    ) -> None:
        super().__init__(group)
        self.norm = norm
        self.own("weight", weight, *weight_parts)
        self.own("gain", gain, *([gain_part] if gain_part is not None else []))
        self.own("norm_bias", norm_bias, *([norm_bias_part] if norm_bias_part is not None else []))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return this rank's term of the latents and the statistics, for `reduction.Reduction`.

        Args:
            x: ``[..., n]``.

        Returns:
            As `functions.partial_down`; on one rank the latents alone.
        """
        if self.group.size == 1:  # nothing to put off: torch's own operations are the fastest
            if self.norm is not None:
                x = normalised(x, self.gain, self.norm_bias, self.norm)
            return (F.linear(x, self.weight),)
        return partial_down(x, self.weight, self.group, self.norm, self.gain, self.norm_bias)


class CrossingGates(Sharded):
    """Gates of the latents that come from the decoder layer before; the same on all ranks.

    A latent is whole on every rank, and so is its gradient: nothing is sent for a crossing, and
    the gates' gradients are complete and alike everywhere.

    Args:
        group: The ranks.
        kind: One of `gates.GATES`.
        members: Number of projections that share an input.
        parameters: By the names of `gates.gate_shapes`, joined over the projections.
        parts: Where they come from.
    """

    def __init__(
        self,
        group: TensorGroup,
        kind: str,
        members: int,
        parameters: Mapping[str, Tensor],
        parts: Mapping[str, Sequence[Part]],
    ) -> None:
        super().__init__(group)
        self.kind = kind
        self.members = members
        for name, value in parameters.items():
            self.own(name, value, *parts[name])

    def forward(self, latent: Tensor) -> Tensor:
        """Return ``[..., R]`` from the latents ``[..., S]`` of the layer before."""
        parameters = dict(self.named_parameters(recurse=False))
        return gated(self.kind, parameters, latent, self.members)


class UpProjection(Sharded):
    """The latents' way out: norm, bias, activation, and the B of projections that share an input.

    Args:
        group: The ranks.
        weight: ``[rows, r]``, this rank's rows of all B, one after another.
        weight_parts: One for each projection.
        sizes: Local rows of each projection.
        latent_bias: ``[R]``, the same on all ranks, or None.
        latent_bias_parts: Where it comes from.
        bias: ``[rows]``, or None.
        bias_parts: Where it comes from.
        norm: The norm before A, or None.
        activation: On the latents; None for a plain low-rank layer.
        outputs: For each projection, the local lengths of what it holds, where it holds several
            things (fused k and v); None: one each.
        gates: Of the latents of the decoder layer before, or None.
        passes_on: Whether the decoder layer after reads the latents.
    """

    weight: Tensor
    latent_bias: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        group: TensorGroup,
        weight: Tensor,
        weight_parts: Sequence[Part],
        sizes: Sequence[int],
        *,
        latent_bias: Tensor | None = None,
        latent_bias_parts: Sequence[Part] = (),
        bias: Tensor | None = None,
        bias_parts: Sequence[Part] = (),
        norm: NormSetting | None = None,
        activation: Activation | None = None,
        outputs: Sequence[Sequence[int]] | None = None,
        gates: CrossingGates | None = None,
        passes_on: bool = False,
    ) -> None:
        super().__init__(group)
        self.gates = gates
        self.passes_on = passes_on
        self.sizes = tuple(sizes)
        self.outputs = None if outputs is None else tuple(map(tuple, outputs))
        self.norm = norm
        self.activation = activation
        self.own("weight", weight, *weight_parts)
        self.own("latent_bias", latent_bias, *latent_bias_parts)
        self.own("bias", bias, *bias_parts)

    def forward(
        self,
        total: Tensor,
        statistics: Statistics = (),
        previous: Tensor | None = None,
        *,
        is_last: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return this rank's part of each output, and then its latents if it `passes_on`.

        Args:
            total: ``[..., R]``, reduced.
            statistics: Reduced; empty without a norm, and on one rank.
            previous: ``[..., S]``, the latents that cross in; None without gates.
            is_last: Nothing in the checkpointed segment reads the outputs, so the second run does
                not compute them.
        """
        dtype = self.weight.dtype
        if self.norm is not None and statistics:
            latent = recover(total, statistics, self.norm, dtype)
        else:
            latent = total.to(dtype)
        if self.latent_bias is not None:
            latent = latent + self.latent_bias
        if self.activation is not None:
            latent = self.activation(latent)
        own = (latent,) if self.passes_on else ()
        if self.gates is not None:
            latent = latent + self.gates(previous)
        members = up(latent, self.weight, self.sizes, self.group, is_last=is_last)
        if self.bias is not None:
            biases = self.bias.split(self.sizes)
            members = tuple(each + bias for each, bias in zip(members, biases, strict=True))
        if self.outputs is not None:
            members = tuple(
                part
                for member, lengths in zip(members, self.outputs, strict=True)
                for part in (member.split(lengths, -1) if len(lengths) > 1 else (member,))
            )
        return members + own


class ParallelEmbedding(Sharded):
    """Token embedding of which each rank holds a slice of the width: no message either way.

    Args:
        group: The ranks.
        weight: ``[V, n]``.
        part: Where it comes from.
        padding: Token id whose vector gets no gradient, or None.
    """

    weight: Tensor

    def __init__(
        self, group: TensorGroup, weight: Tensor, part: Part, padding: int | None = None
    ) -> None:
        super().__init__(group)
        self.padding = padding
        self.own("weight", weight, part)

    @torch.compiler.disable
    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[..., n]``."""
        check_same_data(tokens, self.group)
        return F.embedding(tokens, self.weight, self.padding)


def check_same_data(tokens: Tensor, group: TensorGroup) -> None:
    """Refuse different batches on the ranks of one group.

    Raises:
        ModelError: on every rank of the group.
    """
    if not group.must_check():
        return
    shape = [tokens.ndim, *tokens.shape, *[0] * (7 - tokens.ndim)]
    values = torch.tensor([*shape, 0], device=tokens.device)
    values[-1] = fingerprint(tokens)
    if group.differs(values):
        raise ModelError(
            f"lowtide.tensor_parallel: the {group.size} ranks of one tensor-parallel group got "
            f"different batches (this rank: shape {tuple(tokens.shape)}); all of them must read "
            f"the same tokens: let the sampler go by the data-parallel rank, not by the global rank"
        )
