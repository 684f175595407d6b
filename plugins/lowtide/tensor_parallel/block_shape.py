"""Widths of a decoder block, for planning without a model; no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowtide.core.errors import ConfigError
from lowtide.tensor_parallel.gates import gate_shapes, gate_width


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Widths of one decoder block.

    Attributes:
        width: Of the residual stream (d).
        mlp_width: Between gate/up and down (f).
        heads: Query heads.
        kv_heads: Key and value heads; fewer than `heads` with grouped-query attention.
        head_width: Of one head; `heads` of them need not add up to `width`.
        attention_rank: Latent width of q, k, v and o each.
        mlp_rank: Latent width of gate, up and down each.
        crossing: Gate through which each latent also reads that of the block before, one of
            `gates.GATES`; None: latents do not cross. The first block, which has no gates, is
            counted like the others.

    Raises:
        ConfigError: A number is not a whole number from 1, `heads` is no multiple of `kv_heads`,
            a rank is above the width, or there is no such gate.
    """

    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_width: int
    attention_rank: int
    mlp_rank: int
    crossing: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "crossing":
                whole(field.name, getattr(self, field.name))
        if self.crossing is not None:
            gate_shapes(self.crossing, 1, 1)
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"kv_heads: got {self.kv_heads}, allowed is a divisor of the {self.heads} heads"
            )
        for name, rank in (("attention", self.attention_rank), ("mlp", self.mlp_rank)):
            if rank > self.width:
                raise ConfigError(
                    f"{name}_rank: got {rank}, allowed is at most the width {self.width}; "
                    "take a smaller rank"
                )

    @property
    def query_width(self) -> int:
        """Width of all queries together (q)."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all keys together, which is that of all values (kv)."""
        return self.kv_heads * self.head_width

    @property
    def latent_width(self) -> int:
        """Width of all seven latents of the block together; 7 r with one rank."""
        return 4 * self.attention_rank + 3 * self.mlp_rank

    @property
    def gate_width(self) -> int:
        """Width of all seven latents between the factors of low-rank gates; else 0."""
        if self.crossing != "low_rank":
            return 0
        return 4 * gate_width(self.attention_rank) + 3 * gate_width(self.mlp_rank)


def whole(name: str, value: object) -> None:
    """Check that a setting is a whole number from 1.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: got {value!r}, allowed is a whole number from 1")
