"""A model whose layers are large enough to be looked at, and blocks that look at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TARGET = {"psnr_db": 50}


class Net(nn.Module):
    """Mean square of what two layers and a norm make of the input (N, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.drop(torch.tanh(layer(x)))
        return self.norm(x).square().mean() + x.abs().mean()


def block_of(**settings: Any) -> dict[str, Any]:
    """Return a block that looks at eight tensors every second step."""
    sample = {"every_n_steps": 2, "max_tensors_per_step": 8, **settings.pop("sample", {})}
    return {"quality": {"target": TARGET, "sample": sample, **settings}}
