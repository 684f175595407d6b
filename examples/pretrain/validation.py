"""Validation: negative log-likelihood per token, and bits per byte of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batches import readers_of, validation_batches
from data import PreparedData
from model import IGNORED
from torch import distributed

WINDOWS_WHILE_TRAINING = 64
WINDOWS_AT_THE_END = 2048


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well the validation text is predicted.

    Attributes:
        loss: mean negative log-likelihood per token in nats.
        bits_per_byte: sum of the negative log-likelihoods in bits over the bytes of the text
            predicted; None where the text behind the tokens is not known.
        tokens: number of predicted tokens.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int


def score_from_sums(nats: float, tokens: float, text_bytes: float | None) -> Score:
    """Turn sums over all ranks into a score."""
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else None
    return Score(loss=nats / tokens, bits_per_byte=bits_per_byte, tokens=int(tokens))


def count_bytes(targets: np.ndarray, token_bytes: np.ndarray) -> int:
    """Count the bytes of text that the targets stand for, padding left out."""
    return int(token_bytes[targets[targets != IGNORED]].sum())


@torch.no_grad()
def validate(
    engine: Any,
    data: PreparedData,
    *,
    sequence: int,
    micro_batch: int,
    limit_windows: int,
) -> Score:
    """Score the model on the validation text; every rank must call it, all get the same answer.

    Args:
        engine: the DeepSpeed engine (or any module) that returns the mean loss of a batch.
        data: the prepared data.
        sequence: tokens the model reads at once.
        micro_batch: windows per forward pass.
        limit_windows: at most this many windows, always the same ones.
    """
    reader, readers = readers_of(engine)
    was_training = engine.training
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    device = next(engine.parameters()).device
    for inputs_BT, targets_BT in validation_batches(
        data.validation,
        sequence=sequence,
        micro_batch=micro_batch,
        reader=reader,
        readers=readers,
        limit_windows=limit_windows,
    ):
        loss = engine(inputs_BT.to(device), targets_BT.to(device))
        tokens = int((targets_BT != IGNORED).sum())
        if tokens:  # the mean over nothing is not a number
            sums[0] += float(loss) * tokens
            sums[1] += tokens
            if data.token_bytes is not None:
                sums[2] += count_bytes(targets_BT.numpy(), data.token_bytes)
    if distributed.is_initialized():
        sums = sums.to(device)
        distributed.all_reduce(sums)
    engine.train(was_training)
    nats, tokens_seen, text_bytes = sums.tolist()
    return score_from_sums(nats, tokens_seen, text_bytes or None)
