"""Learning the embedding: together with a throw-away stage 2 for all codecs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lowtide.quality.surrogate.embedding import WIDTH, Embedding

Floats = NDArray[np.float64]

_BATCH = 16  # arrays
_ROWS = 32  # bounds and codecs of each in a batch
_HIDDEN = 64


@dataclass(frozen=True)
class Lesson:
    """One array of the training set.

    Attributes:
        pictures: As `embedding.pictures` makes them.
        x: Standardised inputs but for the embedding, float32, shape (rows, inputs).
        heads: Which head each row belongs to, shape (rows,).
        targets: Standardised, NaN where unknown, float32, shape (rows, outputs).
    """

    pictures: torch.Tensor
    x: torch.Tensor
    heads: torch.Tensor
    targets: torch.Tensor


def learned(lessons: Sequence[Lesson], heads: int, *, epochs: int, seed: int) -> Embedding:
    """Return an embedding trained on `lessons`; it has the values it started with for 0 epochs.

    Args:
        lessons: The training set.
        heads: How many there are.
        epochs: Passes over the training set.
        seed: Of first values and of the order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Embedding()
        inputs, outputs = lessons[0].x.shape[1], lessons[0].targets.shape[1]
        second = nn.Sequential(
            nn.Linear(inputs + WIDTH, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(),
            nn.Linear(_HIDDEN, heads * outputs),
        )  # fmt: skip
        parameters = [*network.parameters(), *second.parameters()]
        steps = max(1, epochs * -(-len(lessons) // _BATCH))
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for numbers in torch.randperm(len(lessons)).split(_BATCH):
                loss = _loss(network, second, [lessons[int(n)] for n in numbers], outputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval().requires_grad_(False)


def _loss(
    network: Embedding, second: nn.Module, batch: Sequence[Lesson], outputs: int
) -> torch.Tensor:
    vectors = network(
        torch.cat([each.pictures for each in batch]), [len(each.pictures) for each in batch]
    )
    picked = [torch.randint(len(each.x), (_ROWS,)) for each in batch]
    x = torch.cat([each.x[rows] for each, rows in zip(batch, picked, strict=True)])
    heads = torch.cat([each.heads[rows] for each, rows in zip(batch, picked, strict=True)])
    targets = torch.cat([each.targets[rows] for each, rows in zip(batch, picked, strict=True)])
    given = torch.cat([x, vectors.repeat_interleave(_ROWS, dim=0)], dim=1)
    found = second(given).view(len(x), -1, outputs)
    found = found[torch.arange(len(x)), heads]
    is_known = targets.isfinite()
    errors = functional.smooth_l1_loss(found, targets.nan_to_num(), beta=0.3, reduction="none")
    return (errors * is_known).sum() / len(x)
