"""Records of kind 3: blocks predicted by an autoencoder or by differences (FORMAT section 8)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowtide.compression.elements import Array
from lowtide.compression.learned.blocks import BlockGrid, takes
from lowtide.compression.learned.model import Model
from lowtide.compression.predictors import Differences, Shape
from lowtide.compression.primitives import primitives
from lowtide.core.codec import compress_bytes, decompress_bytes
from lowtide.core.errors import CorruptStreamError, MissingModelError
from lowtide.core.native import crc32c

_HEAD = struct.Struct("<IIII")  # learned blocks, bytes of flags and of latents, CRC32C
_STEP = struct.Struct("<d")
CODE_LIMIT = 1 << 30  # larger codes are not used
_FLAGS_LEVEL = 19  # of zstandard: a few bytes, once for each chunk


@dataclass(frozen=True, eq=False)
class LearnedBlocks:
    """Predicts each block by the decoder of an autoencoder, or each of its points by differences.

    Differences are those of whole steps, as `Differences` takes them; a value of a learned block is
    the prediction and so many steps, and counts as the whole steps next to it.

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
        multiples, restored = Differences((0,) * len(shape)).encode(work, shape, step)
        latents = self.quantized(model.latents(grid.cut(work)))
        outputs = model.outputs(self.dequantized(latents))
        predicted = Predicted(model.values(grid.join(outputs)), step)
        errors = predicted.errors(work)
        codes = _differences(multiples, shape, self.orders)
        is_learned = better_learned(grid, errors, codes, latent_bits(latents))
        mask = grid.spread(is_learned) != 0
        learned = predicted.restored(errors, restored.dtype)
        restored = np.where(mask, learned, restored)
        multiples = np.where(mask, predicted.multiples(learned), multiples)
        codes = np.where(mask, errors, _differences(multiples, shape, self.orders))
        flags, chosen = b"", b""
        if is_learned.any():
            latents = np.ascontiguousarray(latents[is_learned].T)
            chosen = primitives().entropy_encode(latents.reshape(-1), latents.shape, None)
            packed = np.packbits(is_learned, bitorder="little")
            flags = compress_bytes(packed.data, _FLAGS_LEVEL)
        checksum = crc32c(outputs[is_learned].data)
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
        outputs = np.zeros((grid.count, model.architecture.elements), np.float32)
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
            outputs[is_learned] = model.outputs(self.dequantized(found.T))
        if crc32c(outputs[is_learned].data) != checksum:
            raise CorruptStreamError(
                "the autoencoder predicts other values here than where the stream was written: "
                "the stream or the model is damaged, or this processor's arithmetic is not that of "
                "IEEE 754"
            )
        codes = primitives().entropy_decode(coded, shape, None)
        mask = grid.spread(is_learned)
        predicted = Predicted(model.values(grid.join(outputs)), step)
        learned = predicted.restored(codes, np.dtype(np.float64 if is_double else np.float32))
        codes[mask != 0] = 0  # those are known
        restored: Array = primitives().mixed_decode(
            codes, predicted.multiples(learned), mask, shape, self.orders, step, is_double
        )
        return np.where(mask != 0, learned, restored)

    def quantized(self, latents: Array) -> Array:
        """Return latents in whole steps: int32."""
        with np.errstate(all="ignore"):
            return _whole(latents.astype(np.float64) * (1 / self.latent_step))

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
        if not 0 < latent_step < math.inf or math.isinf(1 / latent_step):
            raise CorruptStreamError(f"a latent step of {latent_step}")
        return LearnedBlocks(orders, latent_step, self.model)


class Predicted:
    """Values around predictions.

    Args:
        values: Predictions, float64.
        step: Of the quantizer.
    """

    def __init__(self, values: Array, step: float) -> None:
        self._step, self._inverse = step, 1 / step
        with np.errstate(all="ignore"):
            self._values = np.where(np.abs(values * self._inverse) < CODE_LIMIT, values, 0.0)

    def errors(self, work: Array) -> Array:
        """Return how many steps working values are away: int32."""
        with np.errstate(all="ignore"):
            return _whole((work.astype(np.float64) - self._values) * self._inverse)

    def restored(self, errors: Array, dtype: np.dtype[Any]) -> Array:
        """Return the working values that are so many steps away."""
        with np.errstate(all="ignore"):
            return (self._values + errors.astype(np.float64) * self._step).astype(dtype)

    def multiples(self, restored: Array) -> Array:
        """Return the whole steps that restored values count as for differences: int32."""
        with np.errstate(all="ignore"):
            return _whole(restored.astype(np.float64) * self._inverse)


def _whole(numbers: Array) -> Array:
    """Return numbers rounded to int32, half to even; 0 for those that are too large or none."""
    steps = np.rint(numbers)
    return np.where(np.abs(steps) < CODE_LIMIT, steps, 0).astype(np.int32)


def _differences(multiples: Array, shape: Shape, orders: Shape) -> Array:
    # A step of 1: the multiples are the values.
    codes, _ = Differences(orders).encode(multiples.astype(np.float64), shape, 1.0)
    return codes


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
        errors: Flat int32: by how many steps values differ from the autoencoder's.
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
