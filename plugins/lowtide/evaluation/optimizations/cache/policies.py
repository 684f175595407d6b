"""Which entries of the key-value cache stay when a prompt has been read.

Each policy is asked once for each layer, right after the layer's attention over the whole prompt;
what is generated afterwards is always kept. Scores of query heads that share a key-value head are
averaged, because they share its entries.

Letters: B sequences, H query heads, K key-value heads, T positions of the prompt, D size of a
head, N entries kept.

Sources: Xiao et al., StreamingLLM (2309.17453), Sec. 3.2; Zhang et al., H2O (2306.14048),
Algorithm 1; Li et al., SnapKV (2404.14469), Sec. 4; Oren et al., TOVA (2401.06104), Sec. 4; Devoto
et al., L2 norm of keys (2406.11430), Sec. 3; Devoto et al., Expected Attention (2510.00636). Oracle
of the tests: kvpress 0.5.5.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lowtide.core.errors import DataError
from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.cache.rope import Rope
from lowtide.evaluation.optimizations.cache.scores import (
    accumulated_attention,
    attention_weights,
    per_key_head,
)

POSITIONS = ("original", "rerotated")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one layer has when a prompt has been read.

    Attributes:
        queries: (B, H, T, D), turned to their positions, as the keys are.
        keys: (B, K, T, D).
        values: (B, K, T, D).
        positions: (B or 1, T).
        scaling: Of the products of queries and keys.
        layer: Number of the layer.
        rope: The model's rotation, where a policy or its positions need it.
        seed: Of policies that draw at random.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    scaling: float
    layer: int
    rope: Rope | None
    seed: int

    @property
    def length(self) -> int:
        """T."""
        return self.keys.shape[2]


@dataclass(frozen=True, kw_only=True)
class Policy(Optimization):
    """Keep a part of the cache.

    Attributes:
        ratio: The part of the prompt's entries that goes.
        positions: "original": entries keep their positions, and new tokens go on behind the
            prompt. "rerotated": keys are turned to positions 0 to N-1, and new tokens go on at N.
    """

    stage = "cache"
    positional = ("ratio",)
    needs_rope: ClassVar[bool] = False
    ratio: float
    positions: str = "original"

    def __post_init__(self) -> None:
        self.check(0 <= self.ratio < 1, "ratio", "from 0 to below 1")
        self.check(self.positions in POSITIONS, "positions", f"one of {POSITIONS}")

    @property
    def uses_rope(self) -> bool:
        """Keys or queries are turned, so the model must have a rotation that can be."""
        return self.needs_rope or self.positions == "rerotated"

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        from lowtide.evaluation.optimizations.adapters.attention import listen

        if self.uses_rope:
            Rope.of(model, asked_by=self.spelled)
        handle = Handle(self.spelled)
        listen(handle, model)
        handle.replace(context.runtime, "policy", self)
        return handle

    def kept(self, prompt: Prompt) -> Tensor:
        """Return the entries that stay, ascending, (B, K, N)."""
        count = max(1, int(prompt.length * (1 - self.ratio)))
        best = self.scores(prompt, count).sort(dim=2, descending=True, stable=True).indices
        return best[..., :count].sort(2).values

    @abstractmethod
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        """Return how much each entry matters, (B, K, T); the best `count` stay."""


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Entries stay at random, in each head others: the control that every policy must beat."""

    name: ClassVar[str] = "kv.random"

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(prompt.seed * 1_000_003 + prompt.layer)
        return torch.rand(prompt.keys.shape[:3], generator=generator).to(prompt.keys.device)


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """The first entries and the last ones stay (StreamingLLM).

    Attributes:
        sink: How many of the first; never more than what stays in all.
    """

    name: ClassVar[str] = "kv.streaming"
    sink: int = 4

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        order = torch.arange(prompt.length, device=prompt.keys.device)
        score = torch.where(order < self.sink, 2 * prompt.length - order, order)
        return score.expand(prompt.keys.shape[:3])


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Entries with short keys stay (Devoto et al. 2024)."""

    name: ClassVar[str] = "kv.knorm"

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        return -prompt.keys.float().norm(dim=-1)


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(Policy):
    """Half of what stays are the last entries, half those that drew most attention (H2O)."""

    name: ClassVar[str] = "kv.h2o"
    needs_attention_weights = True

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        total = accumulated_attention(prompt.queries, prompt.keys, prompt.scaling)
        scores = per_key_head(total, prompt.keys.shape[1])
        scores[:, :, prompt.length - count // 2 :] = float("inf")
        return scores


@dataclass(frozen=True, kw_only=True)
class SnapKv(Policy):
    """The last entries stay, and those that they attend to, neighbours included (SnapKV).

    Attributes:
        window: How many last queries vote; never more than what stays in all.
        kernel: Votes are averaged over so many neighbours; odd.
    """

    name: ClassVar[str] = "kv.snapkv"
    needs_attention_weights = True
    window: int = 16
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.window > 0, "window", "above 0")
        self.check(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "odd and above 0")

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        window = min(self.window, count)
        weights = attention_weights(prompt.queries[:, :, -window:], prompt.keys, prompt.scaling)
        votes = weights[..., : prompt.length - window].mean(2)
        if votes.shape[-1]:
            votes = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)
        scores = per_key_head(votes, prompt.keys.shape[1])
        return F.pad(scores, (0, window), value=float("inf"))


@dataclass(frozen=True, kw_only=True)
class Tova(Policy):
    """Entries that the last token attends to stay, the same in all heads of a layer (TOVA)."""

    name: ClassVar[str] = "kv.tova"
    needs_attention_weights = True

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        weights = attention_weights(prompt.queries[:, :, -1:], prompt.keys, prompt.scaling)
        scores = weights[:, :, 0].mean(1, keepdim=True).expand(prompt.keys.shape[:3]).clone()
        scores[:, :, -1] = float("inf")
        return scores


@dataclass(frozen=True, kw_only=True)
class Expected(Policy):
    """Entries that future queries are expected to attend to stay (Expected Attention).

    Queries are taken as normal: their mean and covariance before rotation are those of the
    prompt's queries, and the rotation is averaged over positions behind the prompt. The expected
    attention to a key is then exp(mean k / sqrt(D) + k covariance k / 2D), and it is multiplied
    with the length of the value.

    Attributes:
        sink: The first entries, which always stay and whose queries are left out.
        future: How many positions behind the prompt are averaged over.
    """

    name: ClassVar[str] = "kv.expected"
    needs_rope = True
    sink: int = 4
    future: int = 512

    @override
    def scores(self, prompt: Prompt, count: int) -> Tensor:
        if prompt.rope is None or prompt.length <= self.sink:
            raise DataError(
                f"{self.spelled}: the prompt has {prompt.length} tokens; needed are more than the "
                f"{self.sink} that always stay"
            )
        rotation = self._mean_rotation(prompt)
        queries = prompt.rope.turn(prompt.queries, -prompt.positions[:, None])[:, :, self.sink :]
        queries = queries.float()
        mean = queries.mean(2)  # (B, H, D)
        centred = queries - mean.unsqueeze(2)
        covariance = centred.transpose(-1, -2) @ centred / queries.shape[2]
        mean = mean @ rotation.T
        covariance = rotation @ covariance @ rotation.T
        groups = prompt.queries.shape[1] // prompt.keys.shape[1]
        keys = prompt.keys[:, :, self.sink :].float().repeat_interleave(groups, 1)
        logits = (keys @ mean.unsqueeze(-1)).squeeze(-1) * prompt.scaling
        logits += ((keys @ covariance) * keys).sum(-1) * (prompt.scaling**2 / 2)
        expected = per_key_head(logits.softmax(-1), prompt.keys.shape[1])
        expected = expected * prompt.values[:, :, self.sink :].float().norm(dim=-1)
        return F.pad(expected, (self.sink, 0), value=float("inf"))

    def _mean_rotation(self, prompt: Prompt) -> Tensor:
        """Return the rotation averaged over the positions to come, (D, D)."""
        if prompt.rope is None:
            raise TypeError("needs_rope is True, so the layer was given a rotation")
        first = int(prompt.positions.max()) + 1
        cos, sin = prompt.rope.angles(torch.arange(first, first + self.future))
        same, cross = cos.mean(0).diag(), sin.mean(0).diag()
        top, bottom = torch.cat([same, -cross], 1), torch.cat([cross, same], 1)
        return torch.cat([top, bottom]).to(prompt.keys.device)
