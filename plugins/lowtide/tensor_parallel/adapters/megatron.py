"""The bottleneck block as a layer of a Megatron-core GPT model (Megatron-core 0.16.1).

    model = GPTModel(config, bottleneck_layer_spec(rank=1024), ...)

Inside a pipeline stage the residual stream is ``[b, s, h/p]`` and a layer sends what a
`DecoderLayer` sends: 4 all-reduces of latents each way. `GPTModel` builds its embedding and its
output layer itself, for a whole width, and pipeline stages exchange a whole width too; so the
first layer of a stage keeps a slice of what it is given and the last one gathers. That is one
all-gather of h per token and stage in each direction, besides the all-reduce of h that
Megatron-core itself makes in the embedding (forward) and in the output layer (backward).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lowtide.core.errors import HostError, ModelError
from lowtide.tensor_parallel.adapters.megatron_checkpoint import sharded_state_dict
from lowtide.tensor_parallel.adapters.megatron_parts import LayerParts
from lowtide.tensor_parallel.adapters.megatron_settings import BottleneckSetting, check_config
from lowtide.tensor_parallel.decoder import DecoderLayer
from lowtide.tensor_parallel.group import TensorGroup, Traffic


def bottleneck_layer_spec(
    rank: int | None = None,
    *,
    attention_rank: int | None = None,
    mlp_rank: int | None = None,
    activation: str | None = None,
    keep_mlp_activation: bool = True,
    latent_bias: bool = False,
    activation_checkpointing: str | None = None,
    overlap_forward: bool = False,
    seed: int = 0,
) -> Any:
    """Return the spec of a low-rank layer for ``GPTModel(transformer_layer_spec=...)``.

    The sizes, the norm and its epsilon, biases, ``activation_func``, ``qk_layernorm`` and
    ``softmax_scale`` are those of the model's `TransformerConfig`. Factors are drawn with CoLA's
    standard deviation (arXiv 2502.10940), not by the config's ``init_method``. An attention mask
    is used as it is given; without one attention is causal.

    Args:
        rank: Of all projections, at most the width of their input.
        attention_rank: Of q, k, v and the output projection, in place of `rank`.
        mlp_rank: Of gate, up and down, in place of `rank`.
        activation: On the latents: "silu", "gelu", "gelu_tanh", "relu", "tanh" or None.
        keep_mlp_activation: False multiplies gate and up without ``activation_func``, as the
            public CoLA model does with an `activation` on the latents.
        latent_bias: Whether latents have a bias, the same on all ranks.
        activation_checkpointing: "none", "latents" or "sharded_latents"; None is "latents" under
            ``recompute_granularity="selective"``, else "none".
        overlap_forward: Whether halves of the batch take turns in each layer, so that messages are
            under way during computation; for micro-batches of two sequences or more.
        seed: Of the factors; they do not depend on the number of ranks.

    Returns:
        A ``megatron.core`` `ModuleSpec`.

    Raises:
        ConfigError: a rank is missing or below 1, or a name is unknown.
        HostError: Megatron-core is missing.

    Note:
        What the `TransformerConfig` asks for and the layer cannot do is refused with a `ModelError`
        when the model is built.
    """
    setting = BottleneckSetting(
        attention_rank=rank if attention_rank is None else attention_rank,  # type: ignore[arg-type]
        mlp_rank=rank if mlp_rank is None else mlp_rank,  # type: ignore[arg-type]
        activation=activation,
        keeps_mlp_activation=keep_mlp_activation,
        latent_bias=latent_bias,
        tier=activation_checkpointing,
        overlaps_forward=overlap_forward,
        seed=seed,
    )
    module = layer_class()
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=module, params={"setting": setting})


def traffic(model: nn.Module) -> Traffic:
    """Return what the bottleneck layers of `model` have sent on this rank, in sum."""
    total = Traffic()
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            sent = layer.group.traffic
            for key, count in sent.messages.items():
                total.messages[key] = total.messages.get(key, 0) + count
                total.payload_bytes[key] = total.payload_bytes.get(key, 0) + sent.payload_bytes[key]
    return total


@functools.cache
def layer_class() -> type:
    """Return the layer's class, a ``megatron.core`` `BaseTransformerLayer`.

    Raises:
        HostError: Megatron-core is missing.
    """
    try:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.module import MegatronModule
        from megatron.core.transformer.transformer_layer import BaseTransformerLayer
    except ImportError as error:
        raise HostError(f"megatron-core cannot be imported: {error}") from error

    class BottleneckTransformerLayer(MegatronModule, BaseTransformerLayer):
        """See `bottleneck_layer_spec`. Parameters are those of `TransformerLayer`."""

        def __init__(
            self,
            config: Any,
            setting: BottleneckSetting,
            layer_number: int = 1,
            pg_collection: Any = None,
            vp_stage: int | None = None,
        ) -> None:
            super().__init__(config=config)
            check_config(config)
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
            self.tp_group = groups.tp
            self.group = TensorGroup(groups.tp if groups.tp.size() > 1 else None)
            before, count = _stage(config, vp_stage, groups.pp.rank())
            self.is_first, self.is_last = layer_number == 1, layer_number == count
            self.layer_number = layer_number + before
            self.block = LayerParts(setting, config, self.group, self.layer_number - 1).layer()

        def forward(
            self,
            hidden_states: Tensor,
            attention_mask: Tensor | None = None,
            context: Tensor | None = None,
            rotary_pos_emb: Tensor | None = None,
            **others: Any,
        ) -> tuple[Tensor, Tensor | None]:
            _refuse(self.layer_number, context=context, **others)
            x = hidden_states
            if self.is_first:
                x = _Enter.apply(x, self.group)
            cos, sin = _rotary(rotary_pos_emb, self.config)
            mask = None if attention_mask is None else ~attention_mask
            x = self.block(hidden=x, cos=cos, sin=sin, attention_mask=mask)
            return (_Leave.apply(x, self.group) if self.is_last else x), context

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            return sharded_state_dict(self, prefix, tuple(sharded_offsets), metadata, self.tp_group)

    return BottleneckTransformerLayer


def _stage(config: Any, vp_stage: int | None, stage: int) -> tuple[int, int]:
    """Return how many layers stand before this pipeline stage, and how many it has."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    before = get_transformer_layer_offset(config, vp_stage, stage)
    return before, get_num_layers_to_build(config, vp_stage, stage)


_CANNOT = {
    "context": "cross-attention",
    "context_mask": "cross-attention",
    "attention_bias": "a bias on the scores",
    "inference_context": "cached keys and values; call the model on whole sequences",
    "inference_params": "cached keys and values; call the model on whole sequences",
    "packed_seq_params": "packed sequences; pass an attention mask",
}


def _refuse(number: int, **given: Any) -> None:
    for name, why in _CANNOT.items():
        if given.get(name) is not None:
            raise ModelError(
                f"decoder.layers.{number - 1}: was called with {name}, and bottleneck layers do "
                f"not support {why}"
            )


def _rotary(angles: Any, config: Any) -> tuple[Any, Any]:
    """Return cosines and sines, ``[1 or b, s, R]``, of Megatron-core's angles.

    They are ``[s, 1 or b, 1, R]``, the second half of R repeating the first; R of each head turn.

    Raises:
        ModelError: more than a head would turn, or queries and keys have different angles.
    """
    if angles is None:
        return None, None
    if not isinstance(angles, Tensor) or angles.shape[-1] > config.kv_channels:
        found = tuple(angles.shape) if isinstance(angles, Tensor) else type(angles).__name__
        raise ModelError(
            f"rotary_pos_emb: got {found}, allowed with bottleneck layers is one tensor of shape "
            f"(s, 1, 1, R), R at most {config.kv_channels}: the same angles for queries and keys"
        )
    by_batch = angles.squeeze(2).transpose(0, 1)
    return by_batch.cos(), by_batch.sin()


class _Enter(Function):
    """From the whole width, tokens first, to this rank's part of it, batch first.

    The embedding, or the stage before, holds one whole gradient per rank: it is gathered.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _mine(x, group)

    @staticmethod
    def backward(ctx: Any, d_mine: Tensor) -> Any:
        return _whole(d_mine, ctx.group, "backward"), None


class _Leave(Function):
    """From this rank's part of the width to the whole.

    What follows computes alike on all ranks, and its gradient is complete when it comes back (the
    output layer sums its own), so each rank keeps its part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return _whole(x, group, "forward")

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> Any:
        return _mine(d_whole, ctx.group), None


def _mine(whole: Tensor, group: TensorGroup) -> Tensor:
    """``[s, b, p n]`` to ``[b, s, n]``."""
    part = whole[..., group.slice_of(whole.shape[-1])]
    return part.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _whole(mine: Tensor, group: TensorGroup, phase: str) -> Tensor:
    """``[b, s, n]`` to ``[s, b, p n]``: a tensor of its own, which pipeline schedules may free."""
    by_rank = group.gather_rows(mine.unsqueeze(0), phase=phase)
    size, batch, length, width = by_rank.shape
    whole = mine.new_empty((length, batch, size * width))
    whole.view(length, batch, size, width).copy_(by_rank.permute(2, 1, 0, 3))
    return whole
