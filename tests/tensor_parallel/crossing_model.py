"""A Llama decoder with latent crossings, written plainly from the formulas; shares no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.tensor_parallel import TensorParallelConfig, factorise

WIDTH, HEADS, KV_HEADS, MLP, LAYERS, VOCABULARY, RANK = 32, 4, 4, 48, 3, 50, 8
GATES = ("identity", "scalar", "linear", "low_rank")
EPSILON = 1e-6


def llama(gate: str | None, *, seed: int = 0, **settings: Any) -> nn.Module:
    """Return an ordinary float64 Llama of low rank whose gates are not zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=settings.pop("kv_heads", KV_HEADS),
        vocab_size=VOCABULARY,
        rms_norm_eps=EPSILON,
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config).double()
    chosen = {"rank": RANK, "activation": "silu", **settings}
    factorise(model, TensorParallelConfig(degree=1, crossing=gate, **chosen))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".crossing." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(seed: int = 5) -> Tensor:
    """Return ``[2, 7]``."""
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def gate_of(state: Mapping[str, Tensor], path: str, kind: str, h: Tensor) -> Tensor:
    """Return what crosses, by the paper's formulas."""
    if kind == "identity":
        return h
    if kind == "scalar":
        return state[f"{path}.crossing.weight"] * h
    if kind == "linear":
        return h @ state[f"{path}.crossing.weight"].T
    return h @ state[f"{path}.crossing.down"].T @ state[f"{path}.crossing.up"].T


def logits(state: Mapping[str, Tensor], ids: Tensor, kind: str | None) -> Tensor:
    """Return ``[B, T, V]`` of the model with these weights, all in float64."""
    before: dict[str, Tensor] = {}

    def project(layer: int, name: str, x: Tensor) -> Tensor:
        path = f"model.layers.{layer}.{name}"
        h = F.silu(x @ state[f"{path}.down.weight"].T)
        crossed = h
        if kind is not None and layer > 0:
            crossed = h + gate_of(state, path, kind, before[name])
        before[name] = h
        return crossed @ state[f"{path}.up.weight"].T

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * state[f"{name}.weight"]

    length, head = ids.shape[1], WIDTH // HEADS
    # As transformers do it, the angles have 24 bits.
    speeds = 1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head)
    angles = torch.arange(length).float()[:, None] * speeds
    turn = torch.complex(angles.cos().double(), angles.sin().double())

    def heads(x: Tensor, is_turned: bool) -> Tensor:
        x = x.unflatten(-1, (-1, head)).transpose(1, 2)
        if not is_turned:
            return x
        low, high = x.chunk(2, -1)
        turned = torch.complex(low, high) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = state["model.embed_tokens.weight"][ids]
    hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    for i in range(LAYERS):
        n = norm(x, f"model.layers.{i}.input_layernorm")
        q = heads(project(i, "self_attn.q_proj", n), True)
        k = heads(project(i, "self_attn.k_proj", n), True)
        v = heads(project(i, "self_attn.v_proj", n), False)
        scores = (q @ k.transpose(-1, -2) / head**0.5).masked_fill(hidden, float("-inf"))
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        x = x + project(i, "self_attn.o_proj", context)
        n = norm(x, f"model.layers.{i}.post_attention_layernorm")
        m = F.silu(project(i, "mlp.gate_proj", n)) * project(i, "mlp.up_proj", n)
        x = x + project(i, "mlp.down_proj", m)
    return norm(x, "model.norm") @ state["lm_head.weight"].T


def loss_of(values: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of the next token, in float64."""
    return F.cross_entropy(values[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def reference(model: nn.Module, kind: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of an unsharded model's weights."""
    state = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    loss = loss_of(logits(state, tokens(), kind), tokens())
    loss.backward()
    gradients = {name: each.grad for name, each in state.items() if each.grad is not None}
    return loss.detach(), gradients
