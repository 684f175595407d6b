"""A small network that looks at blocks as pictures: what no list of statistics says.

Blocks of one axis are folded into squares, bricks are cut into their slices; a picture is 64 or 16
wide. Pooling makes one vector of all pictures of an array, however many there are.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

Singles = NDArray[np.float32]

WIDTH = 16  # of the vector
_CHANNELS = (16, 32, 32)
_FLOOR = 1e-7  # of residuals, in units of the range: what float32 can hold


def pictures(values: Singles) -> torch.Tensor:
    """Return two channels for each picture: normalised values, and log10 of Lorenzo residuals.

    Args:
        values: float32, shape (blocks, *block), as in `Blocks`.

    Returns:
        float32, shape (pictures, 2, rows, columns).
    """
    if values.ndim == 2:
        rows = int(np.sqrt(values.shape[1]))
        values = values[:, : rows * rows].reshape(len(values), rows, rows)
    x = torch.from_numpy(values.reshape(-1, *values.shape[-2:]))
    residual = functional.pad(x.diff(dim=-1).diff(dim=-2), (1, 0, 1, 0))
    logs = (residual.abs() + _FLOOR).log10() / 3 + 1
    centred = x - x.mean()
    return torch.stack([centred / (centred.std() + _FLOOR), logs], dim=1)


class Embedding(nn.Module):
    """Three strided convolutions; means, maxima and deviations of what they see; one vector."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2, *_CHANNELS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1)
            for before, after in itertools.pairwise(sizes)
        )
        self.vector = nn.Linear(3 * _CHANNELS[-1], WIDTH)

    def forward(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return a vector for each array.

        Args:
            x: float32, shape (pictures of all arrays, 2, rows, columns).
            counts: Pictures of each array.

        Returns:
            float32, shape (arrays, WIDTH).
        """
        for convolution in self.convolutions:
            x = functional.silu(convolution(x))
        flat = x.flatten(2)
        found = []
        for each, most in zip(flat.mean(2).split(counts), flat.amax(2).split(counts), strict=True):
            squares = each.var(0, correction=0)
            found.append(torch.cat([each.mean(0), most.amax(0), (squares + 1e-6).sqrt()]))
        vectors: torch.Tensor = self.vector(torch.stack(found))
        return vectors.tanh()  # bounded, also for arrays unlike all others
