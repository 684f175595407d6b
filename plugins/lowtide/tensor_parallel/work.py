"""What one rank computes in a decoder block: its GEMMs, its attention, its memory-bound passes.

Letters as in `lowtide.tensor_parallel.traffic`. A linear layer of k inputs and n outputs over T
tokens is three GEMMs: [T,k] x [k,n] forward, [T,n] x [n,k] for the input's gradient and [n,T] x
[T,k] for the weight's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowtide.tensor_parallel.block_shape import BlockShape
from lowtide.tensor_parallel.gates import gate_width
from lowtide.tensor_parallel.traffic import (
    Part,
    Pass,
    Scheme,
    Tier,
    Widths,
    latent_widths,
    local_widths,
    members,
)

PASSES: tuple[Pass, ...] = ("forward", "input_gradient", "weight_gradient")
BACKWARD_ATTENTION = 2.5  # FLOPs of flash attention's backward over its forward: 5 GEMMs, not 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One rank's part of a linear layer.

    Attributes:
        where: Its group: "qkv", "o", "gate_up", "down", or "head".
        part: "A" or "B", a low-rank factor, "W", or "gate" of what crosses.
        inputs: k, on this rank.
        outputs: n, on this rank.
        count: Layers of this shape that run as one batched GEMM.
    """

    where: str
    part: Part
    inputs: int
    outputs: int
    count: int = 1

    @property
    def parameters(self) -> int:
        """Weights on this rank."""
        return self.count * self.inputs * self.outputs

    def gemm(self, tokens: int, which: Pass) -> tuple[int, int, int]:
        """Return (m, k, n) of one of the layer's GEMMs: [m,k] x [k,n]."""
        k, n = self.inputs, self.outputs
        if which == "forward":
            return tokens, k, n
        return (tokens, n, k) if which == "input_gradient" else (n, tokens, k)

    def macs(self, tokens: int) -> int:
        """Return the multiply-adds of any one of its three GEMMs, all `count` together."""
        return self.parameters * tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Kernels that are limited by memory.

    Attributes:
        name: What they do.
        elements: Read and written per token, in all of them.
        kernels: How many.
    """

    name: str
    elements: int
    kernels: int


def block_linears(shape: BlockShape, ranks: int, scheme: Scheme) -> list[Linear]:
    """Return the linear layers of one rank's block, in the order of the forward."""
    local = local_widths(shape, ranks, scheme)
    if scheme.layout == "full":
        return _full(shape, local)
    # Naive factors see full widths and a slice of the latents, ours slices and whole latents. Its
    # own heads are all that a naive rank attends with, but not all that its factors make.
    if scheme.layout == "naive":
        q, kv = shape.query_width, shape.kv_width
    else:
        q, kv = local.query, local.kv
    d, f, a, m = local.residual, local.mlp, local.attention_latent, local.mlp_latent
    return [
        Linear(where="qkv", part="A", inputs=d, outputs=3 * a),
        *_up_to_heads(a, q, kv),
        Linear(where="o", part="A", inputs=q, outputs=a),
        Linear(where="o", part="B", inputs=a, outputs=d),
        Linear(where="gate_up", part="A", inputs=d, outputs=2 * m),
        Linear(where="gate_up", part="B", inputs=m, outputs=f, count=2),
        Linear(where="down", part="A", inputs=f, outputs=m),
        Linear(where="down", part="B", inputs=m, outputs=d),
        *_gates(shape, local),
    ]


def _gates(shape: BlockShape, local: Widths) -> list[Linear]:
    """Return the GEMMs of gates; naive ones make a part of each latent, from all of it."""
    found = []
    for where, width in latent_widths(shape).items():
        count = members(where)
        rank = width // count
        part = local.attention_latent if where in ("qkv", "o") else local.mlp_latent
        sizes = {
            "linear": [(rank, part)],
            "low_rank": [(part, gate_width(rank)), (gate_width(rank), part)],
        }.get(shape.crossing or "", [])
        found += [
            Linear(where=where, part="gate", inputs=k, outputs=n, count=count) for k, n in sizes
        ]
    return found


def _full(shape: BlockShape, local: Widths) -> list[Linear]:
    d, q, kv, f = shape.width, local.query, local.kv, local.mlp
    return [
        Linear(where="qkv", part="W", inputs=d, outputs=q + 2 * kv),
        Linear(where="o", part="W", inputs=q, outputs=d),
        Linear(where="gate_up", part="W", inputs=d, outputs=2 * f),
        Linear(where="down", part="W", inputs=f, outputs=d),
    ]


def _up_to_heads(rank: int, query: int, kv: int) -> list[Linear]:
    if query == kv:
        return [Linear(where="qkv", part="B", inputs=rank, outputs=query, count=3)]
    return [
        Linear(where="qkv", part="B", inputs=rank, outputs=query),
        Linear(where="qkv", part="B", inputs=rank, outputs=kv, count=2),
    ]


def recomputed_linears(linears: Iterable[Linear]) -> list[Linear]:
    """Return the layers that run again with kept latents: gates, and every B but that of down.

    Its output is the next block's input, which is kept.

    Source: BOOST, arXiv 2512.12131, low-rank activation checkpointing.
    """
    return [
        layer
        for layer in linears
        if layer.part == "gate" or (layer.part == "B" and layer.where != "down")
    ]


def attention_flops(shape: BlockShape, ranks: int, scheme: Scheme, *, sequence: int) -> int:
    """Return the FLOPs per token of one rank's causal attention, forward.

    Two products of `sequence` by the width of this rank's queries, of which the mask leaves half.
    """
    return 2 * sequence * local_widths(shape, ranks, scheme).query


def forward_sweeps(shape: BlockShape, ranks: int, scheme: Scheme) -> list[Sweep]:
    """Return the memory-bound kernels of the forward, each fused as far as one kernel goes."""
    local = local_widths(shape, ranks, scheme)
    d, f, qk = local.residual, local.mlp, local.query + local.kv
    sweeps = [
        Sweep(name="norm", elements=2 * 2 * d, kernels=2),
        Sweep(name="rotary", elements=2 * qk, kernels=2),
        Sweep(name="gate", elements=3 * f, kernels=1),
        Sweep(name="residual", elements=2 * 3 * d, kernels=2),
    ]
    if scheme.layout != "full":
        # Read the sum, write the activation; ours also writes the latent divided by its norm.
        each = 3 if scheme.layout == "bottleneck" else 2
        sweeps.append(Sweep(name="latents", elements=each * local.latents, kernels=4))
        sweeps += _crossing_sweeps(shape, local)
    return sweeps


def _crossing_sweeps(shape: BlockShape, local: Widths) -> list[Sweep]:
    """Return the sum of a latent and what crosses into it; backward, that of two gradients."""
    if shape.crossing is None:
        return []
    return [Sweep(name="crossing", elements=3 * local.latents, kernels=4)]


def backward_sweeps(shape: BlockShape, ranks: int, scheme: Scheme) -> list[Sweep]:
    """Return the memory-bound kernels of the backward.

    The normalised copy of a norm's input is made again for everyone, since nobody has to keep it.
    """
    local = local_widths(shape, ranks, scheme)
    d, f, qk = local.residual, local.mlp, local.query + local.kv
    sweeps = [
        Sweep(name="norm and residual", elements=2 * (4 + 2) * d, kernels=4),
        Sweep(name="rotary", elements=2 * qk, kernels=2),
        Sweep(name="gate", elements=5 * f, kernels=1),
    ]
    if scheme.layout != "full":
        elements = 3 * local.latents
        if scheme.layout == "bottleneck":  # the norms' inner product of gradient and latent
            elements += 2 * (3 * local.attention_latent + 2 * local.mlp_latent)
        sweeps.append(Sweep(name="latents", elements=elements, kernels=4))
        sweeps += _crossing_sweeps(shape, local)
        if shape.crossing == "scalar":  # the factor's gradient: latents times gradients
            sweeps.append(Sweep(name="scalar gates", elements=2 * local.latents, kernels=4))
    return sweeps


def recomputed_sweeps(shape: BlockShape, ranks: int, scheme: Scheme) -> list[Sweep]:
    """Return the memory-bound kernels that run again with kept latents."""
    local = local_widths(shape, ranks, scheme)
    return [
        Sweep(name="rotary", elements=2 * (local.query + local.kv), kernels=2),
        Sweep(name="gate", elements=3 * local.mlp, kernels=1),
        Sweep(name="residual", elements=3 * local.residual, kernels=1),
        Sweep(name="latents", elements=2 * local.latents, kernels=4),
        *_crossing_sweeps(shape, local),
    ]


def saved_elements(shape: BlockShape, ranks: int, scheme: Scheme, tier: Tier = "none") -> float:
    """Return the elements per token that one rank keeps of one block for the backward.

    Counted: inputs of norms, attention's inputs and output, latents before their activation, gate,
    up, and their product; what gates of a crossing read, and with checkpoints what crosses. Not
    counted for anyone: normalised copies, latents as B reads them (activated, or with what crossed
    in) where they are not those, and the few fp32 numbers per token of norms and attention.

    Args:
        shape: The block.
        ranks: Of the group.
        scheme: How it is sharded.
        tier: Of ours: "none"; "latents": the block's input and all latents; "sharded_latents":
            the same with each latent spread over the ranks. The others have one kind of
            checkpoint, the block's input, and use it at any tier but "none".
    """
    local = local_widths(shape, ranks, scheme)
    latents = 0 if scheme.layout == "full" else local.latents
    if tier != "none":
        crossing = 0 if shape.crossing is None else latents
        if scheme.layout != "bottleneck":
            return local.residual + crossing
        kept = latents + crossing
        return local.residual + kept / (ranks if tier == "sharded_latents" else 1)
    # Naive: A of o is sharded by columns, so each rank keeps all heads' results.
    output = shape.query_width if scheme.layout == "naive" else local.query
    heads = local.query + 2 * local.kv + output
    read = 0
    if scheme.layout != "full" and shape.crossing not in (None, "identity"):
        # A matrix reads whole latents, in the naive layout too, where they are gathered.
        read = shape.latent_width if shape.crossing == "linear" else latents + shape.gate_width
    return 2 * local.residual + heads + 3 * local.mlp + latents + read
