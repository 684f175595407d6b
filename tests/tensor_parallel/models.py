"""Small models for the tests: Hugging Face decoders, a decoder of one's own, CoLA's layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.tensor_parallel.patterns import (
    LayerInputs,
    LayerPattern,
    ModelPattern,
    ModelShape,
    Projection,
)

VOCABULARY = 61
FAMILIES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "olmo": "Olmo",
    "stablelm": "StableLm",
}  # fmt: skip


def hugging_face(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny decoder of `family` in float32; `changes` go to its config."""
    transformers = pytest.importorskip("transformers")
    stem = FAMILIES.get(family, family)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # so that every part shows in the output
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "qwen3":
        sizes["head_dim"] = 8
    if family == "stablelm":  # by default 2 of the 8 columns of a head would turn
        sizes |= {"partial_rotary_factor": 0.5, "use_qkv_bias": True}
    config = getattr(transformers, f"{stem}Config")(**(sizes | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # biases and gains that are not 0 and 1
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
    return model.eval()


def in_float64(model: Any) -> Any:
    """Return `model` with float64 throughout: its own norms go through float32."""
    model.double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(path, norm)
        elif type(module).__name__ == "OlmoLayerNorm":
            norm = nn.LayerNorm(module.normalized_shape, elementwise_affine=False)
            model.set_submodule(path, norm)
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Return token ids, shape (batch, length)."""
    return torch.randint(
        0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


class ColaLayer(nn.Module):
    """Parameters and layout of the layer in CoLA's public code: inputs first."""

    def __init__(
        self, inputs: int, rank: int, outputs: int, activation: Any, *, bias: bool = False
    ) -> None:
        super().__init__()
        if activation is not None:
            self.lr_act = activation
        self.cola_a = nn.Parameter(torch.randn(inputs, rank) / 4)
        self.cola_b = nn.Parameter(torch.randn(rank, outputs) / 4)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        latent = x @ self.cola_a
        latent = self.lr_act(latent) if hasattr(self, "lr_act") else latent
        y = latent @ self.cola_b
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Two query heads of width 8 share one key and value head, in one fused projection."""

    heads, kv_heads, head_width = 4, 2, 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, self.heads * self.head_width, bias=False)
        self.key_value = nn.Linear(width, 2 * self.kv_heads * self.head_width, bias=False)
        self.output = nn.Linear(self.heads * self.head_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, -1, self.head_width).transpose(1, 2)
        k, v = (
            part.reshape(batch, length, -1, self.head_width).transpose(1, 2)
            for part in self.key_value(x).chunk(2, dim=-1)
        )
        q, k = (t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU with a fused gate and up."""

    inner = 40

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * self.inner, bias=False)
        self.down = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer, called with hidden states, cosines and sines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class SmallDecoder(nn.Module):
    """Somebody's own decoder with tied embeddings."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.unembedding = nn.Linear(width, VOCABULARY, bias=False)
        self.unembedding.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        angles = torch.arange(ids.shape[1])[:, None] / 100.0 ** torch.linspace(0, 1, 4)
        angles = torch.cat((angles, angles), dim=-1).to(x)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.unembedding(self.norm(x))


@dataclass(frozen=True, kw_only=True)
class SmallPattern(ModelPattern):
    """What somebody writes for that decoder."""

    def shape(self, model: Any) -> ModelShape:
        attention, feed_forward = model.blocks[0].attention, model.blocks[0].feed_forward
        return ModelShape(
            width=model.embedding.embedding_dim,
            layers=len(model.blocks),
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_width=attention.head_width,
            mlp_width=feed_forward.inner,
            vocabulary=model.embedding.num_embeddings,
            norm="rms",
            epsilon=model.norm.eps,
            mlp_activation="silu",
            is_tied=True,
            attention_scale=attention.head_width**-0.5,
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerInputs:
        hidden, cos, sin = args
        return LayerInputs(hidden=hidden, cos=cos, sin=sin)


SMALL = SmallPattern(
    name="small",
    classes=("SmallDecoder",),
    embedding="embedding",
    layers="blocks",
    final_norm="norm",
    head="unembedding",
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
