"""An unsharded low-rank decoder, written from the formulas of the papers in plain PyTorch.

It is the oracle of the sharded layers, so it takes nothing from them: `BottleneckLinear` only holds
the parameters. In float64 everything is float64; in lower precisions each norm, softmax and loss is
computed in float32 and rounded once, so that its error is that of a good single-rank program.

Shape letters, used as suffixes: B batch, T position, S attended position, D width, H query heads,
G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.tensor_parallel.bottleneck import BottleneckLinear
from lowtide.tensor_parallel.patterns import (
    LayerInputs,
    LayerPattern,
    ModelPattern,
    ModelShape,
    Projection,
    register_pattern,
    unregister_pattern,
)

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Divisible by 1, 2 and 4 where it must be; the vocabulary is not."""

    vocabulary: int = 101
    width: int = 48
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 6
    mlp_width: int = 56
    attention_rank: int = 20
    mlp_rank: int = 12
    epsilon: float = 1e-5
    activation: str | None = None
    gate_activation: str | None = "silu"
    is_tied: bool = False
    is_fused: bool = False
    has_biases: bool = False
    has_head_norms: bool = False
    has_head_bias: bool = False
    norm: Literal["rms", "layer", "layer without gain"] = "rms"
    padding: int | None = None


def wide(x: Tensor) -> Tensor:
    """Return float64 as it is, and anything less as float32."""
    return x if x.dtype == torch.float64 else x.float()


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        full = wide(x)
        mean_square = (full * full).mean(-1, keepdim=True)
        return (full / torch.sqrt(mean_square + self.epsilon) * wide(self.weight)).to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, width: int, epsilon: float, has_parameters: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if has_parameters else None
        self.bias = nn.Parameter(torch.zeros(width)) if has_parameters else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        full = wide(x)
        centred = full - full.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        normed = centred / torch.sqrt(variance + self.epsilon)
        if self.weight is not None and self.bias is not None:
            normed = normed * wide(self.weight) + wide(self.bias)
        return normed.to(x.dtype)


def norm_of(sizes: Sizes) -> nn.Module:
    if sizes.norm == "rms":
        return Norm(sizes.width, sizes.epsilon)
    return LayerNorm(sizes.width, sizes.epsilon, sizes.norm == "layer")


def low_rank(layer: BottleneckLinear, x: Tensor) -> Tensor:
    z = x @ layer.down.weight.T
    if layer.down.bias is not None:
        z = z + layer.down.bias
    if layer.activation == "silu":
        z = F.silu(z)
    elif layer.activation is not None:
        raise NotImplementedError(layer.activation)
    y = z @ layer.up.weight.T
    return y if layer.up.bias is None else y + layer.up.bias


def turn(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate element k with element k + K/2, as one complex number, by the position's angle."""
    half = x_BHTK.shape[-1] // 2
    full = wide(x_BHTK)
    number = torch.complex(full[..., :half].contiguous(), full[..., half:].contiguous())
    angle = torch.complex(wide(cos_TK)[:, :half].contiguous(), wide(sin_TK)[:, :half].contiguous())
    turned = number * angle
    return torch.cat((turned.real, turned.imag), -1).to(x_BHTK.dtype)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.attention_norm = norm_of(s)
        self.mlp_norm = norm_of(s)

        def bottleneck(inputs: int, rank: int, outputs: int) -> BottleneckLinear:
            return BottleneckLinear(
                inputs, rank, outputs, s.activation, bias=s.has_biases, latent_bias=s.has_biases
            )

        queries, keys = s.heads * s.head_width, s.kv_heads * s.head_width
        self.q = bottleneck(s.width, s.attention_rank, queries)
        if s.is_fused:
            self.kv = bottleneck(s.width, s.attention_rank, 2 * keys)
            self.gate_up = bottleneck(s.width, s.mlp_rank, 2 * s.mlp_width)
        else:
            self.k = bottleneck(s.width, s.attention_rank, keys)
            self.v = bottleneck(s.width, s.attention_rank, keys)
            self.gate = bottleneck(s.width, s.mlp_rank, s.mlp_width)
            self.up = bottleneck(s.width, s.mlp_rank, s.mlp_width)
        self.o = bottleneck(queries, s.attention_rank, s.width)
        self.down = bottleneck(s.mlp_width, s.mlp_rank, s.width)
        if s.has_head_norms:
            self.q_norm = Norm(s.head_width, s.epsilon)
            self.k_norm = Norm(s.head_width, s.epsilon)

    def forward(
        self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self._attention(self.attention_norm(x_BTD), cos_TK, sin_TK, mask)
        normed = self.mlp_norm(x_BTD)
        if self.sizes.is_fused:
            both = low_rank(self.gate_up, normed)
            gate, up = both[..., : self.sizes.mlp_width], both[..., self.sizes.mlp_width :]
        else:
            gate, up = low_rank(self.gate, normed), low_rank(self.up, normed)
        if self.sizes.gate_activation == "silu":
            gate = F.silu(gate)
        return x_BTD + low_rank(self.down, gate * up)

    def _attention(self, normed: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        s = self.sizes
        batch, length, _ = normed.shape

        def heads(rows: Tensor) -> Tensor:
            return rows.reshape(batch, length, -1, s.head_width).transpose(1, 2)

        q_BHTK = heads(low_rank(self.q, normed))
        if s.is_fused:
            both = low_rank(self.kv, normed)
            keys = s.kv_heads * s.head_width
            k_BGTK, v_BGTK = heads(both[..., :keys]), heads(both[..., keys:])
        else:
            k_BGTK, v_BGTK = heads(low_rank(self.k, normed)), heads(low_rank(self.v, normed))
        if s.has_head_norms:
            q_BHTK, k_BGTK = self.q_norm(q_BHTK), self.k_norm(k_BGTK)
        q_BHTK, k_BGTK = turn(q_BHTK, cos, sin), turn(k_BGTK, cos, sin)
        # Query head h reads key/value head h // (H / G).
        serving = torch.arange(s.heads) // (s.heads // s.kv_heads)
        k_BHTK, v_BHTK = k_BGTK[:, serving], v_BGTK[:, serving]
        scores = wide(q_BHTK) @ wide(k_BHTK).transpose(-1, -2) / s.head_width**0.5
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask
        weights = torch.softmax(scores, -1)
        context = (weights @ wide(v_BHTK)).to(q_BHTK.dtype)
        return low_rank(self.o, context.transpose(1, 2).reshape(batch, length, -1))


def next_token_loss(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """Mean negative log-likelihood of label t + 1 at position t, without ignored labels."""
    rows = wide(logits)[:, :-1]
    targets = labels[:, 1:]
    kept = targets != IGNORED
    losses = torch.logsumexp(rows, -1)
    losses = losses - rows.gather(-1, targets.masked_fill(~kept, 0).unsqueeze(-1)).squeeze(-1)
    return losses[kept].sum() / kept.sum()


class LowRankDecoder(nn.Module):
    """Call it with tokens, optional labels (then it returns the loss too) and an optional mask."""

    layers: Any  # a ModuleList; what is in it, `shard` replaces

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width, sizes.padding)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = norm_of(sizes)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=sizes.has_head_bias)
        if sizes.is_tied:
            self.head.weight = self.embedding.weight
        self.loss_function: Callable[..., Tensor] = next_token_loss

    def angles(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        width = self.sizes.head_width
        rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), rates)
        angles_TK = torch.cat((angles, angles), -1)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return angles_TK.cos().to(kind), angles_TK.sin().to(kind)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, mask: Tensor | None = None, **kw: Any
    ) -> tuple[Tensor | None, Tensor]:
        x_BTD = self.embedding(tokens)
        cos_TK, sin_TK = self.angles(tokens.shape[1], x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_TK, sin_TK, mask=mask)
        logits_BTV = self.head(self.norm(x_BTD))
        if labels is None:
            return None, logits_BTV
        return self.loss_function(logits=logits_BTV, labels=labels, **kw), logits_BTV


def build(sizes: Sizes, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRankDecoder:
    """Return a model with weights that keep activations near 1; the same for the same seed."""
    with torch.device("meta"):  # no time for initial values that nobody reads
        model = LowRankDecoder(sizes).double()
    model.to_empty(device="cpu")
    if sizes.is_tied:
        model.head.weight = model.embedding.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * drawn)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * drawn)
            elif name == "embedding.weight":
                parameter.copy_(drawn)
            else:
                parameter.copy_(drawn * parameter.shape[1] ** -0.5)
    return model.to(dtype)


@dataclass(frozen=True, kw_only=True)
class ReferencePattern(ModelPattern):
    """Where a `LowRankDecoder` with one layout of projections keeps its parts."""

    is_fused: bool
    has_head_norms: bool

    def matches(self, model: nn.Module) -> bool:
        return (
            isinstance(model, LowRankDecoder)
            and model.sizes.is_fused == self.is_fused
            and model.sizes.has_head_norms == self.has_head_norms
        )

    def shape(self, model: Any) -> ModelShape:
        s: Sizes = model.sizes
        return ModelShape(
            width=s.width,
            layers=s.layers,
            heads=s.heads,
            kv_heads=s.kv_heads,
            head_width=s.head_width,
            mlp_width=s.mlp_width,
            vocabulary=s.vocabulary,
            norm="rms" if s.norm == "rms" else "layer",
            epsilon=s.epsilon,
            mlp_activation=s.gate_activation,
            is_tied=s.is_tied,
            attention_scale=s.head_width**-0.5,
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerInputs:
        hidden, cos, sin = args
        return LayerInputs(
            hidden=hidden,
            cos=cos,
            sin=sin,
            attention_mask=kwargs.get("mask"),
            cache=kwargs.get("cache"),
        )

    def set_loss(self, model: Any, function: Callable[..., Tensor]) -> Callable[[], None]:
        before = model.loss_function
        model.loss_function = function

        def undo() -> None:
            model.loss_function = before

        return undo


def _pattern(is_fused: bool, has_head_norms: bool) -> ReferencePattern:
    separate = (Projection("k", ("k",)), Projection("v", ("v",)))
    return ReferencePattern(
        name=f"reference{' fused' * is_fused}{' with head norms' * has_head_norms}",
        classes=("LowRankDecoder",),
        embedding="embedding",
        layers="layers",
        final_norm="norm",
        head="head",
        layer=LayerPattern(
            attention_norm="attention_norm",
            attention_inputs=(
                Projection("q", ("q",)),
                *((Projection("kv", ("k", "v")),) if is_fused else separate),
            ),
            attention_output=Projection("o", ("o",)),
            mlp_norm="mlp_norm",
            mlp_inputs=(Projection("gate_up", ("gate", "up")),)
            if is_fused
            else (Projection("gate", ("gate",)), Projection("up", ("up",))),
            mlp_output=Projection("down", ("down",)),
            query_norm="q_norm" if has_head_norms else None,
            key_norm="k_norm" if has_head_norms else None,
        ),
        is_fused=is_fused,
        has_head_norms=has_head_norms,
    )


PATTERNS = [_pattern(fused, norms) for fused in (False, True) for norms in (False, True)]


@contextmanager
def registered() -> Iterator[None]:
    """Let `shard` know the reference model."""
    for pattern in PATTERNS:
        register_pattern(pattern)
    try:
        yield
    finally:
        for pattern in PATTERNS:
            unregister_pattern(pattern.name)


def local_part(name: str, whole: Tensor, sizes: Sizes, rank: int, size: int) -> Tensor | None:
    """Return rank's part of a whole tensor as the method says; None: the tensor is replicated.

    A and gains by the input width, B and what it adds to by heads or by output width, each block
    of a fused projection by itself, the vocabulary in equal parts after filling up with zeros.

    Source: BOOST (arXiv 2512.12131), bottleneck-aware sharding; written without `layers.Part`.
    """

    def part(x: Tensor, dim: int) -> Tensor:
        assert x.shape[dim] % size == 0, name
        return x.chunk(size, dim)[rank]

    module, _, kind = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if name in ("head.weight", "head.bias") or (name == "embedding.weight" and sizes.is_tied):
        missing = -whole.shape[0] % size
        return part(torch.cat((whole, whole.new_zeros(missing, *whole.shape[1:]))), 0)
    if name == "embedding.weight":
        return part(whole, 1)
    if leaf in ("q_norm", "k_norm"):
        return None
    if leaf.endswith("norm"):
        return part(whole, 0)
    side = leaf
    projection = module.split(".")[-2]
    if side == "down":
        return None if kind == "bias" else part(whole, 1)
    if projection in ("kv", "gate_up"):
        return torch.cat([part(block, 0) for block in whole.chunk(2, 0)])
    return part(whole, 0)
