"""Modelled time of a block and of a whole iteration, put together from work, messages and rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowtide.tensor_parallel.costs import Machine
from lowtide.tensor_parallel.footprint import (
    ELEMENT_BYTES,
    DecoderShape,
    block_parameters,
    end_parameters,
)
from lowtide.tensor_parallel.traffic import (
    BlockShape,
    Message,
    Pass,
    Scheme,
    Tier,
    block_messages,
    end_messages,
    local_widths,
    recompute_messages,
)
from lowtide.tensor_parallel.work import (
    BACKWARD_ATTENTION,
    Linear,
    Sweep,
    attention_flops,
    backward_sweeps,
    block_linears,
    forward_sweeps,
    recomputed_linears,
    recomputed_sweeps,
)

UPDATE_BYTES = 30  # per parameter: fp32 weight and moments both ways, 16-bit gradient twice, weight
LOGIT_SWEEP_ELEMENTS = 15  # of 2 bytes: cross entropy in fp32, forward and backward
BACKWARD: tuple[Pass, Pass] = ("input_gradient", "weight_gradient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Time of a piece of work, by what it is spent on.

    Attributes:
        gemm_s: GEMMs.
        attention_s: Attention's core.
        sweep_s: Memory-bound kernels.
        message_s: Collectives.
        hidden_s: The part of `message_s` that runs beside GEMMs.
    """

    gemm_s: float = 0.0
    attention_s: float = 0.0
    sweep_s: float = 0.0
    message_s: float = 0.0
    hidden_s: float = 0.0

    @property
    def total_s(self) -> float:
        """From begin to end."""
        busy_s = self.gemm_s + self.attention_s + self.sweep_s
        return busy_s + self.message_s - self.hidden_s

    def __add__(self, other: Phase) -> Phase:
        return Phase(
            gemm_s=self.gemm_s + other.gemm_s,
            attention_s=self.attention_s + other.attention_s,
            sweep_s=self.sweep_s + other.sweep_s,
            message_s=self.message_s + other.message_s,
            hidden_s=self.hidden_s + other.hidden_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTime:
    """Modelled time of one block.

    Attributes:
        forward: Its forward.
        recompute: What activation checkpointing runs again.
        backward: Its backward, without that.
    """

    forward: Phase
    recompute: Phase
    backward: Phase

    @property
    def whole(self) -> Phase:
        """All three."""
        return self.forward + self.recompute + self.backward

    @property
    def total_s(self) -> float:
        """All three, in seconds."""
        return self.whole.total_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch.

    Attributes:
        micro_batch: Sequences.
        sequence: Tokens in each.
    """

    micro_batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return self.micro_batch * self.sequence


def block_time(
    shape: BlockShape,
    ranks: int,
    scheme: Scheme,
    *,
    batch: Batch,
    machine: Machine,
    tier: Tier = "none",
) -> BlockTime:
    """Return the modelled time of one block, forward and backward.

    Messages run beside GEMMs only where `Message.under` says so, and then do not slow them down.

    Args:
        shape: The block.
        ranks: Of the tensor-parallel group.
        scheme: How the block is sharded.
        batch: What goes through it.
        machine: Where.
        tier: Of activation checkpointing.

    Raises:
        ConfigError, ModelError: As `check_ranks`.
    """
    linears = block_linears(shape, ranks, scheme)
    forward, backward = block_messages(shape, ranks, scheme)
    attention = attention_flops(shape, ranks, scheme, sequence=batch.sequence)
    parts = 2 if takes_turns(scheme, batch, ranks) else 1
    tokens = -(-batch.tokens // parts)
    attention_s = attention * tokens / machine.attention_flops_per_s + machine.kernel_s

    def phase(
        layers: Sequence[Linear],
        passes: Sequence[Pass],
        sweeps: Sequence[Sweep],
        messages: Sequence[Message],
        attentions: float,
    ) -> Phase:
        message_s, hidden_s = _messages_s(messages, linears, ranks, tokens, machine)
        return Phase(
            gemm_s=parts * _gemms_s(layers, passes, tokens, machine),
            attention_s=parts * attentions * attention_s,
            sweep_s=parts * _sweeps_s(sweeps, tokens, machine),
            message_s=parts * message_s,
            hidden_s=parts * hidden_s,
        )

    forward_s = forward_sweeps(shape, ranks, scheme)
    recompute = Phase()
    if tier != "none":
        again = recompute_messages(shape, ranks, scheme, tier)
        if scheme.layout == "bottleneck":
            sweeps = recomputed_sweeps(shape, ranks, scheme)
            recompute = phase(recomputed_linears(linears), ("forward",), sweeps, again, 1)
        else:
            recompute = phase(linears, ("forward",), forward_s, again, 1)
    backward_s = backward_sweeps(shape, ranks, scheme)
    result = BlockTime(
        forward=phase(linears, ("forward",), forward_s, forward, 1),
        recompute=recompute,
        backward=phase(linears, BACKWARD, backward_s, backward, BACKWARD_ATTENTION),
    )
    if parts == 1:
        return result
    spans = _spans(scheme, linears, forward, attention_s, tokens, machine)
    hidden_s = _hidden_in_turns(forward, spans, ranks, tokens, machine)
    joint_s = _joint_s(local_widths(shape, ranks, scheme).residual, linears, batch.tokens, machine)
    return BlockTime(
        forward=dataclasses.replace(result.forward, hidden_s=hidden_s),
        recompute=recompute,
        backward=result.backward + Phase(sweep_s=joint_s),
    )


def _joint_s(residual: int, linears: Sequence[Linear], tokens: int, machine: Machine) -> float:
    """Return what halves add to a backward.

    The gradients of both are joined before the block, a pass over the residual stream, and every
    weight gets the sum of two gradients.
    """
    joint_s = _sweeps_s([Sweep(name="halves", elements=2 * residual, kernels=1)], tokens, machine)
    parameters = sum(layer.parameters for layer in linears)
    return joint_s + 3 * ELEMENT_BYTES * parameters / machine.stream_bytes_per_s


def takes_turns(scheme: Scheme, batch: Batch, ranks: int) -> bool:
    """Return whether halves of this micro-batch take turns; one sequence has none."""
    return scheme.takes_turns and batch.micro_batch > 1 and ranks > 1


def _hidden_in_turns(
    messages: Sequence[Message],
    spans: Sequence[float],
    ranks: int,
    tokens: int,
    machine: Machine,
) -> float:
    """Return how much of a forward's messages runs beside GEMMs and attention of the other half.

    The first half's message runs beside what the second has still to do before its own, the second
    half's beside what the first does next.

    Args:
        messages: In their order.
        spans: Of one half, from `_spans`.
        ranks: Of the group.
        tokens: Of one half.
        machine: Where.
    """
    hidden_s = 0.0
    for message, (before_s, after_s) in zip(messages, pairwise(spans), strict=True):
        seconds = machine.link.seconds(message.kind, message.payload_bytes(tokens), ranks)
        hidden_s += min(seconds, before_s) + min(seconds, after_s)
    return hidden_s


def _spans(
    scheme: Scheme,
    linears: Sequence[Linear],
    messages: Sequence[Message],
    attention_s: float,
    tokens: int,
    machine: Machine,
) -> list[float]:
    """Return the time of GEMMs and attention before, between and after the messages."""
    work = [(layer.where, layer.part, _gemms_s([layer], ("forward",), tokens, machine))
            for layer in linears]  # fmt: skip
    first_of = {where: i for i, (where, _, _) in reversed(list(enumerate(work)))}
    work.insert(first_of["o"], ("attention", "W", attention_s))
    last_part = "A" if scheme.layout == "bottleneck" else linears[-1].part
    ends = []
    for message in messages:
        wheres = [where for where, _, _ in work]
        if message.kind == "all_gather":  # of what goes in
            ends.append(wheres.index(message.where))
        else:
            whole = [(where, part) for where, part, _ in work]
            ends.append(len(whole) - whole[::-1].index((message.where, last_part)))
    bounds = [0, *ends, len(work)]
    return [sum(seconds for _, _, seconds in work[begin:end]) for begin, end in pairwise(bounds)]


def end_time(
    decoder: DecoderShape, ranks: int, scheme: Scheme, *, batch: Batch, machine: Machine
) -> Phase:
    """Return the modelled time of embedding, last norm, head and loss, forward and backward."""
    width, vocabulary = decoder.block.width, -(-decoder.vocabulary // ranks)
    head = [Linear(where="head", part="W", inputs=width, outputs=vocabulary)]
    forward, backward = end_messages(width, ranks, scheme, is_tied=decoder.is_tied)
    message_s, hidden_s = _messages_s([*forward, *backward], head, ranks, batch.tokens, machine)
    local = local_widths(decoder.block, ranks, scheme).residual
    sweeps = [
        Sweep(name="embedding", elements=5 * local, kernels=2),
        Sweep(name="norm", elements=6 * local, kernels=2),
        Sweep(name="loss", elements=LOGIT_SWEEP_ELEMENTS * vocabulary, kernels=8),
    ]
    return Phase(
        gemm_s=_gemms_s(head, ("forward", *BACKWARD), batch.tokens, machine),
        sweep_s=_sweeps_s(sweeps, batch.tokens, machine),
        message_s=message_s,
        hidden_s=hidden_s,
    )


def update_s(decoder: DecoderShape, ranks: int, scheme: Scheme, machine: Machine) -> float:
    """Return the modelled time of the optimizer's update of one rank's parameters (Adam)."""
    blocks = decoder.layers * block_parameters(decoder.block, ranks, scheme)
    parameters = blocks + end_parameters(decoder, ranks)
    return UPDATE_BYTES * parameters / machine.stream_bytes_per_s


def _gemms_s(
    linears: Iterable[Linear], passes: Iterable[Pass], tokens: int, machine: Machine
) -> float:
    shapes = [(layer.gemm(tokens, which), layer.count) for which in passes for layer in linears]
    return sum(machine.gemms.seconds(shape, count) for shape, count in shapes)


def _sweeps_s(sweeps: Iterable[Sweep], tokens: int, machine: Machine) -> float:
    elements = sum(sweep.elements for sweep in sweeps)
    kernels = sum(sweep.kernels for sweep in sweeps)
    return ELEMENT_BYTES * elements * tokens / machine.stream_bytes_per_s + (
        kernels * machine.kernel_s
    )


def _messages_s(
    messages: Iterable[Message],
    linears: Sequence[Linear],
    ranks: int,
    tokens: int,
    machine: Machine,
) -> tuple[float, float]:
    """Return the time of all messages, and how much of it runs beside GEMMs of `linears`."""
    total_s = hidden_s = 0.0
    for message in messages:
        seconds = machine.link.seconds(message.kind, message.payload_bytes(tokens), ranks)
        total_s += seconds
        if message.under is not None:
            part, which = message.under
            beside = [
                layer for layer in linears if (layer.where, layer.part) == (message.where, part)
            ]
            hidden_s += min(seconds, _gemms_s(beside, (which,), tokens, machine))
    return total_s, hidden_s
