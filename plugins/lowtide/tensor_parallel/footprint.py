"""How much memory a model takes on one rank: parameters, their state, kept activations.

Nothing is divided over data-parallel ranks: with ZeRO, divide what it shards.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lowtide.tensor_parallel.block_shape import BlockShape, whole
from lowtide.tensor_parallel.traffic import Scheme, Tier, local_widths
from lowtide.tensor_parallel.work import block_linears, saved_elements

PARAMETER_BYTES = 2  # bf16
GRADIENT_BYTES = 2
OPTIMIZER_BYTES = 12  # fp32 master weight and two fp32 moments
ELEMENT_BYTES = 2
LOGIT_BYTES = 6  # kept once in 16 and once in 32 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """A decoder-only model.

    Attributes:
        block: Of every layer.
        layers: How many.
        vocabulary: Rows of the embedding.
        is_tied: Whether embedding and head are one matrix.

    Raises:
        ConfigError: A number is not a whole number from 1.
    """

    block: BlockShape
    layers: int
    vocabulary: int
    is_tied: bool = False

    def __post_init__(self) -> None:
        whole("layers", self.layers)
        whole("vocabulary", self.vocabulary)

    def as_dict(self) -> dict[str, Any]:
        """Return the shape for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Memory of one rank, in bytes.

    Attributes:
        parameters: Count of parameters on this rank.
        parameter_bytes: Weights in 16 bits.
        gradient_bytes: Their gradients in 16 bits.
        optimizer_bytes: Master weights and both moments of Adam in fp32.
        block_activation_bytes: Kept for the backward by one block.
        activation_bytes: Kept by all blocks and the head, and what one block makes again.
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    block_activation_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        state = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return state + self.activation_bytes


def block_parameters(shape: BlockShape, ranks: int, scheme: Scheme) -> int:
    """Return one rank's parameters of one block: linears, gates and two norms.

    Keys and values that have fewer heads than there are ranks are held more than once.
    """
    linears = block_linears(shape, ranks, scheme)
    norm = shape.width // ranks if scheme.layout == "bottleneck" else shape.width
    factors = 7 if shape.crossing == "scalar" and scheme.layout != "full" else 0
    return sum(layer.parameters for layer in linears) + 2 * norm + factors


def end_parameters(decoder: DecoderShape, ranks: int) -> int:
    """Return one rank's parameters of embedding, last norm and head."""
    matrix = _vocabulary_share(decoder, ranks) * decoder.block.width
    return (1 if decoder.is_tied else 2) * matrix + decoder.block.width


def _vocabulary_share(decoder: DecoderShape, ranks: int) -> int:
    return -(-decoder.vocabulary // ranks)


def footprint(
    decoder: DecoderShape, ranks: int, scheme: Scheme, *, tokens: int, tier: Tier = "none"
) -> Footprint:
    """Return what one rank holds at the start of the backward.

    Args:
        decoder: The model.
        ranks: Of the tensor-parallel group.
        scheme: How it is sharded.
        tokens: In one micro-batch.
        tier: Of activation checkpointing, see `saved_elements`.

    Raises:
        ConfigError, ModelError: As `check_ranks`; `tokens` is not a whole number from 1.
    """
    whole("tokens", tokens)
    block, layers = decoder.block, decoder.layers
    parameters = layers * block_parameters(block, ranks, scheme)
    parameters += end_parameters(decoder, ranks)
    saved = saved_elements(block, ranks, scheme, tier)
    elements = layers * saved
    if tier != "none":  # one block at a time has everything again
        elements += saved_elements(block, ranks, scheme)
    local = local_widths(block, ranks, scheme)
    # The head's input is kept whole by ours, which gathers it once.
    elements += block.width if scheme.layout == "bottleneck" else local.residual
    logits = _vocabulary_share(decoder, ranks) * LOGIT_BYTES
    return Footprint(
        parameters=parameters,
        parameter_bytes=PARAMETER_BYTES * parameters,
        gradient_bytes=GRADIENT_BYTES * parameters,
        optimizer_bytes=OPTIMIZER_BYTES * parameters,
        block_activation_bytes=round(ELEMENT_BYTES * saved * tokens),
        activation_bytes=round((ELEMENT_BYTES * elements + logits) * tokens),
    )
