"""Tokens that stop being computed in the middle of the model while a prompt is read.

Source: Fu et al., LazyLLM (2407.14057), Sec. 3. Here there is one cut, at one layer, and tokens
that were left out are not revived when tokens are generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.blocks import blocks_of
from lowtide.evaluation.optimizations.cache.policies import Prompt
from lowtide.evaluation.optimizations.cache.scores import attention_weights


@dataclass(frozen=True, kw_only=True)
class TokenSkipping(Optimization):
    """From one layer on, only tokens that the last one attends to are computed.

    Attributes:
        ratio: The part of the prompt's tokens that is left out.
        layer: The first layer that does without them; 1 or more.
    """

    name: ClassVar[str] = "prefill.lazy"
    stage = "prefill"
    needs_attention_weights = True
    positional = ("ratio",)
    ratio: float
    layer: int = 1

    def __post_init__(self) -> None:
        self.check(0 <= self.ratio < 1, "ratio", "from 0 to below 1")
        self.check(self.layer >= 1, "layer", "1 or more")

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        from lowtide.evaluation.optimizations.adapters.attention import listen

        blocks = blocks_of(model)
        self.check(self.layer < len(blocks), "layer", f"below the {len(blocks)} layers there are")
        handle = Handle(self.spelled)
        listen(handle, model)
        handle.replace(context.runtime, "skipping", self)
        for index in range(self.layer, len(blocks)):
            hook = blocks[index].register_forward_pre_hook(self._select, with_kwargs=True)
            handle.on_undo(hook.remove)
        return handle

    def kept(self, prompt: Prompt) -> Tensor:
        """Return the tokens that go on, ascending, (B, n); the last one is always among them."""
        count = max(1, int(prompt.length * (1 - self.ratio)))
        weights = attention_weights(prompt.queries[:, :, -1:], prompt.keys, prompt.scaling)
        score = weights[:, :, 0].mean(1)
        score[:, -1] = float("inf")
        best = score.sort(dim=1, descending=True, stable=True).indices
        return best[:, :count].sort(1).values

    def _select(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        cache = kwargs.get("past_key_values")
        decider = getattr(cache, "layers", [None] * self.layer)[self.layer - 1]
        index: Tensor | None = getattr(decider, "skipped_to", None)
        if index is None or decider.is_answering:
            return args, kwargs
        (hidden, *rest), kwargs = args, dict(kwargs)
        length = kwargs["position_ids"].shape[1]
        if hidden.shape[1] == length:  # the first block behind the cut: later ones get few tokens
            hidden = take(hidden, index)
        kwargs["position_ids"] = take(kwargs["position_ids"], index)
        kwargs["position_embeddings"] = tuple(take(x, index) for x in kwargs["position_embeddings"])
        return (hidden, *rest), kwargs


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens `index`, (B, n), of `x`, (B or 1, T, ...)."""
    rows = torch.arange(index.shape[0], device=x.device)[:, None]
    return x.expand(index.shape[0], *x.shape[1:])[rows, index]
