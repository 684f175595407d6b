"""Attention weights that fused attention does not give, computed apart.

Letters: B sequences, H query heads, K key-value heads, Q queries, T keys, D size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES_AT_ONCE = 128
"""Rows of attention weights that are held together, so that memory grows with T and not T^2."""


def attention_weights(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return causal attention weights, (B, H, Q, T) float32.

    Args:
        queries: (B, H, Q, D), those of the last Q of the T positions.
        keys: (B, K, T, D); each serves H / K consecutive query heads.
        scaling: Factor of the products.
    """
    asked, held = queries.shape[2], keys.shape[2]
    grouped = queries.unflatten(1, (keys.shape[1], -1)).float()  # (B, K, H / K, Q, D)
    logits = grouped @ keys.float().unsqueeze(2).transpose(-1, -2) * scaling
    hidden = torch.ones(asked, held, dtype=torch.bool, device=keys.device).triu(held - asked + 1)
    return logits.masked_fill_(hidden, float("-inf")).softmax(-1).flatten(1, 2)


def accumulated_attention(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return the attention weights of all queries, summed, (B, H, T) float32.

    Takes what `attention_weights` takes, with Q equal to T.
    """
    length = keys.shape[2]
    total = torch.zeros(*queries.shape[:2], length, device=keys.device)
    for begin in range(0, length, QUERIES_AT_ONCE):
        end = min(begin + QUERIES_AT_ONCE, length)
        weights = attention_weights(queries[:, :, begin:end], keys[:, :, :end], scaling)
        total[:, :, :end] += weights.sum(2)
    return total


def per_key_head(scores: Tensor, key_heads: int) -> Tensor:
    """Return the mean over the query heads that share a key-value head, (B, K, T)."""
    return scores.unflatten(1, (key_heads, -1)).mean(2)
