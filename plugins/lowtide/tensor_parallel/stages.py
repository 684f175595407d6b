"""The parts of a sharded decoder that stages of a pipeline are made of.

What stages exchange is the residual stream as it is inside them, spread over its width: each rank
sends d/p numbers per token to its neighbour in the next stage, and gets as many gradients back.
Nothing is gathered or cut for it. Where latents cross between decoder layers, those of the layer
before the boundary travel in the same message, whole (7r numbers per token).

Source: BOOST (arXiv 2512.12131), which combines it with pipeline parallelism in its evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.core.errors import ModelError
from lowtide.tensor_parallel.build import Builder
from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.ends import VocabularyHead
from lowtide.tensor_parallel.factorisation import Factorisation
from lowtide.tensor_parallel.group import TensorGroup
from lowtide.tensor_parallel.layers import check_same_data
from lowtide.tensor_parallel.loss import IGNORED, vocabulary_cross_entropy
from lowtide.tensor_parallel.patterns import LayerInputs, ModelPattern, ModelShape


@dataclass(eq=False, kw_only=True)
class Stages:
    """What the layers of one pipeline share on one rank.

    Attributes:
        config: Settings that the model was converted with.
        group: The tensor-parallel ranks of this stage and data-parallel replica.
        pattern: Family of the model.
        shape: Its sizes, unsharded.
        factorisation: What became of its projections.
        bind: Makes a decoder layer's inputs from the residual stream.
        spreads_loss: Whether the loss takes each rank's part of the logits in training.
        builder: Builds this rank's modules; None once they are built, to let the model go.
        must_prepare: Whether the engine still takes what stages exchange for replicas.
    """

    config: TensorParallelConfig
    group: TensorGroup
    pattern: ModelPattern
    shape: ModelShape
    factorisation: Factorisation
    bind: Callable[[Tensor], LayerInputs]
    spreads_loss: bool
    builder: Builder | None
    must_prepare: bool

    def __repr__(self) -> str:
        """Return a short text: DeepSpeed prints the arguments of layers."""
        return "stages"

    def build(self) -> Builder:
        """Return the builder."""
        if self.builder is None:
            raise AssertionError("a layer is built after the pipeline")
        return self.builder


class EmbeddingStage(nn.Module):
    """Token embedding; with tied weights the head too, which the last stage calls."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages
        self.embedding, _, head = stages.build().ends()
        self.head: VocabularyHead | None = head if stages.shape.is_tied else None

    def forward(self, tokens: Any) -> Tensor:
        """Return this rank's part of the residual stream, ``[B, T, n]``, for ids ``[B, T]``.

        Raises:
            ModelError: `tokens` is something else.
        """
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim != 2:
            found = f"a {type(tokens).__name__}"
            if isinstance(tokens, Tensor):
                found = f"a tensor of shape {tuple(tokens.shape)} and {tokens.dtype}"
            raise ModelError(
                f"lowtide.tensor_parallel: the pipeline was fed {found}, allowed is one integer "
                f"tensor of shape (batch, tokens); let each batch be (token ids, labels)"
            )
        embedded: Tensor = self.embedding(tokens)
        return embedded


class DecoderStage(nn.Module):
    """One decoder layer.

    Attributes:
        is_boundary: Whether another stage reads what it returns, which is then one tensor: the
            engine runs one backward pass for each tensor that stages exchange.
    """

    def __init__(self, stages: Stages, index: int) -> None:
        super().__init__()
        builder = stages.build()
        self.stages = stages
        self.layer = builder.layer(index)
        self.widths = builder.latent_widths(index - 1) if self.layer.reads_latents else ()
        self.is_boundary = False

    def forward(self, value: Any) -> Any:
        """Return the residual stream after the layer, with the latents that cross, if any.

        Args:
            value: ``[B, T, n]``, alone, in a tuple with latents, or joined with them along the
                last dimension.

        Raises:
            ModelError: The engine was not created by ``lowtide.initialize``.
        """
        stages = self.stages
        if stages.must_prepare:
            raise ModelError(
                "lowtide.tensor_parallel: the engine takes the parts of the residual stream that "
                "stages exchange for replicas; create it with lowtide.initialize and the "
                "configuration that the pipeline module was made with"
            )
        if not isinstance(value, tuple):
            local = stages.shape.width // stages.group.size
            value = value.split((local, *self.widths), -1)
        x, own = self.layer.run(stages.bind(value[0]), value[1:])
        if not own:
            return x
        return torch.cat((x, *own), -1) if self.is_boundary else (x, *own)


class NormStage(nn.Module):
    """The last norm, before a tied head."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        _, self.norm, _ = stages.build().ends()

    def forward(self, x: Tensor) -> Tensor:
        """Take ``[B, T, n]``, return ``[B, T, d]``."""
        normed: Tensor = self.norm(x)
        return normed


class OutputStage(nn.Module):
    """The last norm and the head."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        self.stages = stages
        _, self.norm, self.head = stages.build().ends()

    def forward(self, x: Tensor) -> Tensor:
        """Take ``[B, T, n]``, return logits; see `logits`."""
        return logits(self, self.norm(x))


def logits(stage: Any, normed: Tensor) -> Tensor:
    """Return the logits of ``[B, T, d]``: in training what the loss takes, otherwise all.

    Args:
        stage: An `OutputStage`, or the `EmbeddingStage` of a tied head.
        normed: What the last norm gave.
    """
    stage.head.is_spread = stage.training and stage.stages.spreads_loss
    result: Tensor = stage.head(normed)
    return result


class NextTokenLoss:
    """Mean cross-entropy of the next token, as Hugging Face models compute it.

    Args:
        group: The ranks.
        vocabulary: V.
    """

    __name__ = "next_token_loss"  # DeepSpeed prints it

    def __init__(self, group: TensorGroup, vocabulary: int) -> None:
        self._group = group
        self._vocabulary = vocabulary

    def __call__(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return the loss.

        Args:
            values: Logits, ``[B, T, V]`` or this rank's part, ``[B, T, ceil(V / p)]``.
            labels: ``[B, T]`` token ids, not shifted; -100 takes no part.

        Raises:
            ModelError: The ranks got different labels.
        """
        check_same_data(labels, self._group)
        is_whole = values.shape[-1] == self._vocabulary
        return vocabulary_cross_entropy(
            values,
            F.pad(labels, (0, 1), value=IGNORED)[..., 1:],
            self._vocabulary,
            TensorGroup() if is_whole else self._group,
        )
