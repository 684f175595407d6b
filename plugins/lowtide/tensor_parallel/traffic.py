"""What each way of sharding a decoder block sends between the ranks: formulas, no tensors.

Letters: d width of the residual stream, f of the MLP, q and kv of queries and of keys (or values),
r rank of the latents, p ranks of the tensor-parallel group. All counts are elements per token; a
payload is the size of the whole tensor that is reduced, gathered or scattered.

Source: BOOST, arXiv 2512.12131, Secs. 3 and 4; its text gives forward volumes for equal ranks and
no grouped-query attention. The backward volumes and the general case are derived here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.block_shape import BlockShape, whole
from lowtide.tensor_parallel.gates import gate_width

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
Part = Literal["W", "A", "B", "gate"]
Pass = Literal["forward", "input_gradient", "weight_gradient"]
Tier = Literal["none", "latents", "sharded_latents"]

TIERS: tuple[Tier, ...] = ("none", "latents", "sharded_latents")
STATISTIC_PIECES = 3  # bf16 numbers that hold one fp32 sum of squares without loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A way to shard a block.

    Attributes:
        name: For tables.
        layout: "full": Megatron's pairs on full-rank linears. "naive": Megatron's pairs on the two
            factors of each low-rank linear, A by columns and B by rows. "bottleneck": B by columns
            and the next A by rows, the residual stream sharded on d.
        has_sequence_parallel: Full rank only: residual stream sharded over tokens, by all-gather
            and reduce-scatter.
        has_split_heads: Naive only: each rank attends with its own heads, for which q, k, v are
            scattered and the result is gathered; else all ranks attend with all heads.
        has_joint_outputs: Naive only: outputs of q, k, v, and of gate and up, travel together.
        is_overlapped: The backward's messages run beside the GEMM that does not wait for them.
        takes_turns: Two halves of the micro-batch take turns in the forward, so that the messages
            of one run beside what the other computes.
    """

    name: str
    layout: Literal["full", "naive", "bottleneck"]
    has_sequence_parallel: bool = False
    has_split_heads: bool = False
    has_joint_outputs: bool = True
    is_overlapped: bool = True
    takes_turns: bool = False


FULL_RANK = Scheme(name="full rank", layout="full", has_sequence_parallel=True)
NAIVE = Scheme(name="naive low rank", layout="naive")
NAIVE_SPLIT = Scheme(name="naive, heads split", layout="naive", has_split_heads=True)
BOTTLENECK = Scheme(name="bottleneck-aware", layout="bottleneck")
SCHEMES = (FULL_RANK, NAIVE, NAIVE_SPLIT, BOTTLENECK)


def in_turns(scheme: Scheme) -> Scheme:
    """Return the same with halves of the micro-batch that take turns, its name marked by ``*``."""
    return dataclasses.replace(scheme, name=f"{scheme.name} *", takes_turns=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One collective.

    Attributes:
        kind: Which collective.
        where: The group of linears, or the end of the network, that it belongs to.
        elements: Payload per token.
        element_bytes: 2, or 4 where the numbers travel as fp32.
        under: The GEMM of the same group that runs meanwhile, as (part, pass), or None.
    """

    kind: Kind
    where: str
    elements: int
    element_bytes: int = 2
    under: tuple[Part, Pass] | None = None

    @property
    def reduced_elements(self) -> float:
        """Elements of the all-reduce that puts as many bytes on a ring; half for the other two."""
        return self.elements if self.kind == "all_reduce" else self.elements / 2

    def payload_bytes(self, tokens: int) -> int:
        """Return the size of the whole tensor."""
        return self.elements * self.element_bytes * tokens

    def wire_bytes(self, tokens: int, ranks: int) -> float:
        """Return what each rank sends on a ring: 2 (p-1)/p of the payload for an all-reduce."""
        return wire_bytes(self.kind, self.payload_bytes(tokens), ranks)


def wire_bytes(kind: Kind, payload_bytes: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` ranks sends when a ring moves `payload_bytes`."""
    return hops(kind, ranks) / ranks * payload_bytes


def hops(kind: Kind, ranks: int) -> int:
    """Return the steps of a ring: twice p-1 for an all-reduce, p-1 for the others."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1)


def check_ranks(shape: BlockShape, ranks: int) -> None:
    """Check that `ranks` ranks can hold equal parts of a block.

    Raises:
        ConfigError: `ranks` is not a whole number from 1.
        ModelError: A width or the heads do not divide. Keys and values may have fewer heads than
            there are ranks if one number divides the other: they are then held more than once.
    """
    whole("ranks", ranks)
    for name in ("width", "mlp_width", "heads"):
        size = getattr(shape, name)
        if size % ranks:
            raise ModelError(
                f"{name}: got {size}, which {ranks} ranks cannot share evenly; "
                f"allowed is a multiple of the ranks, so take another number of ranks: "
                f"{_listed(n for n in range(2, 65) if size % n == 0)} divide it"
            )
    if shape.kv_heads % ranks and ranks % shape.kv_heads:
        raise ModelError(
            f"kv_heads: got {shape.kv_heads}, allowed for {ranks} ranks is a multiple or a divisor "
            "of the ranks, so take another number of ranks"
        )


def _listed(numbers: object) -> str:
    return ", ".join(map(str, numbers)) or "none up to 64"  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """What one rank holds of each tensor, in elements per token (latents: of one projection)."""

    residual: int
    query: int
    kv: int
    mlp: int
    attention_latent: int
    mlp_latent: int

    @property
    def latents(self) -> int:
        """All seven latents."""
        return 4 * self.attention_latent + 3 * self.mlp_latent


def local_widths(shape: BlockShape, ranks: int, scheme: Scheme) -> Widths:
    """Return one rank's widths; those of query and kv are what it attends with."""
    check_ranks(shape, ranks)
    d, f = shape.width, shape.mlp_width
    query = shape.query_width // ranks
    kv = max(shape.kv_heads // ranks, 1) * shape.head_width
    if scheme.layout == "full":
        residual = d // ranks if scheme.has_sequence_parallel else d
        latents = (0, 0)
        mlp = f // ranks
    elif scheme.layout == "naive":
        residual, mlp = d, f
        latents = (-(-shape.attention_rank // ranks), -(-shape.mlp_rank // ranks))
        if not scheme.has_split_heads:
            query, kv = shape.query_width, shape.kv_width
    else:
        residual, mlp = d // ranks, f // ranks
        latents = (shape.attention_rank, shape.mlp_rank)
    return Widths(
        residual=residual,
        query=query,
        kv=kv,
        mlp=mlp,
        attention_latent=latents[0],
        mlp_latent=latents[1],
    )


def block_messages(
    shape: BlockShape, ranks: int, scheme: Scheme
) -> tuple[list[Message], list[Message]]:
    """Return what one block sends forward and backward, in order; nothing with one rank.

    Raises:
        ConfigError, ModelError: As `check_ranks`.
    """
    check_ranks(shape, ranks)
    if ranks == 1:
        return [], []
    if scheme.layout == "bottleneck":
        forward, backward = _bottleneck(shape, ranks)
    else:
        forward, backward = (_full if scheme.layout == "full" else _naive)(shape, scheme)
    if not scheme.is_overlapped:
        backward = [dataclasses.replace(message, under=None) for message in backward]
    return forward, backward


def _message(kind: Kind, where: str, elements: int, *under: str) -> Message:
    return Message(kind=kind, where=where, elements=elements, under=under or None)  # type: ignore[arg-type]


def _full(shape: BlockShape, scheme: Scheme) -> tuple[list[Message], list[Message]]:
    d = shape.width
    if not scheme.has_sequence_parallel:
        forward = [_message("all_reduce", where, d) for where in ("o", "down")]
        backward = [
            _message("all_reduce", where, d, "W", "weight_gradient") for where in ("gate_up", "qkv")
        ]
        return forward, backward
    forward, backward = [], []
    for inputs, output in (("qkv", "o"), ("gate_up", "down")):
        forward.append(_message("all_gather", inputs, d))
        forward.append(_message("reduce_scatter", output, d))
    # Only a shard of the pair's input is kept, so it is gathered again for the weight gradient.
    for inputs, output in (("gate_up", "down"), ("qkv", "o")):
        backward.append(_message("all_gather", output, d))
        backward.append(_message("all_gather", inputs, d, "W", "input_gradient"))
        backward.append(_message("reduce_scatter", inputs, d, "W", "weight_gradient"))
    return forward, backward


def _naive(shape: BlockShape, scheme: Scheme) -> tuple[list[Message], list[Message]]:
    d, f, q, kv = shape.width, shape.mlp_width, shape.query_width, shape.kv_width
    for_inputs: Kind = "reduce_scatter" if scheme.has_split_heads else "all_reduce"
    outputs = [(for_inputs, "qkv", (q, kv, kv)), ("all_reduce", "o", (d,))]
    outputs += [("all_reduce", "gate_up", (f, f)), ("all_reduce", "down", (d,))]
    forward = []
    for kind, where, widths in outputs:
        joint = (sum(widths),) if scheme.has_joint_outputs else widths
        forward += [_message(kind, where, width) for width in joint]
    under = ("A", "weight_gradient")
    backward = [
        _message("all_reduce", "down", f, *under),
        _message("all_reduce", "gate_up", d, *under),
        _message(for_inputs, "o", q, *under),
        _message("all_reduce", "qkv", d, *under),
    ]
    if scheme.has_split_heads:
        place = next(i for i, message in enumerate(forward) if message.where == "o")
        forward.insert(place, _message("all_gather", "o", q))
        backward.insert(3, _message("all_gather", "qkv", q + 2 * kv))
    gates = _naive_gates(shape)
    return forward + gates[0], backward + gates[1]


def _naive_gates(shape: BlockShape) -> tuple[list[Message], list[Message]]:
    """Return what gates send where each rank has a part of every latent, beside a factor's GEMM.

    A matrix needs whole latents; between the factors of a low-rank gate partial sums are reduced.
    """
    forward: list[Message] = []
    backward: list[Message] = []
    for where, width in latent_widths(shape).items():
        if shape.crossing == "linear":
            forward.append(_message("all_gather", where, width, "A", "forward"))
            backward.append(_message("reduce_scatter", where, width, "B", "weight_gradient"))
        elif shape.crossing == "low_rank":
            inner = members(where) * gate_width(width // members(where))
            forward.append(_message("all_reduce", where, inner, "A", "forward"))
            backward.append(_message("all_reduce", where, inner, "B", "weight_gradient"))
    return forward, backward


def _bottleneck(shape: BlockShape, ranks: int) -> tuple[list[Message], list[Message]]:
    statistic = STATISTIC_PIECES * ranks
    latents = latent_widths(shape)
    normed = {"qkv": statistic, "gate_up": statistic}
    forward = [
        _message("all_reduce", where, width + normed.get(where, 0))
        for where, width in latents.items()
    ]
    backward = [
        _message("all_reduce", where, width, "B", "weight_gradient")
        for where, width in reversed(latents.items())
    ]
    return forward, backward


def recompute_messages(shape: BlockShape, ranks: int, scheme: Scheme, tier: Tier) -> list[Message]:
    """Return what one block sends again before its backward.

    Ours sends nothing, except to gather latents that were kept in parts; the others, which know
    only whole-block checkpoints, repeat the forward.
    """
    if tier == "none" or ranks == 1:
        return []
    if scheme.layout != "bottleneck":
        return block_messages(shape, ranks, scheme)[0]
    if tier == "latents":
        return []
    # With a crossing, also those of the block before.
    times = 1 if shape.crossing is None else 2
    widths = list(latent_widths(shape).items()) * times
    return [_message("all_gather", where, width) for where, width in widths]


def members(where: str) -> int:
    """Return how many projections are in a group."""
    return {"qkv": 3, "gate_up": 2}.get(where, 1)


def latent_widths(shape: BlockShape) -> dict[str, int]:
    """Return the width of the latents that travel together, by group."""
    a, m = shape.attention_rank, shape.mlp_rank
    return {"qkv": 3 * a, "o": a, "gate_up": 2 * m, "down": m}


def end_messages(
    width: int, ranks: int, scheme: Scheme, *, is_tied: bool = False
) -> tuple[list[Message], list[Message]]:
    """Return what embedding, head and loss send forward and backward, once per model.

    The head is sharded over the vocabulary everywhere, and so is the loss (three fp32 numbers per
    token, of which ours sends two together). The embedding is sharded over the vocabulary, except
    ours when it is not tied to the head: that one is sharded over d and sends nothing.

    Args:
        width: Of the residual stream.
        ranks: Of the group.
        scheme: How blocks are sharded, which says what the ends have to deliver.
        is_tied: Whether embedding and head are one matrix.
    """
    if ranks == 1:
        return [], []
    of_loss = (1, 2) if scheme.layout == "bottleneck" else (1, 1, 1)
    loss = [
        Message(kind="all_reduce", where="loss", elements=each, element_bytes=4) for each in of_loss
    ]
    is_sharded = scheme.layout == "bottleneck" or scheme.has_sequence_parallel
    if not is_sharded:
        head = _message("all_reduce", "head", width, "W", "weight_gradient")
        backward = [head if scheme.is_overlapped else dataclasses.replace(head, under=None)]
        return [_message("all_reduce", "embedding", width), *loss], backward
    forward = [_message("all_gather", "head", width), *loss]
    backward = [_message("reduce_scatter", "head", width, "W", "weight_gradient")]
    if scheme.has_sequence_parallel:  # it kept a shard of the head's input, we keep all of it
        backward.insert(0, _message("all_gather", "head", width, "W", "input_gradient"))
    if scheme.layout != "bottleneck" or is_tied:
        forward.insert(0, _message("reduce_scatter", "embedding", width))
        backward.append(_message("all_gather", "embedding", width))
    if not scheme.is_overlapped:
        backward = [dataclasses.replace(message, under=None) for message in backward]
    return forward, backward


def reduced_elements(messages: list[Message]) -> float:
    """Return the payload of all messages together, counted as all-reduces."""
    return sum(message.reduced_elements for message in messages)
