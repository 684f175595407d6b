"""Builds one rank's share of one Megatron-core layer, from random factors.

Every factor is drawn whole, from a generator that is seeded by the seed and the factor's global
name, and then cut: the model is the same for every number of tensor-parallel ranks and stages.

Names of the whole tensors, relative to ``decoder.layers.<index>.``: ``input_layernorm.weight``,
``self_attention.linear_q`` (k, v, proj), ``pre_mlp_layernorm.weight``, ``mlp.linear_gate`` (up,
down), each linear as ``down.weight`` (A), ``up.weight`` (B), ``down.bias``, ``up.bias``. LayerNorms
have a ``bias`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.adapters.megatron_settings import (
    BottleneckSetting,
    LayerSizes,
    tier_of,
)
from lowtide.tensor_parallel.bottleneck import ACTIVATIONS
from lowtide.tensor_parallel.decoder import AttentionSetting, Bottleneck, DecoderLayer, HeadNorms
from lowtide.tensor_parallel.factors import random_factors
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import (
    DownProjection,
    Part,
    Sharded,
    UpProjection,
)
from lowtide.tensor_parallel.norms import NormKind, NormSetting
from lowtide.tensor_parallel.patterns import LayerInputs


class LayerParts:
    """Builds the modules of one layer.

    Args:
        setting: What was asked for.
        config: Megatron-core's `TransformerConfig`.
        group: The tensor-parallel ranks.
        index: Of the layer in the whole model, from 0.
    """

    def __init__(
        self, setting: BottleneckSetting, config: Any, group: TensorGroup, index: int
    ) -> None:
        self.setting = setting
        self.config = config
        self.group = group
        self.index = index
        self.sizes = LayerSizes.of(config, group.size)
        kind: NormKind = "layer" if config.normalization == "LayerNorm" else "rms"
        self.norm = NormSetting(self.sizes.width, config.layernorm_epsilon, kind)
        self.place = {
            "dtype": config.params_dtype,
            "device": "cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
        }

    def layer(self) -> DecoderLayer:
        """Return the layer; its hidden states are ``[b, s, n]``."""
        sizes, setting, config = self.sizes, self.setting, self.config
        heads = sizes.heads * sizes.head_width
        kv = sizes.kv_heads * sizes.head_width
        has_bias = config.add_bias_linear
        qkv = {"q": heads, "k": kv, "v": kv}
        attention, mlp = setting.attention_rank, setting.mlp_rank
        layer = DecoderLayer(
            self.group,
            attention_in=self._bottleneck(
                {f"self_attention.linear_{role}": rows for role, rows in qkv.items()},
                sizes.width, attention, has_bias or config.add_qkv_bias, "input_layernorm",
            ),
            attention_out=self._bottleneck(
                {"self_attention.linear_proj": sizes.width}, heads, attention, has_bias
            ),
            mlp_in=self._bottleneck(
                {f"mlp.linear_{role}": sizes.mlp_width for role in ("gate", "up")},
                sizes.width, mlp, has_bias, "pre_mlp_layernorm",
            ),
            mlp_out=self._bottleneck(
                {"mlp.linear_down": sizes.width}, sizes.mlp_width, mlp, has_bias
            ),
            attention=AttentionSetting(sizes.head_width, config.softmax_scale),
            mlp_activation=config.activation_func if setting.keeps_mlp_activation else None,
            bind=_bind,
            head_norms=self._head_norms() if config.qk_layernorm else None,
            tier=tier_of(setting, config),
            overlaps_forward=setting.overlaps_forward,
            layer_index=self.index,
        )  # fmt: skip
        _mark(layer)
        return layer

    def _bottleneck(
        self, rows: dict[str, int], columns: int, rank: int, has_bias: bool, norm: str | None = None
    ) -> Bottleneck:
        group, names = self.group, list(rows)
        if rank > columns:
            raise ModelError(
                f"decoder.layers.{self.index}.{names[0]}: rank {rank} exceeds the input width "
                f"{columns}, so a full matrix would be smaller; choose a rank of at most {columns}"
            )
        local = [each // group.size for each in rows.values()]
        begins = [sum(local[:i]) for i in range(len(local) + 1)]
        of_rank = [slice(i * rank, (i + 1) * rank) for i in range(len(names))]
        of_rows = [slice(begins[i], begins[i + 1]) for i in range(len(names))]
        named = list(zip(names, rows.values(), of_rank, of_rows, strict=True))
        a_parts = [Part(f"{name}.down.weight", at, (columns,), 1) for name, _, at, _ in named]
        b_parts = [Part(f"{name}.up.weight", at, (length,), 0) for name, length, _, at in named]
        a_cut, b_cut = self._factors(names, rows, columns, rank, (a_parts, b_parts))
        biases = [Part(f"{name}.up.bias", at, (length,), 0) for name, length, _, at in named]
        latents = [Part(f"{name}.down.bias", at, (rank,), None) for name, _, at, _ in named]
        has_latent_bias = self.setting.latent_bias
        activation = self.setting.activation
        of_norm = None if norm is None else self.norm
        parameters: list[Any] = []  # gain and bias of the norm, each with where it comes from
        if norm is not None:
            local_width = columns // group.size
            parameters = [
                torch.ones(local_width, **self.place),
                Part(f"{norm}.weight", slice(None), (columns,), 0),
            ]
            if self.norm.is_centred:
                parameters += [
                    torch.zeros(local_width, **self.place),
                    Part(f"{norm}.bias", slice(None), (columns,), 0),
                ]
        up = UpProjection(
            group, b_cut, b_parts, local,
            latent_bias=torch.zeros(rank * len(names), **self.place) if has_latent_bias else None,
            latent_bias_parts=latents if has_latent_bias else (),
            bias=torch.zeros(begins[-1], **self.place) if has_bias else None,
            bias_parts=biases if has_bias else (),
            norm=of_norm,
            activation=None if activation is None else ACTIVATIONS[activation],
        )  # fmt: skip
        down = DownProjection(group, a_cut, a_parts, of_norm, *parameters)
        return Bottleneck(down, up)

    def _factors(
        self,
        names: Sequence[str],
        rows: dict[str, int],
        columns: int,
        rank: int,
        parts: tuple[Sequence[Part], Sequence[Part]],
    ) -> tuple[Tensor, Tensor]:
        down: list[Tensor] = []
        up: list[Tensor] = []
        for name, a_part, b_part in zip(names, *parts, strict=True):
            if self.config.perform_initialization:
                drawn = random_factors(
                    columns, rank, rows[name], seed=self.setting.seed,
                    name=f"decoder.layers.{self.index}.{name}", dtype=self.config.params_dtype,
                )  # fmt: skip
                whole = drawn.down, drawn.up
            else:  # a checkpoint fills them
                whole = torch.empty(rank, columns), torch.empty(rows[name], rank)
            down.append(a_part.cut(whole[0], self.group))
            up.append(b_part.cut(whole[1], self.group))
        return torch.cat(down).to(**self.place), torch.cat(up).to(**self.place)

    def _head_norms(self) -> HeadNorms:
        width = self.sizes.head_width
        parts = [
            Part(f"self_attention.{name}_layernorm.weight", slice(None), (width,), None)
            for name in ("q", "k")
        ]
        gains = (torch.ones(width, **self.place), torch.ones(width, **self.place))
        return HeadNorms(self.group, gains, (parts[0], parts[1]), self.config.layernorm_epsilon)


def _bind(_args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs:
    return LayerInputs(**kwargs)


def _mark(layer: nn.Module) -> None:
    """Tell Megatron-core which parameters differ between the ranks, by its own attributes.

    Its gradient norm counts the others on the first rank alone; none of them is summed again by
    `finalize_model_grads`, because what reaches them is complete.
    """
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    for module in layer.modules():
        if not isinstance(module, Sharded):
            continue
        for name, parts in module.parts.items():
            parameter: Any = getattr(module, name)
            del parameter.tensor_model_parallel  # set again, with what belongs to it
            dim = parts[0].dim
            is_spread = dim is not None
            set_tensor_model_parallel_attributes(parameter, is_spread, dim if is_spread else -1, 1)
            parameter.sequence_parallel = False
