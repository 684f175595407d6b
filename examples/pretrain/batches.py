"""Which tokens a reader sees at a step: a pure function, so resuming needs no sampler state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from errors import UsageError
from model import IGNORED
from torch import Tensor, distributed


def readers_of(engine: Any) -> tuple[int, int]:
    """Return which reader of the data this rank is, and how many there are.

    Ranks that hold one model together read the same; only DeepSpeed's mpu knows of them.
    """
    mpu = getattr(engine, "mpu", None)
    if mpu is not None:
        return mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class TrainingBatches:
    """Windows of the training tokens, each seen once per epoch in a new random order.

    Sample number ``n`` of the whole job (over all readers and steps) is window ``order[n % W]`` of
    epoch ``n // W``; the windows of each epoch start at another offset.

    Args:
        tokens: all training tokens, shape (N,).
        sequence: tokens the model reads at once.
        seed: same seed, same batches.
        micro_batch: windows per forward pass of one reader.
        readers: ranks that read different windows (`readers_of`).
        accumulation: forward passes per optimizer step.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        sequence: int,
        seed: int,
        micro_batch: int,
        readers: int,
        accumulation: int,
    ) -> None:
        # One window less than fits, so that every offset below `sequence` stays inside.
        self._windows = (len(tokens) - 1) // sequence - 1
        if self._windows < 1:
            raise UsageError(
                f"the training text has {len(tokens)} tokens, at least {2 * sequence + 1} are "
                "needed; add text with --data or lower --sequence"
            )
        self._tokens = tokens
        self._sequence = sequence
        self._seed = seed
        self._micro_batch = micro_batch
        self._readers = readers
        self._accumulation = accumulation
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def tokens_per_step(self) -> int:
        """Tokens all readers together train on in one optimizer step."""
        per_pass = self._micro_batch * self._sequence * self._readers
        return per_pass * self._accumulation

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        generator = np.random.default_rng([self._seed, epoch])
        return generator.permutation(self._windows), int(generator.integers(self._sequence))

    def batch(self, step: int, micro_step: int, reader: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of one forward pass.

        Args:
            step: optimizer steps finished before this one.
            micro_step: forward pass within the step.
            reader: which of them this rank is.

        Returns:
            Two int64 tensors of shape (micro batch, sequence).
        """
        part = (step * self._accumulation + micro_step) * self._readers + reader
        rows = []
        for sample in range(part * self._micro_batch, (part + 1) * self._micro_batch):
            order, offset = self._epoch(sample // self._windows)
            start = int(order[sample % self._windows]) * self._sequence + offset
            rows.append(self._tokens[start : start + self._sequence + 1])
        rows_BT = torch.from_numpy(np.stack(rows).astype(np.int64))
        return rows_BT[:, :-1], rows_BT[:, 1:]


def validation_batches(
    tokens: np.ndarray,
    *,
    sequence: int,
    micro_batch: int,
    reader: int,
    readers: int,
    limit_windows: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through the validation tokens, each reader through its own share.

    Every token but the first is a target exactly once. All ranks yield the same number of
    batches, as they must call the model together; what is missing is padded with ``IGNORED``.

    Args:
        tokens: all validation tokens, shape (M,).
        sequence: tokens the model reads at once.
        micro_batch: windows per batch.
        reader: which of them this rank is.
        readers: ranks that read different windows (`readers_of`).
        limit_windows: only this many windows, evenly spread; None for all.
    """
    windows = max(1, -(-(len(tokens) - 1) // sequence))
    used = windows if limit_windows is None else min(windows, limit_windows)
    chosen = np.arange(used) * windows // used
    rounds = -(-used // (micro_batch * readers))
    for number in range(rounds):
        first = (number * readers + reader) * micro_batch
        inputs_BT = torch.zeros((micro_batch, sequence), dtype=torch.int64)
        targets_BT = torch.full((micro_batch, sequence), IGNORED, dtype=torch.int64)
        for row, window in enumerate(chosen[first : first + micro_batch]):
            start = int(window) * sequence
            piece = torch.from_numpy(tokens[start : start + sequence + 1].astype(np.int64))
            inputs_BT[row, : len(piece) - 1] = piece[:-1]
            targets_BT[row, : len(piece) - 1] = piece[1:]
        yield inputs_BT, targets_BT
