"""How the cache sees queries: through transformers' registries of attention and of caches.

No modelling code is touched. A model listens when its configuration names `NAME` as its attention
implementation, which is transformers' scaled dot product attention followed by a call to the
cache layer that the keys come from.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.core.errors import DataError, ModelError
from lowtide.evaluation.optimizations.base import Handle, Runtime
from lowtide.evaluation.optimizations.blocks import blocks_of
from lowtide.evaluation.optimizations.cache.layer import TAG, CompressedLayer, Meter
from lowtide.evaluation.optimizations.cache.rope import Rope

NAME = "lowtide"


def listen(handle: Handle, model: nn.Module) -> None:
    """Let `model` call the cache after each attention, until `handle` is undone.

    Raises:
        ModelError: The model attends in a way that the cache cannot follow.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation"):
        raise ModelError(
            f"{type(model).__name__} is no transformers model; methods that act on the key-value "
            f"cache need one, for its Cache and attention interfaces"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ModelError(
            f"{type(model).__name__} has layers of the kinds {sorted(kinds)}; methods that act on "
            f"the key-value cache take full attention only"
        )
    _register()
    if config._attn_implementation != NAME:
        handle.replace(config, "_attn_implementation", NAME)


def new_cache(
    model: nn.Module, runtime: Runtime, *, records: bool = False, seed: int = 0
) -> tuple[Any, Meter]:
    """Return an empty transformers Cache for `model`, and what measures it.

    Args:
        model: A transformers model.
        runtime: What happens to the entries. Without policy and quantiser they all stay.
        records: Keep which entries were chosen; costs memory that is not counted.
        seed: Of policies that draw at random.
    """
    from transformers.cache_utils import Cache

    _register()
    policy = runtime.policy
    rope = Rope.of(model, asked_by=policy.spelled) if policy and policy.uses_rope else None
    meter = Meter()
    layers: Any = [
        CompressedLayer(runtime, meter, rope, records=records, seed=seed) for _ in blocks_of(model)
    ]
    return Cache(layers=layers), meter


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import CacheLayerMixin
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        asked, held = query.shape[2], key.shape[2]
        if asked > 1 and held > asked:  # new tokens see all that is held, and one another causally
            attention_mask = torch.ones(asked, held, dtype=torch.bool, device=key.device)
            attention_mask = attention_mask.tril(held - asked)[None, None]
        result = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        layer = getattr(key, TAG, None)
        if layer is not None:
            layer.attended(query, kwargs.get("position_ids"), kwargs["scaling"])
        return result

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    CacheLayerMixin.register(CompressedLayer)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Leave the mask to the attention function; refuse padding, which entries do not carry."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise DataError(
            "the attention mask hides tokens (padding); the compressed cache takes sequences of "
            "one length, so batch prompts by length"
        )
