"""One model under each way of sharding it: bytes, messages, memory and modelled time.

Bytes, messages and memory follow from formulas; times are modelled from the machine's rates, so
they are as good as those.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lowtide.core.errors import ConfigError, listed, near
from lowtide.tensor_parallel.block_shape import whole
from lowtide.tensor_parallel.costs import Machine
from lowtide.tensor_parallel.footprint import (
    DecoderShape,
    Footprint,
    block_parameters,
    footprint,
)
from lowtide.tensor_parallel.timing import (
    Batch,
    BlockTime,
    Phase,
    block_time,
    end_time,
    takes_turns,
    update_s,
)
from lowtide.tensor_parallel.traffic import (
    BOTTLENECK,
    FULL_RANK,
    SCHEMES,
    TIERS,
    Message,
    Scheme,
    Tier,
    block_messages,
    end_messages,
    in_turns,
    recompute_messages,
    reduced_elements,
)

NODE_RANKS = 8  # that NVLink joins on the boards we know


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """One way of sharding a model and what it would take, on each GPU.

    Attributes:
        name: Which way.
        takes_turns: Whether halves of the micro-batch take turns in the forward.
        forward_messages: Of one block, recomputation left out.
        backward_messages: Of one block.
        recompute_messages: Of one block, for activation checkpointing.
        forward_elements: Payload per token of one block's forward, counted as all-reduces.
        backward_elements: The same of its backward.
        block_bytes: Sent by one block: forward, recomputation and backward.
        iteration_bytes: Sent by all blocks and both ends of the network.
        footprint: Memory.
        block: Modelled time of one block.
        ends: Modelled time of embedding, head and loss.
        update_s: Modelled time of the optimizer.
        iteration_s: Modelled time of one micro-batch, forward, backward and update.
    """

    name: str
    takes_turns: bool
    forward_messages: int
    backward_messages: int
    recompute_messages: int
    forward_elements: float
    backward_elements: float
    block_bytes: float
    iteration_bytes: float
    footprint: Footprint
    block: BlockTime
    ends: Phase
    update_s: float
    iteration_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast for JSON."""
        found = dataclasses.asdict(self)
        found["block_s"] = self.block.total_s
        found["ends_s"] = self.ends.total_s
        found["footprint"]["total_bytes"] = self.footprint.total_bytes
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The ways of sharding one model, ours last, and what to be warned of."""

    decoder: DecoderShape
    ranks: int
    batch: Batch
    tier: Tier
    machine: Machine
    forecasts: tuple[Forecast, ...]
    warnings: tuple[str, ...]

    @property
    def ours(self) -> Forecast:
        """The bottleneck-aware way."""
        return self.forecasts[-1]

    def block_ratio(self, name: str) -> float:
        """Return how many times as long as ours a block takes in another way."""
        return self._of(name).block.total_s / self.ours.block.total_s

    def iteration_ratio(self, name: str) -> float:
        """Return how many times as long as ours an iteration takes in another way."""
        return self._of(name).iteration_s / self.ours.iteration_s

    def _of(self, name: str) -> Forecast:
        return next(forecast for forecast in self.forecasts if forecast.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Return the outlook for JSON; times are modelled, which the key says."""
        return {
            "model": self.decoder.as_dict(),
            "ranks": self.ranks,
            "micro_batch": self.batch.micro_batch,
            "sequence": self.batch.sequence,
            "tier": self.tier,
            "modelled_machine": self.machine.as_dict(),
            "schemes": [forecast.as_dict() for forecast in self.forecasts],
            "warnings": list(self.warnings),
        }


def look_ahead(
    decoder: DecoderShape,
    ranks: int,
    *,
    machine: Machine,
    batch: Batch,
    tier: str = "none",
    overlap_forward: bool = False,
) -> Outlook:
    """Compare all ways of sharding a model over `ranks` ranks.

    Args:
        decoder: The model; full rank is the model of the same widths without factors.
        ranks: Of the tensor-parallel group, in one node.
        machine: What times are made from.
        batch: One micro-batch.
        tier: Of activation checkpointing; the others checkpoint whole blocks at any but "none".
        overlap_forward: Whether halves of the micro-batch take turns in ours; then the others are
            shown both with and without it.

    Raises:
        ConfigError: A number is not a whole number from 1, there is no such tier, or something does
            not go with `overlap_forward`.
        ModelError: The ranks cannot hold equal parts.
    """
    whole("micro_batch", batch.micro_batch)
    whole("sequence", batch.sequence)
    if tier not in TIERS:
        raise ConfigError(f"tier: got {tier!r}.{near(tier, TIERS)} Known: {listed(TIERS)}")
    if overlap_forward and tier != "none":
        raise ConfigError(
            f'tier: got "{tier}" with overlap_forward, allowed is "none" with it; leave one out'
        )
    if overlap_forward and (batch.micro_batch < 2 or ranks < 2):
        raise ConfigError(
            f"overlap_forward: got a micro-batch of {batch.micro_batch} on {ranks} rank(s), "
            f"allowed are two sequences and two ranks or more; leave it out, or take a larger "
            f"micro-batch"
        )
    forecasts = tuple(
        _forecast(decoder, ranks, scheme, machine=machine, batch=batch, tier=tier)
        for scheme in _schemes(overlap_forward)
    )
    outlook = Outlook(
        decoder=decoder,
        ranks=ranks,
        batch=batch,
        tier=tier,
        machine=machine,
        forecasts=forecasts,
        warnings=(),
    )
    return dataclasses.replace(outlook, warnings=tuple(_warnings(outlook)))


def _schemes(overlap_forward: bool) -> tuple[Scheme, ...]:
    if not overlap_forward:
        return SCHEMES
    others = SCHEMES[:-1]
    return (*others, *map(in_turns, others), in_turns(SCHEMES[-1]))


def _forecast(
    decoder: DecoderShape,
    ranks: int,
    scheme: Scheme,
    *,
    machine: Machine,
    batch: Batch,
    tier: Tier,
) -> Forecast:
    block = decoder.block
    forward, backward = block_messages(block, ranks, scheme)
    again = recompute_messages(block, ranks, scheme, tier)
    first, last = end_messages(block.width, ranks, scheme, is_tied=decoder.is_tied)
    halves = 2 if takes_turns(scheme, batch, ranks) else 1
    time = block_time(block, ranks, scheme, batch=batch, machine=machine, tier=tier)
    ends = end_time(decoder, ranks, scheme, batch=batch, machine=machine)
    update = update_s(decoder, ranks, scheme, machine)

    def sent(messages: list[Message]) -> float:
        return sum(message.wire_bytes(batch.tokens, ranks) for message in messages)

    block_bytes = sent([*forward, *again, *backward])
    return Forecast(
        name=scheme.name,
        takes_turns=scheme.takes_turns,
        forward_messages=halves * len(forward),
        backward_messages=halves * len(backward),
        recompute_messages=halves * len(again),
        forward_elements=reduced_elements(forward),
        backward_elements=reduced_elements(backward),
        block_bytes=block_bytes,
        iteration_bytes=decoder.layers * block_bytes + sent([*first, *last]),
        footprint=footprint(decoder, ranks, scheme, tokens=batch.tokens, tier=tier),
        block=time,
        ends=ends,
        update_s=update,
        iteration_s=decoder.layers * time.total_s + ends.total_s + update,
    )


def is_full_rank_lighter(decoder: DecoderShape) -> bool:
    """Return whether full-rank tensor parallelism sends less in the forward: 7 r > 2 d.

    Source: derived from the volumes of BOOST, arXiv 2512.12131, Sec. 3.
    """
    return decoder.block.latent_width > 2 * decoder.block.width


def _warnings(outlook: Outlook) -> list[str]:
    block, ours = outlook.decoder.block, outlook.ours
    full = next(forecast for forecast in outlook.forecasts if forecast.name == FULL_RANK.name)
    found = []
    if is_full_rank_lighter(outlook.decoder) and outlook.ranks > 1:
        found.append(
            f"rank: {_ranks(block.attention_rank, block.mlp_rank)} is above 2/7 of the width, "
            f"{2 * block.width / 7:.0f}: full rank sends less in the forward "
            f"({2 * block.width} elements per token and block against {block.latent_width}); "
            "take a smaller rank"
        )
    parameters = [
        block_parameters(block, outlook.ranks, scheme) for scheme in (FULL_RANK, BOTTLENECK)
    ]
    if parameters[1] >= parameters[0]:
        found.append(
            "rank: the factors have more parameters than the full-rank layers; take a smaller rank"
        )
    for other in outlook.forecasts[:-1]:
        if other.iteration_s < ours.iteration_s:
            found.append(f"modelled slower than {other.name}: {_times(ours, other)}")
    memory = outlook.machine.gpu.memory_bytes
    if ours.footprint.total_bytes > memory:
        found.append(
            f"memory: {ours.footprint.total_bytes / 1e9:.1f} GB are more than the "
            f"{memory / 1e9:.0f} GB of {outlook.machine.name}; take more ranks, a smaller "
            "micro-batch, ZeRO, or another tier of activation checkpointing"
        )
    kept, kept_full = (f.footprint.block_activation_bytes for f in (ours, full))
    if kept > kept_full:
        found.append(
            f"activations: {kept / kept_full:.2f} times what full rank keeps, because every rank "
            'holds whole latents; the tier "latents" or "sharded_latents" keeps less'
            if outlook.tier == "none"
            else f"activations: {kept / kept_full:.2f} times what full rank keeps, which "
            "checkpoints whole blocks"
        )
    if outlook.ranks > NODE_RANKS:
        found.append(
            f"ranks: {outlook.ranks} are more than NVLink joins in a node ({NODE_RANKS}); "
            "the times assume it does, so give the rate of your link"
        )
    return found


def _ranks(attention: int, mlp: int) -> str:
    return f"{attention}" if attention == mlp else f"{attention} (attention) and {mlp} (MLP)"


def _times(ours: Forecast, other: Forecast) -> str:
    return f"a step of {ours.iteration_s:.3f} s against {other.iteration_s:.3f} s"
