"""Where the decoder of `model` keeps its parts, so that `tensor_parallel` can convert it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model import Decoder
from torch import Tensor

from lowtide.tensor_parallel import (
    LayerInputs,
    LayerPattern,
    ModelPattern,
    ModelShape,
    Projection,
)


@dataclass(frozen=True, kw_only=True)
class PretrainPattern(ModelPattern):
    """The parts, sizes and calls of `model.Decoder`."""

    def shape(self, model: Any) -> ModelShape:
        """Return its sizes."""
        config = model.config
        return ModelShape(
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            mlp_width=config.inner_width,
            vocabulary=config.vocabulary,
            norm="rms",
            epsilon=config.norm_epsilon,
            mlp_activation="silu",
            is_tied=config.tied_embeddings,
            attention_scale=config.head_width**-0.5,
        )

    def bind(self, args: Sequence[Any], _kwargs: Mapping[str, Any]) -> LayerInputs:
        """Name what `Block.forward` is called with."""
        hidden, cos, sin = args
        return LayerInputs(hidden=hidden, cos=cos, sin=sin)

    def computes_loss(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether targets are given."""
        return len(args) > 1 or kwargs.get("targets_BT") is not None

    def set_loss(self, model: Any, function: Callable[..., Tensor]) -> Callable[[], None]:
        """Replace `Decoder.loss` in one model; targets are shifted already."""
        # No closure: a deep copy of the model gets a copy of a partial, and of what is in it.
        model.loss = functools.partial(_loss, function)
        return lambda: delattr(model, "loss")


def _loss(function: Callable[..., Tensor], logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return function(logits=logits_BTV, shift_labels=targets_BT)


PRETRAIN = PretrainPattern(
    name="pretrain example",
    classes=(Decoder.__name__,),
    embedding="embedding",
    layers="blocks",
    final_norm="norm",
    head="unembedding",
    gives_logits=False,
    layer=LayerPattern(
        attention_norm="attention_norm",
        attention_inputs=(
            Projection("attention.query", ("q",)),
            Projection("attention.key_value", ("k", "v")),
        ),
        attention_output=Projection("attention.output", ("o",)),
        mlp_norm="feed_forward_norm",
        mlp_inputs=(Projection("feed_forward.gate_up", ("gate", "up")),),
        mlp_output=Projection("feed_forward.down", ("down",)),
    ),
)
