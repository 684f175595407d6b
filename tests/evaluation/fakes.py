"""Small models whose answers can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.evaluation.models.scripted import ScriptedModel
from lowtide.evaluation.models.torch_model import TorchModel


class Bigram(nn.Module):
    """Each token's logits depend on the one before alone: exact likelihoods by look-up."""

    def __init__(self, vocabulary: int = 256, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=random))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.table[tokens_BT]

    def log_probability(self, before: int, token: int) -> float:
        return float(self.table.detach().double().log_softmax(dim=-1)[before, token])


class Prefix(nn.Module):
    """Logits depend on all tokens so far: shows what padding or cutting would change."""

    def __init__(self, vocabulary: int = 256) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=random))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.table[tokens_BT].cumsum(dim=1)


def byte_model(module: Any, **options: Any) -> TorchModel:
    """A model whose tokens are bytes."""
    return TorchModel(
        module,
        encode=lambda text: list(text.encode()),
        decode=lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"),
        **options,
    )


def knowing(known: dict[str, int], options: int = 4, *, name: str = "knowing") -> ScriptedModel:
    """A model that knows the right option's text of some questions, wherever it is listed."""

    def score(context: str, text: str) -> float:
        for question, value in known.items():
            if f"Question: {question}\n" in context:
                lines = context.splitlines()
                letter = next((ln[0] for ln in lines if ln[1:] == f". {value}"), None)
                is_right = text.strip() in (letter, str(value))
                return math.log(0.7 if is_right else 0.3 / (options - 1))
        return math.log(1 / options)

    return ScriptedModel(score=score, name=name)


def cli_model() -> ScriptedModel:
    """For ``--model python:tests.evaluation.fakes:cli_model``."""
    return ScriptedModel(answers=lambda prompt: "299.79 m" if "light" in prompt else "2")


def cli_other_model() -> ScriptedModel:
    return ScriptedModel(answers=lambda prompt: "I do not know", name="other")


def not_a_model() -> int:
    return 3


def cli_broken_model() -> ScriptedModel:
    return ScriptedModel(score=lambda *_: math.nan)
