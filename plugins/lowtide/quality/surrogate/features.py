"""Stage 1: what is known of an array whatever is asked about it later."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.quality.surrogate import embedding, probe, statistics
from lowtide.quality.surrogate.blocks import Blocks
from lowtide.quality.surrogate.embedding import Embedding

Floats = NDArray[np.float64]

SCHEMA = 1  # any change to what the numbers below mean is another schema
NAMES = (
    *statistics.NAMES, *(f"at_bound_{name}" for name in probe.NAMES), "log10_bound",
    "log2_bound_rest", *(f"embedding_{number}" for number in range(embedding.WIDTH)),
)  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """What is known without a network: all of stage 1 that is not learned.

    Attributes:
        statistics: float64, shape (len(statistics.NAMES),).
        probe: float64, shape (nodes, len(probe.NAMES)).
        value_range: Of the array.
        elements: How many.
        item_bits: Of one.
    """

    statistics: Floats
    probe: Floats
    value_range: float
    elements: int
    item_bits: int


@dataclass(frozen=True)
class FeatureHandle:
    """Stage 1 of one array: keep it as long as the array does not change.

    Attributes:
        plain: What is not learned.
        embedding: float64, shape (embedding.WIDTH,).
        stage: Fingerprint of the stage 1 that made it: only its own surrogates take it.
    """

    plain: Plain
    embedding: Floats
    stage: str


def plain_of(blocks: Blocks) -> Plain:
    """Return what is known of blocks without a network."""
    return Plain(
        statistics=statistics.statistics(blocks),
        probe=probe.probed(blocks.values),
        value_range=blocks.value_range,
        elements=blocks.elements,
        item_bits=blocks.item_bits,
    )


def inputs(plain: Plain, vector: Floats, relatives: Sequence[float]) -> Floats:
    """Return what stage 2 sees of one array at some bounds, in the order of `NAMES`.

    The last number of the bound is what ZFP rounds away: the part of log2 of the absolute bound
    behind the comma.

    Args:
        plain: Of the array.
        vector: Its embedding.
        relatives: Bounds in units of the range.

    Returns:
        float64, shape (bounds, len(NAMES)).
    """
    rows = [
        [
            *plain.statistics,
            *probe.at_bound(plain.probe, relative),
            math.log10(relative),
            (math.log2(relative) + math.log2(plain.value_range)) % 1.0,
            *vector,
        ]
        for relative in relatives
    ]
    return np.array(rows, np.float64).reshape(-1, len(NAMES))


def embedded(network: Embedding | None, arrays: Sequence[torch.Tensor]) -> Floats:
    """Return the vectors of arrays that are given as pictures; float64, (arrays, WIDTH)."""
    if network is None:
        return np.zeros((len(arrays), embedding.WIDTH))
    with torch.no_grad():
        found = [network(each, [len(each)])[0] for each in arrays]
    return np.asarray(torch.stack(found).double().numpy())


def stage_of(network: Embedding | None) -> str:
    """Return the fingerprint of a stage 1: its schema and the bits of its parameters."""
    digest = hashlib.sha256(f"{SCHEMA} {NAMES}".encode())
    parameters = {} if network is None else network.state_dict()
    for name, value in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]
