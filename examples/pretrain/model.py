"""A small Llama-style decoder in plain PyTorch.

Nothing here knows about DeepSpeed or Lowtide: the same module trains under any host.

Shape letters, used as suffixes of tensor names in this file:
    B batch, T sequence position, D model width, H query heads, G key/value heads,
    K width of one head, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""Target value that takes no part in the loss (padding of the last validation batch)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of the model.

    Attributes:
        vocabulary: number of token ids.
        width: model width; must be a multiple of ``heads``, with an even head width (RoPE).
        layers: number of decoder blocks.
        heads: query heads.
        kv_heads: key/value heads; must divide ``heads`` (grouped-query attention).
        feed_forward: inner width of the SwiGLU block; None means 8/3 of ``width``, rounded up
            to a multiple of 32.
        sequence: longest sequence in tokens.
        rope_base: base of the rotary frequencies.
        norm_epsilon: added to the mean square in RMSNorm.
        tied_embeddings: use the token embedding as the output projection too.
    """

    vocabulary: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int | None = None
    sequence: int = 256
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.width, self.layers, self.heads, self.kv_heads) < 1:
            raise ValueError(f"model sizes must be at least 1, got {self}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width} with {self.heads} heads: the width of one head must be a "
                "whole even number; change --width or --heads"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward block."""
        if self.feed_forward is not None:
            return self.feed_forward
        return math.ceil(self.width * 8 / 3 / 32) * 32


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the rotary position embedding.

    Returns:
        Two float32 tensors of shape (T, K); the second half of K repeats the first.
    """
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    frequencies = 1.0 / config.rope_base**exponents
    angles = torch.outer(torch.arange(config.sequence, dtype=torch.float32), frequencies)
    angles_TK = torch.cat((angles, angles), dim=-1)
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair (k, k + K/2) by the angle of its position."""
    low, high = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat((-high, low), dim=-1) * sin_TK


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        kv_width = config.kv_heads * config.head_width
        self.key_value = nn.Linear(config.width, 2 * kv_width, bias=False)
        self.output = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Attend to this and all earlier positions; returns shape (B, T, D)."""
        config = self.config
        batch, length, _ = x_BTD.shape
        heads_shape = (batch, length, -1, config.head_width)
        q_BHTK = self.query(x_BTD).view(heads_shape).transpose(1, 2)
        k_BTX, v_BTX = self.key_value(x_BTD).chunk(2, dim=-1)  # X = G * K
        k_BGTK = k_BTX.reshape(heads_shape).transpose(1, 2)
        v_BGTK = v_BTX.reshape(heads_shape).transpose(1, 2)
        q_BHTK = rotate(q_BHTK, cos_TK, sin_TK)
        k_BGTK = rotate(k_BGTK, cos_TK, sin_TK)
        repeats = config.heads // config.kv_heads
        if repeats > 1:  # each key/value head serves `repeats` neighbouring query heads
            k_BGTK = k_BGTK.repeat_interleave(repeats, dim=1)
            v_BGTK = v_BGTK.repeat_interleave(repeats, dim=1)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True)
        y_BTD = y_BHTK.transpose(1, 2).reshape(batch, length, -1)  # (B, T, H * K)
        return self.output(y_BTD)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.inner_width, bias=False)
        self.down = nn.Linear(config.inner_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply the block to each position; returns shape (B, T, D)."""
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each on a normalised residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """Return the residual stream after this layer, shape (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TK, sin_TK)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Decoder(nn.Module):
    """The whole language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.unembedding = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied_embeddings:
            self.unembedding.weight = self.embedding.weight
        cos_TK, sin_TK = rope_table(config)
        # Not persistent: a function of the config, so it does not belong in a checkpoint.
        self.register_buffer("cos_TK", cos_TK, persistent=False)
        self.register_buffer("sin_TK", sin_TK, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        # Projections that add to the residual stream start smaller, so that its variance does
        # not grow with depth; everything else is normal with the usual 0.02.
        residual_std = 0.02 / math.sqrt(2 * self.config.layers)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            is_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            nn.init.normal_(weight, std=residual_std if is_residual else 0.02)

    @staticmethod
    def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean negative log-likelihood in nats of the targets that count."""
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Predict the next token at every position.

        Args:
            tokens_BT: int64 token ids, at most ``config.sequence`` long.
            targets_BT: int64 ids of the tokens that follow; ``IGNORED`` leaves a position out.

        Returns:
            Without targets the logits, shape (B, T, V); with targets their mean negative
            log-likelihood in nats, a scalar.
        """
        length = tokens_BT.shape[1]
        cos_TK, sin_TK = self.cos_TK[:length], self.sin_TK[:length]
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TK, sin_TK)
        logits_BTV = self.unembedding(self.norm(x_BTD))
        if targets_BT is None:
            return logits_BTV
        return self.loss(logits_BTV, targets_BT)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters for AdamW: matrices decay, vectors (norm gains) do not."""
    parameters = list(model.parameters())  # a tied matrix is listed once
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
