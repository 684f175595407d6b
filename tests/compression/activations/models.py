"""A small transformer, and a training loop through the plain host."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowtide.hosts import torch_loop

WORDS, LENGTH = 64, 32


class Block(nn.Module):
    """Attention and MLP, normalised before each. (B, T, D) to (B, T, D)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


class Transformer(nn.Module):
    """Next-token loss of tokens (B, T) and targets (B, T). `checkpoints`: None or a callable."""

    def __init__(
        self, *, width: int = 32, layers: int = 2, dropout: float = 0.0, checkpoints: Any = None
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, 4, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, WORDS, bias=False)
        self.checkpoints = checkpoints

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = self.checkpoints(block, x) if self.checkpoints else block(x)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def again(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block under torch's checkpointing without a second autograd run."""
    return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


def again_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block under torch's older checkpointing."""
    return checkpoint(block, x, use_reentrant=True)  # type: ignore[no-any-return]


def batch(step: int, rows: int = 8, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Return tokens and targets: each target follows from its token."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    tokens = torch.randint(0, WORDS, (rows, LENGTH), generator=generator)
    return tokens, (5 * tokens + 3) % WORDS


def block_of(**activations: Any) -> dict[str, Any]:
    """Return a ``"lowtide"`` block; by default tensors of 1 KiB and more are compressed."""
    return {"compression": {"activations": {"min_bytes": 1024, **activations}}}


def attached(model: nn.Module, lowtide: dict[str, Any], lr: float = 3e-3) -> torch_loop.TorchLoop:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return torch_loop.attach(model, optimizer, config={"lowtide": lowtide})


def train(loop: torch_loop.TorchLoop, steps: int, begin: int = 0) -> list[float]:
    """Train and return the losses."""
    losses = []
    for step in range(begin, begin + steps):
        loss = loop.model(*batch(step))
        loop.backward(loss)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        losses.append(loss.item())
    return losses
