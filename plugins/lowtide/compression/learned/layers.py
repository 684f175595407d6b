"""What an autoencoder for blocks is made of, and what each layer sums over (FORMAT section 8).

A stage halves every axis. The encoder has for each stage a convolution with stride 2, one with
stride 1 and a division by a norm (GDN), then one dense layer to the latent. The decoder is its
mirror, with one more convolution at the end. Beside each lies one dense layer, and the two are
added: so what is linear needs no deep network, and small ones learn it in no time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lowtide.compression.elements import Array
from lowtide.core.errors import CodecError

Kind = Literal["down", "same", "up", "gather", "spread", "divide", "multiply"]
NORMS: tuple[Kind, ...] = ("divide", "multiply")
WIDTH = 3  # of every convolution, on every axis

MAX_RANK = 3
MAX_BLOCK_ELEMENTS = 1 << 16
MAX_LATENT = 1024
MAX_CHANNELS = 1024


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: "down", "same", "up": convolutions that halve, keep and double the axes; "gather":
            from all positions to one; "spread": from one to all; "divide", "multiply": by the root
            of a weighted sum of squares over the channels (GDN and its inverse).
        channels_in: Of the input.
        channels_out: Of the output.
        extents: Of the larger of input and output, positions on each axis.
    """

    kind: Kind
    channels_in: int
    channels_out: int
    extents: tuple[int, ...]

    @property
    def taps(self) -> int:
        """Matrices of weights."""
        if self.kind in NORMS:
            return 1
        if self.kind in ("gather", "spread"):
            return math.prod(self.extents)
        return int(WIDTH ** len(self.extents))

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """(tap, channel in, channel out)."""
        return self.taps, self.channels_in, self.channels_out

    @property
    def native_kind(self) -> str:
        """What `network_run` calls it."""
        return self.kind if self.kind in NORMS else "affine"

    @functools.cached_property
    def sums(self) -> tuple[Array, Array, Array]:
        """Offsets, sources and taps of each output position, int32; empty for norms."""
        if self.kind in NORMS:
            return (np.empty(0, np.int32),) * 3
        if self.kind == "gather":
            every = np.arange(self.taps, dtype=np.int32)
            return np.array([0, self.taps], np.int32), every, every
        if self.kind == "spread":
            every = np.arange(self.taps + 1, dtype=np.int32)
            return every, np.zeros(self.taps, np.int32), every[:-1]
        return _convolution(self.extents, *_AXES[self.kind])


# For each kind of convolution: by what it divides the larger extents to get those of its input and
# output, and twice the place on an axis where points of the output look through tap k: what is odd
# lies between two points.
_AXES: dict[str, tuple[int, int, Callable[[Array, Array], Array]]] = {
    "down": (1, 2, lambda point, k: 4 * point + 2 * (k - 1)),
    "same": (1, 1, lambda point, k: 2 * point + 2 * (k - 1)),
    "up": (2, 1, lambda point, k: point + 1 - k),
}


def _convolution(
    extents: tuple[int, ...], of_input: int, of_output: int,
    looks_at: Callable[[Array, Array], Array],
) -> tuple[Array, Array, Array]:  # fmt: skip
    k = np.arange(WIDTH)
    sources, taps, is_there = np.zeros((1, 1), int), np.zeros((1, 1), int), np.ones((1, 1), bool)
    for extent in extents:  # (points of the output, taps), in C order of the axes so far
        twice = looks_at(np.arange(extent // of_output)[:, None], k)
        size = extent // of_input
        is_seen = (twice % 2 == 0) & (twice >= 0) & (twice < 2 * size)
        sources = _outer(np.add, sources * size, twice // 2)
        taps = _outer(np.add, taps * WIDTH, np.broadcast_to(k, twice.shape))
        is_there = _outer(np.logical_and, is_there, is_seen)
    offsets = np.concatenate(([0], np.cumsum(is_there.sum(axis=1))))
    found = offsets, sources[is_there], taps[is_there]
    return tuple(numbers.astype(np.int32) for numbers in found)  # type: ignore[return-value]


def _outer(combine: np.ufunc, before: Array, here: Array) -> Array:
    """Return (points, taps) of some axes and of one more."""
    both = combine(before[:, None, :, None], here[None, :, None, :])
    return both.reshape(len(before) * len(here), -1)


@dataclass(frozen=True)
class Architecture:
    """The shape of an autoencoder.

    Attributes:
        block: Extents of a block, 1 to 3 axes, each a multiple of 2 to the number of stages.
        latent: Numbers that a block becomes.
        channels: Of each stage, from the fine one to the coarse one.

    Raises:
        CodecError: one of them is not allowed.
    """

    block: tuple[int, ...]
    latent: int
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        halved = 1 << len(self.channels)
        if not 1 <= len(self.block) <= MAX_RANK or not all(
            extent > 0 and extent % halved == 0 for extent in self.block
        ):
            raise CodecError(
                f"block {self.block}: allowed are 1 to {MAX_RANK} axes, each a multiple of "
                f"{halved} for {len(self.channels)} stages"
            )
        if math.prod(self.block) > MAX_BLOCK_ELEMENTS:
            raise CodecError(f"block {self.block}: allowed are {MAX_BLOCK_ELEMENTS} elements")
        if not 1 <= self.latent <= MAX_LATENT:
            raise CodecError(f"latent {self.latent}: allowed are 1 to {MAX_LATENT}")
        if not self.channels or not all(1 <= each <= MAX_CHANNELS for each in self.channels):
            raise CodecError(f"channels {self.channels}: allowed are 1 to {MAX_CHANNELS} each")

    @property
    def elements(self) -> int:
        """Of a block."""
        return math.prod(self.block)

    @property
    def parts(self) -> dict[str, tuple[Layer, ...]]:
        """The layers of the two ways from a block to its latent, and of the two back."""
        return {
            "encoder": tuple(self._encoder()),
            "linear_encoder": (Layer("gather", 1, self.latent, self.block),),
            "decoder": tuple(self._decoder()),
            "linear_decoder": (Layer("spread", self.latent, 1, self.block),),
        }

    @property
    def named_layers(self) -> dict[str, Layer]:
        """All layers, by the names that their weights have in a file."""
        return {
            f"{part}.{number}": layer
            for part, layers in self.parts.items()
            for number, layer in enumerate(layers)
        }

    def _extents(self, stage: int) -> tuple[int, ...]:
        return tuple(extent >> stage for extent in self.block)

    def _encoder(self) -> Iterator[Layer]:
        for stage, (before, here) in enumerate(itertools.pairwise((1, *self.channels))):
            yield Layer("down", before, here, self._extents(stage))
            yield Layer("same", here, here, self._extents(stage + 1))
            yield Layer("divide", here, here, self._extents(stage + 1))
        yield Layer("gather", self.channels[-1], self.latent, self._extents(len(self.channels)))

    def _decoder(self) -> Iterator[Layer]:
        yield Layer("spread", self.latent, self.channels[-1], self._extents(len(self.channels)))
        for stage in reversed(range(len(self.channels))):
            here = self.channels[stage]
            yield Layer("multiply", here, here, self._extents(stage + 1))
            yield Layer("same", here, here, self._extents(stage + 1))
            yield Layer("up", here, self.channels[max(0, stage - 1)], self._extents(stage))
        yield Layer("same", self.channels[0], 1, self.block)
