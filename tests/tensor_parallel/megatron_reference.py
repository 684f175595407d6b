"""The Megatron-core model of the tests on one rank, in plain torch, and how ranks cut it.

Nothing of the sharded layers is used: factors come from `random_factors` by their global names,
what is cut and joined stands in `LAYOUT`, and the forward is written out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.tensor_parallel import BottleneckLinear
from lowtide.tensor_parallel.factors import random_factors

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD, MLP, VOCABULARY = 4, 32, 8, 4, 4, 48, 64
SEQUENCE, BATCH, EPSILON, SEED = 6, 3, 1e-3, 11
LABELS_SEED = 5

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {
        "spec": {"attention_rank": 8, "mlp_rank": 12, "overlap_forward": True},
        "config": {"add_bias_linear": False, "normalization": "LayerNorm"},
        "rotary_percent": 0.5,
        "forward": 8, "backward": 8,  # messages of a layer, twice as many for halves of the batch
    },
    "cola": {
        "spec": {
            "rank": 8, "activation": "silu", "keep_mlp_activation": False, "latent_bias": True,
            "activation_checkpointing": "latents",
        },
        "config": {"add_bias_linear": True, "qk_layernorm": True},
        "forward": 4, "backward": 5,  # and the gains of the head norms
    },
}  # fmt: skip

_LINEARS = {  # name: inputs, outputs, family
    "self_attention.linear_q": (WIDTH, HEADS * HEAD, "attention_rank"),
    "self_attention.linear_k": (WIDTH, KV_HEADS * HEAD, "attention_rank"),
    "self_attention.linear_v": (WIDTH, KV_HEADS * HEAD, "attention_rank"),
    "self_attention.linear_proj": (HEADS * HEAD, WIDTH, "attention_rank"),
    "mlp.linear_gate": (WIDTH, MLP, "mlp_rank"),
    "mlp.linear_up": (WIDTH, MLP, "mlp_rank"),
    "mlp.linear_down": (MLP, WIDTH, "mlp_rank"),
}
_GROUPS = {
    "attention_in": [f"self_attention.linear_{role}" for role in "qkv"],
    "attention_out": ["self_attention.linear_proj"],
    "mlp_in": ["mlp.linear_gate", "mlp.linear_up"],
    "mlp_out": ["mlp.linear_down"],
}


def _layout() -> dict[str, tuple[list[str], int | None]]:
    layout: dict[str, tuple[list[str], int | None]] = {
        "attention_in.down.gain": (["input_layernorm.weight"], 0),
        "mlp_in.down.gain": (["pre_mlp_layernorm.weight"], 0),
        "attention_in.down.norm_bias": (["input_layernorm.bias"], 0),
        "mlp_in.down.norm_bias": (["pre_mlp_layernorm.bias"], 0),
        "head_norms.query_gain": (["self_attention.q_layernorm.weight"], None),
        "head_norms.key_gain": (["self_attention.k_layernorm.weight"], None),
    }
    for group, names in _GROUPS.items():
        layout[f"{group}.down.weight"] = ([f"{name}.down.weight" for name in names], 1)
        layout[f"{group}.up.weight"] = ([f"{name}.up.weight" for name in names], 0)
        layout[f"{group}.up.latent_bias"] = ([f"{name}.down.bias" for name in names], None)
        layout[f"{group}.up.bias"] = ([f"{name}.up.bias" for name in names], 0)
    return layout


LAYOUT = _layout()
"""For each parameter of a layer: the whole tensors in it, and the dimension that ranks share."""


def is_centred(variant: Mapping[str, Any]) -> bool:
    return bool(variant["config"].get("normalization") == "LayerNorm")


def layer_names(variant: Mapping[str, Any]) -> list[str]:
    """Names of the whole tensors of one layer."""
    names = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
    if is_centred(variant):
        names += ["input_layernorm.bias", "pre_mlp_layernorm.bias"]
    if variant["config"].get("qk_layernorm"):
        names += [f"self_attention.{each}_layernorm.weight" for each in "qk"]
    for linear in _LINEARS:
        names += [f"{linear}.down.weight", f"{linear}.up.weight"]
        names += [f"{linear}.up.bias"] * variant["config"]["add_bias_linear"]
        names += [f"{linear}.down.bias"] * bool(variant["spec"].get("latent_bias"))
    return names


def whole(variant: Mapping[str, Any], layer: int, name: str) -> Tensor:
    """One whole tensor of layer `layer`: factors as initialised, the others not zero or one."""
    full = f"decoder.layers.{layer}.{name}"
    linear, _, suffix = name.partition(".down." if ".down." in name else ".up.")
    if linear not in _LINEARS:  # a norm
        width = HEAD if "self_attention" in name else WIDTH
        return 1 + 0.3 * _drawn(full, width)
    inputs, outputs, family = _LINEARS[linear]
    rank = variant["spec"].get(family, variant["spec"].get("rank"))
    if suffix == "bias":
        return 0.3 * _drawn(full, rank if ".down." in name else outputs)
    factors = random_factors(
        inputs, rank, outputs, seed=SEED, name=full.removesuffix(".down.weight").removesuffix(
            ".up.weight"), dtype=torch.float64,
    )  # fmt: skip
    return factors.down if name.endswith(".down.weight") else factors.up


def _drawn(name: str, size: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def cut(tensors: Sequence[Tensor], dim: int | None, rank: int, size: int) -> Tensor:
    """What a rank holds of whole tensors that are one parameter."""
    if dim is None:
        return torch.cat(list(tensors))
    return torch.cat([each.chunk(size, dim)[rank] for each in tensors])


def joined(by_rank: Sequence[Tensor], dim: int | None, lengths: Sequence[int]) -> list[Tensor]:
    """Undo `cut`; `lengths` are the whole tensors' numbers of rows."""
    if dim is None:
        assert all(torch.equal(each, by_rank[0]) for each in by_rank)
        return list(by_rank[0].split(list(lengths)))
    mine = [n // len(by_rank) if dim == 0 else n for n in lengths]
    pieces = [each.split(mine) for each in by_rank]
    return [torch.cat([piece[i] for piece in pieces], dim) for i in range(len(mine))]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(LABELS_SEED)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


class Reference:
    """The model with leaf tensors by their global names.

    Args:
        variant: One of `VARIANTS`.
        ends: Embedding, final norm and head, by their names in the Megatron-core model.
    """

    def __init__(self, variant: Mapping[str, Any], ends: Mapping[str, Tensor]) -> None:
        self.variant = variant
        self.tensors = {name: value.clone().requires_grad_() for name, value in ends.items()}
        for layer in range(LAYERS):
            for name in layer_names(variant):
                value = whole(variant, layer, name).requires_grad_()
                self.tensors[f"decoder.layers.{layer}.{name}"] = value

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = F.embedding(tokens, self.tensors["embedding.word_embeddings.weight"])
        for layer in range(LAYERS):
            x = self._layer(x, f"decoder.layers.{layer}.")
        x = self._norm(x, "decoder.final_layernorm")
        logits = x @ self.tensors["output_layer.weight"].T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def _layer(self, x: Tensor, at: str) -> Tensor:
        variant = self.variant
        normed = self._norm(x, f"{at}input_layernorm")
        q, k, v = (
            self._linear(f"{at}self_attention.linear_{each}", normed)
            .unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for each in "qkv"
        )  # fmt: skip
        if variant["config"].get("qk_layernorm"):
            q = _rms(q, self.tensors[f"{at}self_attention.q_layernorm.weight"])
            k = _rms(k, self.tensors[f"{at}self_attention.k_layernorm.weight"])
        turning = int(HEAD * variant.get("rotary_percent", 1.0))
        q, k = _turned(q, turning), _turned(k, turning)
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
        later = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        context = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        heads = context.transpose(1, 2).flatten(-2)
        x = x + self._linear(f"{at}self_attention.linear_proj", heads)
        normed = self._norm(x, f"{at}pre_mlp_layernorm")
        gate = self._linear(f"{at}mlp.linear_gate", normed)
        if variant["spec"].get("keep_mlp_activation", True):
            gate = gate * gate.sigmoid()
        product = gate * self._linear(f"{at}mlp.linear_up", normed)
        return x + self._linear(f"{at}mlp.linear_down", product)

    def _norm(self, x: Tensor, at: str) -> Tensor:
        gain = self.tensors[f"{at}.weight"]
        if not is_centred(self.variant):
            return _rms(x, gain)
        return _rms(x - x.mean(-1, keepdim=True), gain) + self.tensors[f"{at}.bias"]

    def _linear(self, at: str, x: Tensor) -> Tensor:
        down, up = self.tensors[f"{at}.down.weight"], self.tensors[f"{at}.up.weight"]
        layer = BottleneckLinear(
            down.shape[1], down.shape[0], up.shape[0], self.variant["spec"].get("activation"),
            bias=f"{at}.up.bias" in self.tensors, latent_bias=f"{at}.down.bias" in self.tensors,
            dtype=torch.float64,
        )  # fmt: skip
        own = {name: self.tensors[f"{at}.{name}"] for name, _ in layer.named_parameters()}
        result: Tensor = torch.func.functional_call(layer, own, (x,))
        return result


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gain


def _turned(x: Tensor, turning: int) -> Tensor:
    """Rotary embedding: complex numbers of elements half a head apart, times e^(i angle)."""
    x, rest = x[..., :turning], x[..., turning:]
    # In float32, as Megatron-core does it.
    frequency = 10000.0 ** (-torch.arange(0, turning, 2) / turning)
    angles = torch.outer(torch.arange(SEQUENCE).float(), frequency)
    turns = torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
    low, high = x.chunk(2, -1)
    turned = torch.complex(low, high) * turns
    return torch.cat((turned.real, turned.imag, rest), -1)
