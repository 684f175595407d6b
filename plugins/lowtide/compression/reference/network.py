"""Small networks that give the same bits everywhere: FORMAT.md, section 8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lowtide.core.errors import CodecError

LayerArrays: TypeAlias = tuple[str, Any, Any, Any, Any, Any]
_KINDS = ("affine", "divide", "multiply")
_MOST_NUMBERS = 1 << 24


def network_levels() -> list[str]:
    """Return the instruction sets that `network_run` can use: here numpy decides."""
    return ["scalar"]


def network_run(
    layers: Sequence[LayerArrays],
    samples: NDArray[np.float32],
    size_out: int,
    threads: int = 1,
    level: str = "auto",
) -> NDArray[np.float32]:
    """Run samples through layers, in float32 and in one order of additions.

    Args:
        layers: (kind, weights, bias, offsets, sources, taps) each. Weights are float32 of shape
            (taps, channels in, channels out), bias float32 of shape (channels out,). For kind
            "affine" position p of the output is bias + the sum over its sources i = offsets[p] ...
            offsets[p + 1] - 1, and for each over the channels in, of the input at position
            sources[i] times the weights of taps[i]; all int32. For "divide" and "multiply" each
            number is divided by, or multiplied with, the root of the same sum over the squares of
            its position's numbers, with one square matrix of weights.
        samples: float32, shape (n, positions x channels), channel by channel.
        size_out: How many numbers of each sample the last layer gives.
        threads: At most so many are used.
        level: One of `network_levels`, or "auto"; all give the same bits.

    Returns:
        float32, shape (n, `size_out`).

    Raises:
        CodecError: An argument is not as above.

    Source: Ballé et al., Density modeling of images using a generalized normalization
    transformation (ICLR 2016), for "divide" and its inverse.
    """
    if level not in ("auto", *network_levels()) or threads < 1:
        raise CodecError(f"level: got {level!r} on {threads} threads; numpy runs as 'scalar'")
    if samples.dtype != np.float32 or samples.ndim != 2 or not 1 <= size_out <= _MOST_NUMBERS:
        raise CodecError(
            f"samples: got {samples.dtype} with {samples.ndim} axes for {size_out} numbers each, "
            "allowed are float32 and 2"
        )
    values = samples
    with np.errstate(all="ignore"):
        for number, layer in enumerate(layers):
            values = _run_layer(number, layer, values)
    if not layers or values.shape[1] != size_out:
        raise CodecError(f"layers: give {values.shape[1]} numbers, size_out is {size_out}")
    return values


def _run_layer(number: int, layer: LayerArrays, values: NDArray[np.float32]) -> NDArray[np.float32]:
    kind, weights, bias, offsets, sources, taps = layer
    n, size = values.shape
    if kind not in _KINDS or weights.ndim != 3 or weights.shape[2:] != bias.shape:
        raise CodecError(f"layers: number {number}: {kind} with weights {weights.shape}")
    n_taps, n_in, n_out = weights.shape
    if 0 in weights.shape or size % n_in:
        raise CodecError(f"layers: number {number}: channels do not fit the layer before")
    inputs = values.reshape(n, -1, n_in)
    if kind == "affine":
        _check_sums(number, offsets, sources, taps, (inputs.shape[1], n_taps))
        outputs = np.broadcast_to(bias, (n, len(offsets) - 1, n_out)).copy()
        counts = np.diff(offsets)
        for turn in range(int(counts.max(initial=0))):
            positions = np.flatnonzero(counts > turn)  # those with so many sources, all at once
            at = offsets[positions] + turn
            sums = outputs[:, positions]
            for channel in range(n_in):
                sums += inputs[:, sources[at], channel, None] * weights[taps[at], channel]
            outputs[:, positions] = sums
        return outputs.reshape(n, -1)
    if n_taps != 1 or n_in != n_out:
        raise CodecError(f"layers: number {number}: weights are not one square matrix")
    norms = np.broadcast_to(bias, inputs.shape).copy()
    squares = inputs * inputs
    for channel in range(n_in):
        norms += squares[:, :, channel, None] * weights[0, channel]
    roots = np.sqrt(norms)
    return (inputs / roots if kind == "divide" else inputs * roots).reshape(n, -1)


def _check_sums(
    number: int,
    offsets: NDArray[np.int32],
    sources: NDArray[np.int32],
    taps: NDArray[np.int32],
    limits: tuple[int, int],
) -> None:
    fits = len(offsets) and offsets[0] == 0 and offsets[-1] == len(sources) == len(taps)
    if not fits or (np.diff(offsets) < 0).any():
        raise CodecError(f"layers: number {number}: offsets do not fit the sources")
    for found, limit in zip((sources, taps), limits, strict=True):
        if len(found) and not 0 <= found.min() <= found.max() < limit:
            raise CodecError(f"layers: number {number}: a source or a tap is not there")
