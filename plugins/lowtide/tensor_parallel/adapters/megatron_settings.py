"""What a bottleneck layer is asked for, and what of Megatron-core's `TransformerConfig` it can do.

Nothing here imports Megatron-core: a config that arrives has imported it already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowtide.core.errors import ConfigError, ModelError, listed, near
from lowtide.tensor_parallel.bottleneck import activation_function
from lowtide.tensor_parallel.recompute import TIERS

_NOT_THERE = "a bottleneck layer does not have it"
_SPREAD = "the residual stream is spread over its width, not over tokens"
_REQUIRED: tuple[tuple[str, Any, str], ...] = (
    ("gated_linear_unit", True, "the feed-forward block multiplies gate and up"),
    ("hidden_dropout", 0.0, _NOT_THERE),
    ("attention_dropout", 0.0, _NOT_THERE),
    ("sequence_parallel", False, _SPREAD),
    ("context_parallel_size", 1, "attention needs all tokens of a sequence on every rank"),
    ("num_moe_experts", None, _NOT_THERE),
    ("multi_latent_attention", False, _NOT_THERE),
    ("experimental_attention_variant", None, _NOT_THERE),
    ("linear_attention_freq", None, _NOT_THERE),
    ("window_size", None, "pass the window in the attention mask"),
    ("softmax_type", "vanilla", _NOT_THERE),
    ("attention_output_gate", False, _NOT_THERE),
    ("qk_l2_norm", False, "use qk_layernorm"),
    ("qk_clip", False, _NOT_THERE),
    ("log_max_attention_logit", False, "the scores are never formed"),
    ("no_rope_freq", None, _NOT_THERE),
    ("rotary_interleaved", False, "pairs are half a head apart"),
    ("layernorm_zero_centered_gamma", False, _NOT_THERE),
    ("apply_residual_connection_post_layernorm", False, _NOT_THERE),
    ("fp32_residual_connection", False, "the residual stream has the parameters' dtype"),
    ("glu_linear_offset", 0.0, _NOT_THERE),
    ("activation_func_clamp_value", None, _NOT_THERE),
    ("activation_func_fp8_input_store", False, _NOT_THERE),
    ("mtp_num_layers", None, "its layers would be built from another spec"),
    ("heterogeneous_block_specs", False, "all layers have one shape"),
    ("fp8", None, _NOT_THERE),
    ("fp4", None, _NOT_THERE),
    ("cuda_graph_impl", "none", _NOT_THERE),
    ("cpu_offloading", False, _NOT_THERE),
    ("fine_grained_activation_offloading", False, _NOT_THERE),
    ("inference_fuse_tp_communication", False, _NOT_THERE),
    ("init_model_with_meta_device", False, "factors are drawn whole and then cut"),
)


@dataclass(frozen=True, kw_only=True)
class BottleneckSetting:
    """What `bottleneck_layer_spec` was given.

    Attributes:
        attention_rank: Of q, k, v and the output projection.
        mlp_rank: Of gate, up and down.
        activation: On the latents, a name from `bottleneck.ACTIVATIONS`, or None.
        keeps_mlp_activation: Whether the config's ``activation_func`` stands on the gate.
        latent_bias: Whether there is a bias on the latents.
        tier: Of activation checkpointing, or None: by the config's ``recompute_granularity``.
        overlaps_forward: Whether halves of the batch take turns in each layer.
        seed: Of the factors.

    Raises:
        ConfigError: a rank is below 1, or a name is unknown.
    """

    attention_rank: int
    mlp_rank: int
    activation: str | None = None
    keeps_mlp_activation: bool = True
    latent_bias: bool = False
    tier: str | None = None
    overlaps_forward: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("attention_rank", "mlp_rank"):
            rank = getattr(self, name)
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(
                    f"bottleneck_layer_spec: {name} is {rank!r}, allowed is a whole number from 1; "
                    f"give rank, or both attention_rank and mlp_rank"
                )
        activation_function(self.activation)  # an unknown name fails here
        if self.tier is not None and self.tier not in TIERS:
            raise ConfigError(
                f'bottleneck_layer_spec: activation_checkpointing is "{self.tier}", allowed are '
                f"{listed(TIERS)} and None for what recompute_granularity says."
                f"{near(self.tier, TIERS)}"
            )


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer, all ranks together.

    Attributes:
        width: d.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_width: K.
        mlp_width: f.
    """

    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int

    @classmethod
    def of(cls, config: Any, ranks: int) -> LayerSizes:
        """Read the sizes from a `TransformerConfig`.

        Args:
            config: The config.
            ranks: Tensor-parallel ranks, p.

        Raises:
            ModelError: something does not divide by p.
        """
        for name in ("hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"):
            length = getattr(config, name)
            if length % ranks:
                raise ModelError(
                    f"TransformerConfig.{name}: got {length}, which {ranks} tensor-parallel ranks "
                    f"do not divide; change it or tensor_model_parallel_size"
                )
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
            config.ffn_hidden_size,
        )


def check_config(config: Any) -> None:
    """Refuse what a bottleneck layer would otherwise silently leave out.

    Args:
        config: Megatron-core's `TransformerConfig`.

    Raises:
        ModelError: names the field.
    """
    for name, required, why in _REQUIRED:
        found = getattr(config, name, required)
        if found != required:
            raise ModelError(
                f"TransformerConfig.{name}: got {found!r}, allowed with bottleneck layers is "
                f"{required!r} ({why}); change it, or use Megatron-core's own layer spec"
            )
    if config.normalization not in ("RMSNorm", "LayerNorm"):
        raise ModelError(
            f"TransformerConfig.normalization: got {config.normalization!r}, allowed with "
            f"bottleneck layers are 'RMSNorm' and 'LayerNorm'; change it, or use Megatron-core's "
            f"own layer spec"
        )
    if config.normalization == "LayerNorm" and config.qk_layernorm:
        raise ModelError(
            "TransformerConfig.qk_layernorm: got True beside LayerNorm, which would make the norms "
            "of queries and keys LayerNorms too, and bottleneck layers have RMSNorm there; set "
            'normalization to "RMSNorm" or qk_layernorm to False'
        )
    if config.recompute_granularity == "full":
        raise ModelError(
            'TransformerConfig.recompute_granularity: got "full", which would repeat all messages '
            'of a layer; set it to "selective" or give bottleneck_layer_spec '
            'activation_checkpointing="latents"'
        )
    if hasattr(config, "yarn_rotary_scaling_factor"):
        raise ModelError(
            "TransformerConfig.yarn_rotary_scaling_factor: YaRN also scales the scores, which "
            'bottleneck layers do not; use position_embedding_type "rope"'
        )


def tier_of(setting: BottleneckSetting, config: Any) -> str:
    """Return the tier of activation checkpointing.

    Raises:
        ConfigError: it does not go with halves of the batch that take turns.
    """
    by_config = "latents" if config.recompute_granularity == "selective" else "none"
    tier = by_config if setting.tier is None else setting.tier
    if setting.overlaps_forward and tier != "none":
        raise ConfigError(
            f'bottleneck_layer_spec: overlap_forward goes with activation_checkpointing "none" '
            f'only, got "{tier}": each half would hand in its gradients for itself; leave one of '
            f"them out"
        )
    return tier
