"""Shorter prompts: whole units of text are taken out before the model reads any of it.

Letters: B prompts, T tokens, Q tokens of the question, U units.

Sources: Robertson and Zaragoza, BM25 (2009), Eq. 3.15; Li et al., Selective Context (2310.06201),
Sec. 2. Learned compressors such as LLMLingua-2 (2403.12968) do better; none is built in.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowtide.core.errors import DataError
from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.calibration import evaluation_mode


@dataclass(frozen=True, kw_only=True)
class PromptCompressor(Optimization):
    """Keep the units of a prompt that matter, in their order.

    Attributes:
        ratio: The part of the units that goes.
        unit: Tokens of a unit. Tokens behind the last whole unit stay.
        needs_question: It cannot work before the question is known.
    """

    stage = "prompt"
    needs_question: ClassVar[bool] = False
    positional = ("ratio",)
    ratio: float
    unit: int = 8

    def __post_init__(self) -> None:
        self.check(0 <= self.ratio < 1, "ratio", "from 0 to below 1")
        self.check(self.unit > 0, "unit", "above 0")

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        handle = Handle(self.spelled)
        handle.replace(context.runtime, "prompt", self)
        return handle

    def kept(self, model: nn.Module, prompt: Tensor, question: Tensor | None) -> Tensor:
        """Return the tokens of `prompt`, (B, T), that stay, ascending, (B, n).

        Args:
            model: The model that will read the prompt.
            prompt: int64.
            question: What will be asked, (B, Q) int64; None when that is not known yet.
        """
        units = prompt.shape[1] // self.unit
        count = max(1, int(units * (1 - self.ratio)))
        if units == 0:
            return torch.arange(prompt.shape[1]).expand(prompt.shape[0], -1)
        scores = self.scores(model, prompt, question)
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values
        tokens = best.unsqueeze(-1) * self.unit + torch.arange(self.unit, device=prompt.device)
        rest = torch.arange(units * self.unit, prompt.shape[1], device=prompt.device)
        return torch.cat([tokens.flatten(1), rest.expand(prompt.shape[0], -1)], 1)

    @abstractmethod
    def scores(self, model: nn.Module, prompt: Tensor, question: Tensor | None) -> Tensor:
        """Return how much each whole unit matters, (B, U)."""


@dataclass(frozen=True, kw_only=True)
class Bm25(PromptCompressor):
    """Units that share rare tokens with the question stay.

    Attributes:
        saturation: How soon more of the same token stops to count (k1 of BM25).
    """

    name: ClassVar[str] = "prompt.bm25"
    needs_question = True
    saturation: float = 1.2

    @override
    def scores(self, model: nn.Module, prompt: Tensor, question: Tensor | None) -> Tensor:
        if question is None:
            raise DataError(
                f"{self.spelled} compares the prompt with the question, and the prompt is read "
                f"before the question is known; ask question-aware, or use prompt.surprise"
            )
        whole = prompt[:, : prompt.shape[1] // self.unit * self.unit]
        units = whole.unflatten(1, (-1, self.unit))  # (B, U, unit)
        score = torch.zeros(units.shape[:2], device=prompt.device)
        for row, asked in enumerate(question):
            for token in asked.unique():
                counts = (units[row] == token).sum(1).float()
                having = (counts > 0).sum()
                rarity = torch.log1p((len(counts) - having + 0.5) / (having + 0.5))
                score[row] += rarity * counts * (self.saturation + 1) / (counts + self.saturation)
        return score


@dataclass(frozen=True, kw_only=True)
class Surprise(PromptCompressor):
    """Units whose tokens the model finds unlikely stay; the model reads the prompt for it first."""

    name: ClassVar[str] = "prompt.surprise"

    @override
    def scores(self, model: nn.Module, prompt: Tensor, question: Tensor | None) -> Tensor:
        reader: Any = model
        with evaluation_mode(model):
            logits = reader(input_ids=prompt, use_cache=False).logits[:, :-1].float()
        surprise = -logits.log_softmax(-1).gather(2, prompt[:, 1:, None]).squeeze(-1)
        # Nothing predicts the first token: it counts as the mean of the others.
        surprise = torch.cat([surprise.mean(1, keepdim=True), surprise], 1)
        whole = surprise[:, : prompt.shape[1] // self.unit * self.unit]
        return whole.unflatten(1, (-1, self.unit)).mean(2)
