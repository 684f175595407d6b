"""Patterns of Hugging Face decoders (transformers 5): Llama, Mistral, Qwen 2 and 3, OLMo, StableLM.

Nothing here imports transformers: a model that arrives has imported it already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.norms import NormKind
from lowtide.tensor_parallel.patterns import (
    LayerInputs,
    LayerPattern,
    ModelPattern,
    ModelShape,
    Projection,
    Undo,
)
from lowtide.tensor_parallel.recognise import activation_name

_OUTPUTS = ("output_hidden_states", "output_attentions")
# In the order of a model's forward.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_DENSE_MASKS = ("sdpa", "eager", None)
# Of some families: what their layers would do besides, by the config's name for it.
_NOT_THERE: tuple[tuple[str, Any, str], ...] = (
    ("clip_qkv", None, "clamped queries, keys and values"),
    ("qk_layernorm", False, "a LayerNorm of each head's own"),
    ("use_parallel_residual", False, "attention and feed-forward block side by side"),
)


@dataclass(frozen=True, kw_only=True)
class HuggingFacePattern(ModelPattern):
    """A decoder whose modules are named as in Llama.

    Attributes:
        norm: Kind of the norms over the model width.
        epsilon: Of these norms: the config's name for it, or the number itself.

    A sliding window needs nothing here: it is part of the dense mask that the model gives its
    layers. Scaled rotary embeddings need nothing either, since cosines and sines come from the
    model.
    """

    norm: NormKind = "rms"
    epsilon: str | float = "rms_norm_eps"

    def shape(self, model: nn.Module) -> ModelShape:
        """Return the sizes of `model`.

        Raises:
            ModelError: Dropout, ``pretraining_tp`` above 1, clamped or layer-normed queries,
                parallel attention and feed-forward, gradient checkpointing of transformers, an
                attention implementation without dense masks, or an unknown activation.
        """
        config: Any = model.config
        self._refuse(model, config)
        layers = model.get_submodule(self.layers)
        first = layers.get_submodule("0")
        embedding: Any = model.get_submodule(self.embedding)
        head: Any = model.get_submodule(self.head)
        path, epsilon = str(self.layer.mlp_activation), self.epsilon
        head_width = getattr(config, "head_dim", None)
        head_width = head_width or config.hidden_size // config.num_attention_heads
        return ModelShape(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=head_width,
            mlp_width=config.intermediate_size,
            vocabulary=embedding.num_embeddings,  # what resize_token_embeddings left
            norm=self.norm,
            epsilon=getattr(config, epsilon) if isinstance(epsilon, str) else epsilon,
            mlp_activation=activation_name(first.get_submodule(path), f"{self.layers}.0.{path}"),
            is_tied=head.weight is embedding.weight,
            attention_scale=head_width**-0.5,
        )

    def _refuse(self, model: nn.Module, config: Any) -> None:
        where = type(model).__name__
        for name in ("attention_dropout", "hidden_dropout"):
            dropout = getattr(config, name, 0.0)
            if dropout:
                raise ModelError(
                    f"{where}: config.{name} is {dropout}, allowed is 0: the ranks share no random "
                    f"numbers for it; set it to 0"
                )
        for name, allowed, what in _NOT_THERE:
            found = getattr(config, name, allowed)
            if found != allowed:
                raise ModelError(
                    f"{where}: config.{name} is {found}, and {what} cannot be spread over ranks; "
                    f"allowed are models with {allowed}"
                )
        slices = getattr(config, "pretraining_tp", 1)
        if slices not in (None, 1):
            raise ModelError(
                f"{where}: config.pretraining_tp is {slices}, allowed is 1; set it to 1, the "
                f"function stays the same"
            )
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ModelError(
                f"{where}: gradient checkpointing of transformers is on, and the layers that do it "
                f"are replaced; leave it off and set "
                f'lowtide.tensor_parallel.activation_checkpointing to "latents"'
            )
        kind = getattr(config, "_attn_implementation", None)
        if kind not in _DENSE_MASKS:
            raise ModelError(
                f'{where}: attn_implementation is "{kind}", whose masks are not dense tensors; '
                f'load the model with attn_implementation="sdpa"'
            )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerInputs:
        """Return the arguments of a decoder layer's forward by name.

        Raises:
            ModelError: There are no position embeddings, the mask is not a dense tensor, or hidden
                states or attentions are asked for.
        """
        given = dict(zip(("hidden_states", "attention_mask"), args, strict=False)) | dict(kwargs)
        mask, positions = given.get("attention_mask"), given.get("position_embeddings")
        if positions is None:
            raise ModelError(
                f"{self.name}: a decoder layer was called without position_embeddings (cos, sin); "
                f"transformers 5 always passes them"
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise ModelError(
                f"{self.name}: a decoder layer got an attention mask of type "
                f"{type(mask).__name__}, allowed are None and tensors of shape (B, 1, T, S); load "
                f'the model with attn_implementation="sdpa"'
            )
        self._refuse_outputs(given)
        cos, sin = positions
        return LayerInputs(
            hidden=given["hidden_states"],
            cos=cos,
            sin=sin,
            attention_mask=mask,
            cache=given.get("past_key_values"),
        )

    def _refuse_outputs(self, given: Mapping[str, Any]) -> None:
        for name in _OUTPUTS:
            if given.get(name):
                raise ModelError(
                    f"{self.name}: {name} is set, but hidden states and attentions are spread over "
                    f"the ranks and are not returned; leave it off"
                )

    def check_call(self, model: Any, _args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse outputs that the model's config asks for.

        Raises:
            ModelError: See `bind`, which sees what is asked for by argument.
        """
        asked = {name: getattr(model.config, name, False) for name in _OUTPUTS}
        self._refuse_outputs(asked | {name: kwargs[name] for name in _OUTPUTS if name in kwargs})

    def inputs_of_call(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Mapping[str, Tensor | None]:
        """Return tokens or embeddings, mask and positions."""
        given = dict(zip(_INPUTS, args, strict=False)) | dict(kwargs)
        found = {name: given.get(name) for name in _INPUTS if name != "past_key_values"}
        return {name: each if isinstance(each, Tensor) else None for name, each in found.items()}

    def inputs_of_layers(self, model: nn.Module) -> Callable[[Tensor], LayerInputs]:
        """Return what makes a decoder layer's inputs, with the model's own rotary embedding."""
        parent = self.layers.rpartition(".")[0]
        rotary = copy.deepcopy(model.get_submodule(f"{parent}.rotary_emb"))
        config: Any = model.config
        return _StageInputs(rotary, getattr(config, "sliding_window", None))

    def set_loss(self, model: Any, function: Callable[..., Tensor]) -> Undo | None:
        """Have `model` call ``function(logits=, labels=, vocab_size=, **kwargs)``.

        Labels are not shifted yet: position t of the logits belongs to label t + 1.
        """
        before = model.__dict__.get("_loss_function")
        model.loss_function = function

        def undo() -> None:
            del model._loss_function
            if before is not None:
                model.loss_function = before

        return undo


class _StageInputs:
    """Inputs of decoder layers that stand alone; the rotary tables are computed once per length."""

    def __init__(self, rotary: nn.Module, window: int | None) -> None:
        self._rotary = rotary
        self._window = window
        self._key: Any = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> LayerInputs:
        length = hidden.shape[-2]
        if self._window is not None and length > self._window:
            raise ModelError(
                f"lowtide.tensor_parallel: got {length} tokens, but the model attends to a sliding "
                f"window of {self._window}, which a pipeline has no mask for; allowed are "
                f"sequences of at most {self._window} tokens"
            )
        key = (length, hidden.dtype, hidden.device)
        if self._tables is None or key != self._key:
            positions = torch.arange(length, device=hidden.device).unsqueeze(0)
            with torch.no_grad():
                cos, sin = self._rotary.to(hidden.device)(hidden, positions)
            self._key, self._tables = key, (cos, sin)
        cos, sin = self._tables
        return LayerInputs(hidden=hidden, cos=cos, sin=sin)


_LAYER = LayerPattern(
    attention_norm="input_layernorm",
    attention_inputs=(
        Projection("self_attn.q_proj", ("q",)),
        Projection("self_attn.k_proj", ("k",)),
        Projection("self_attn.v_proj", ("v",)),
    ),
    attention_output=Projection("self_attn.o_proj", ("o",)),
    mlp_norm="post_attention_layernorm",
    mlp_inputs=(
        Projection("mlp.gate_proj", ("gate",)),
        Projection("mlp.up_proj", ("up",)),
    ),
    mlp_output=Projection("mlp.down_proj", ("down",)),
    mlp_activation="mlp.act_fn",
)

LLAMA = HuggingFacePattern(
    name="llama",
    classes=("LlamaForCausalLM",),
    embedding="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    layer=_LAYER,
)
MISTRAL = replace(LLAMA, name="mistral", classes=("MistralForCausalLM",))
QWEN2 = replace(LLAMA, name="qwen2", classes=("Qwen2ForCausalLM",))
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    layer=replace(_LAYER, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
)
# Its norms have no parameters, and their epsilon stands in the code.
OLMO = replace(LLAMA, name="olmo", classes=("OlmoForCausalLM",), norm="layer", epsilon=1e-5)
STABLELM = replace(
    LLAMA,
    name="stablelm",
    classes=("StableLmForCausalLM",),
    norm="layer",
    epsilon="layer_norm_eps",
)
PATTERNS: tuple[ModelPattern, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO, STABLELM)
