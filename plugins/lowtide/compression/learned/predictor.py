"""Records of kind 3: blocks predicted by an autoencoder or by differences (FORMAT section 8)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowtide.compression.elements import Array
from lowtide.compression.learned.blocks import BlockGrid, takes
from lowtide.compression.learned.model import CODE_LIMIT, Model
from lowtide.compression.predictors import Differences, Shape
from lowtide.compression.primitives import primitives
from lowtide.core.codec import compress_bytes, decompress_bytes
from lowtide.core.errors import CorruptStreamError, MissingModelError
from lowtide.core.native import crc32c

_HEAD = struct.Struct("<IIII")  # learned blocks, bytes of flags and of latents, CRC32C
_STEP = struct.Struct("<d")
_FLAGS_LEVEL = 19  # of zstandard: a few bytes, once for each chunk


@dataclass(frozen=True, eq=False)
class LearnedBlocks:
    """Predicts each block by the decoder of an autoencoder, or each of its points by differences.

    All are whole steps: values are quantized first, as `Differences` does.

    Attributes:
        orders: Of the differences, which cross the borders of blocks.
        latent_step: Of the quantizer of latents.
        model: The autoencoder; without it a record can be inspected, not decoded.
    """

    orders: Shape
    latent_step: float
    model: Model | None

    kind: ClassVar[int] = 3
    name: ClassVar[str] = "autoencoder"

    def to_section(self, work: Array, shape: Shape, step: float) -> tuple[bytes, Array]:
        """Return the section of codes, and the working values that a decoder will have."""
        model, grid = self._model_for(shape)
        plain = Differences((0,) * len(shape))
        multiples, restored = plain.encode(work, shape, step)
        codes, _ = Differences(self.orders).encode(work, shape, step)
        latents = self.quantized(model.latents(grid.cut(work)))
        predicted = model.multiples(self.dequantized(latents), step)
        errors = multiples - grid.join(predicted)  # int32 wraps around
        is_learned = better_learned(grid, errors, codes, latent_bits(latents))
        codes = np.where(grid.spread(is_learned), errors, codes)
        flags, chosen = b"", b""
        if is_learned.any():
            latents = np.ascontiguousarray(latents[is_learned].T)
            chosen = primitives().entropy_encode(latents.reshape(-1), latents.shape, None)
            packed = np.packbits(is_learned, bitorder="little")
            flags = compress_bytes(packed.data, _FLAGS_LEVEL)
        checksum = crc32c(predicted[is_learned].data)
        head = _HEAD.pack(np.count_nonzero(is_learned), len(flags), len(chosen), checksum)
        coded = primitives().entropy_encode(codes, shape, None)
        return b"".join((head, flags, chosen, coded)), restored

    def from_section(
        self, section: bytes | memoryview, shape: Shape, step: float, *, is_double: bool
    ) -> Array:
        """Return working values.

        Raises:
            CorruptStreamError: the section is damaged, or the network gives other numbers here
                than where the stream was written.
            MissingModelError: there is no model.
        """
        model, grid = self._model_for(shape)
        count, flags, latents, checksum, coded = _parts(section, grid.count)
        is_learned = np.zeros(grid.count, bool)
        predicted = np.zeros((grid.count, model.architecture.elements), np.int32)
        if count:
            raw = np.frombuffer(decompress_bytes(flags, -(-grid.count // 8)), np.uint8)
            is_learned = np.unpackbits(raw, count=grid.count, bitorder="little").astype(bool)
            if np.count_nonzero(is_learned) != count:
                raise CorruptStreamError(
                    f"{np.count_nonzero(is_learned)} of {grid.count} blocks are flagged, and "
                    f"{count} claimed"
                )
            turned = (model.architecture.latent, count)
            found = primitives().entropy_decode(latents, turned, None).reshape(turned)
            predicted[is_learned] = model.multiples(self.dequantized(found.T), step)
        if crc32c(predicted[is_learned].data) != checksum:
            raise CorruptStreamError(
                "the autoencoder predicts other values here than where the stream was written: "
                "the stream or the model is damaged, or this processor's arithmetic is not that of "
                "IEEE 754"
            )
        codes = primitives().entropy_decode(coded, shape, None)
        restored: Array = primitives().mixed_decode(
            codes,
            grid.join(predicted),
            grid.spread(is_learned),
            shape,
            self.orders,
            step,
            is_double,
        )
        return restored

    def quantized(self, latents: Array) -> Array:
        """Return latents in whole steps: int32."""
        with np.errstate(all="ignore"):
            steps = np.rint(latents.astype(np.float64) * (1 / self.latent_step))
            return np.where(np.abs(steps) < CODE_LIMIT, steps, 0).astype(np.int32)

    def dequantized(self, steps: Array) -> Array:
        """Return what the decoder of the autoencoder gets: float32."""
        with np.errstate(all="ignore"):
            return (steps.astype(np.float64) * self.latent_step).astype(np.float32)

    def pack(self) -> bytes:
        """Return the bytes of a record that say all this."""
        return Differences(self.orders).pack() + _STEP.pack(self.latent_step)

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters as JSON types."""
        return {"orders": list(self.orders), "latent_step": self.latent_step}

    def _model_for(self, shape: Shape) -> tuple[Model, BlockGrid]:
        if self.model is None:
            raise MissingModelError("a record of kind autoencoder needs a model")
        block = self.model.architecture.block
        if not takes(shape, block):
            raise CorruptStreamError(f"a chunk of shape {shape} has no blocks of {block}")
        return self.model, BlockGrid(shape, block)


@dataclass(frozen=True)
class LearnedKind:
    """Reads records of kind 3.

    Attributes:
        model: The one that the stream names; None where records are only inspected.
        missing: Raised for each record of this kind, where they are to be decoded without it.
    """

    model: Model | None
    missing: MissingModelError | None = None

    packed_bytes: ClassVar[int] = Differences.packed_bytes + _STEP.size

    def parse(self, raw: bytes, ndim: int) -> LearnedBlocks:
        """Return the predictor for chunks of `ndim` axes, or raise CorruptStreamError."""
        if self.missing is not None:
            raise self.missing
        orders = Differences.parse(raw[: Differences.packed_bytes], ndim).orders
        (latent_step,) = _STEP.unpack_from(raw, Differences.packed_bytes)
        if not 0 < latent_step < math.inf:
            raise CorruptStreamError(f"a latent step of {latent_step}")
        return LearnedBlocks(orders, latent_step, self.model)


def _parts(
    section: bytes | memoryview, blocks: int
) -> tuple[int, bytes | memoryview, bytes | memoryview, int, bytes | memoryview]:
    """Return number of learned blocks, flags, latents, checksum and codes."""
    if len(section) < _HEAD.size:
        raise CorruptStreamError(f"codes of {len(section)} bytes, allowed are {_HEAD.size} up")
    count, flags, latents, checksum = _HEAD.unpack_from(section)
    end = _HEAD.size + flags + latents
    is_plausible = count <= blocks and bool(count) == bool(flags) == bool(latents)
    if not is_plausible or end > len(section):
        raise CorruptStreamError(
            f"{count} learned blocks of {blocks}, flags of {flags} bytes and latents of {latents} "
            f"in {len(section)} bytes"
        )
    middle = _HEAD.size + flags
    return count, section[_HEAD.size : middle], section[middle:end], checksum, section[end:]


# ---- what an encoder decides by


def better_learned(grid: BlockGrid, errors: Array, codes: Array, latents_bits: float) -> Array:
    """Return for which blocks the autoencoder's errors, and its latent, take fewer bits.

    Args:
        grid: The blocks.
        errors: Flat int32: what values differ by from the autoencoder's.
        codes: Flat int32: differences.
        latents_bits: For the latent of a block.
    """
    learned, plain = block_bits(grid, errors), block_bits(grid, codes)
    return learned + latents_bits < plain


def block_bits(grid: BlockGrid, codes: Array) -> Array:
    """Return about how many bits each block takes: by its mean absolute code, as if geometric."""
    sizes = grid.sums(np.ones(math.prod(grid.shape), np.uint8))
    return sizes * bits_of_mean(grid.sums(np.abs(codes.astype(np.int64))) / sizes)


def latent_bits(latents: Array) -> float:
    """Return about how many bits the latent of a block takes: of whole steps, (n, latent)."""
    spread = np.abs(latents - np.median(latents, axis=0)).mean(axis=0)
    return float(bits_of_mean(spread).sum())


def bits_of_mean(mean: Array) -> Array:
    """Return the entropy of whole numbers with P(k) ~ t^|k| whose mean absolute value is `mean`."""
    m = np.maximum(mean, 1e-12)
    ratio = m / (np.sqrt(1 + m * m) + 1)
    return np.log2((1 + ratio) / (1 - ratio)) - m * np.log2(ratio)
