"""Shapes of well-known models, for planning by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowtide.core.errors import ConfigError, UnknownNameError, listed, near
from lowtide.tensor_parallel.block_shape import BlockShape, whole
from lowtide.tensor_parallel.footprint import DecoderShape

RANK_STEP = 8  # what matrix units like a width to be a multiple of


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A full-rank model's shape; `decoder` makes it low-rank.

    Attributes:
        width: Of the residual stream.
        mlp_width: Between gate/up and down.
        layers: Decoder blocks.
        heads: Query heads.
        kv_heads: Key and value heads; None: as many as `heads`.
        head_width: Of one head; None: `width` over `heads`.
        vocabulary: Rows of the embedding.
        is_tied: Whether embedding and head are one matrix.
    """

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    vocabulary: int = 32000
    is_tied: bool = False

    def decoder(self, rank: int, *, crossing: str | None = None) -> DecoderShape:
        """Return the model with every linear of its blocks at `rank`.

        Args:
            rank: Of all.
            crossing: Gate between the latents of neighbouring blocks, see `BlockShape`.

        Raises:
            ConfigError: A number is not a whole number from 1, the heads do not divide, or there
                is no such gate.
        """
        for name in ("width", "heads"):
            whole(name, getattr(self, name))
        if self.head_width is None and self.width % self.heads:
            raise ConfigError(
                f"heads: got {self.heads}, allowed is a divisor of the width {self.width}, "
                "or give the width of a head"
            )
        head_width = self.width // self.heads if self.head_width is None else self.head_width
        block = BlockShape(
            width=self.width,
            mlp_width=self.mlp_width,
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            head_width=head_width,
            attention_rank=rank,
            mlp_rank=rank,
            crossing=crossing,
        )
        return DecoderShape(
            block=block, layers=self.layers, vocabulary=self.vocabulary, is_tied=self.is_tied
        )


# The first five as in the evaluation of BOOST (arXiv 2512.12131) where it says: widths of 1B to 13B
# are its, those of 30B and the layers and heads of 3B are LLaMA's or a guess.
PRESETS: dict[str, Preset] = {
    "llama-1b": Preset(width=2048, mlp_width=5472, layers=24, heads=32),
    "llama-3b": Preset(width=3072, mlp_width=8192, layers=28, heads=24),
    "llama-7b": Preset(width=4096, mlp_width=11008, layers=32, heads=32),
    "llama-13b": Preset(width=5120, mlp_width=13824, layers=40, heads=40),
    "llama-30b": Preset(width=6656, mlp_width=17920, layers=60, heads=52),
    "llama3-8b": Preset(
        width=4096, mlp_width=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256
    ),
    "qwen3-8b": Preset(
        width=4096, mlp_width=12288, layers=36, heads=32, kv_heads=8, vocabulary=151936
    ),
}
"""Models by name."""


def preset(name: str) -> Preset:
    """Return a named model; upper and lower case are the same.

    Raises:
        UnknownNameError: There is no such model.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        raise UnknownNameError(
            f"model: unknown model {name!r}.{near(name, PRESETS)} Known: {listed(PRESETS)}; "
            "any other model goes by its widths"
        )
    return found


def rank_of(ratio: float, width: int) -> int:
    """Return the rank that is `ratio` of `width`, rounded up to a multiple of 8.

    Raises:
        ConfigError: `ratio` is not above 0 and at most 1.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"rank_ratio: got {ratio:g}, allowed is above 0 and at most 1")
    steps = round(ratio * width / RANK_STEP, 9)  # 0.07 * 800 is a little above 56
    return math.ceil(steps) * RANK_STEP
