"""Small models and tokens that are the same with every version of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "grouped": {
        "model": {"seed": 1, "heads": 4, "key_heads": 2},
        "tokens": {"seed": 1, "distinct": True},
    },
    "one key head": {
        "model": {"seed": 2, "heads": 4, "key_heads": 1},
        "tokens": {"seed": 2, "distinct": True},
    },
    "all heads": {
        "model": {"seed": 3, "heads": 2, "key_heads": 2},
        "tokens": {"seed": 3, "distinct": True},
    },
}
"""What kvpress was asked; see golden_kept.json."""


def seeded_model(
    *, seed: int = 0, heads: int = 4, key_heads: int = 2, layers: int = 2, width: int = 32
) -> Any:
    """Return a Llama whose weights are drawn here, in the order of their names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=generator)
            # Large enough that attention is far from even; norms stay near 1.
            parameter.copy_(1 + 0.1 * drawn if "norm" in name else drawn * 0.3)
    return model


def seeded_tokens(
    *, seed: int = 0, rows: int = 2, length: int = 64, distinct: bool = False
) -> Tensor:
    """Return tokens, (rows, length); `distinct` ones tie in no policy."""
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        drawn = [torch.randperm(97, generator=generator)[:length] for _ in range(rows)]
        return torch.stack(drawn)
    return torch.randint(0, 97, (rows, length), generator=generator)
