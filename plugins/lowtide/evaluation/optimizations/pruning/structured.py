"""Pruning of whole parts: groups of attention heads, neurons of the MLP, blocks.

These really shrink the matrices, so they save bytes and time.

Letters: O outputs, I inputs, D size of a head.

Sources: scores as in Wanda (2306.11695), summed over a part, which is what Wanda-sp in FLAP
(2312.11983) does; blocks by the change they make, Men et al., ShortGPT (2403.03853), Sec. 2.2.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lowtide.core.errors import ModelError
from lowtide.evaluation.optimizations.base import Context, Handle, Optimization
from lowtide.evaluation.optimizations.blocks import blocks_of, decoder_of, part
from lowtide.evaluation.optimizations.calibration import forward_all, input_statistics
from lowtide.evaluation.optimizations.pruning.masks import drop_least


@dataclass(frozen=True, kw_only=True)
class PartPruning(Optimization):
    """Take parts away, by how much they matter on calibration tokens.

    Attributes:
        ratio: The part that goes, of those in each block; at least one always stays.
    """

    stage = "weights"
    needs_calibration = True
    positional = ("ratio",)
    ratio: float

    def __post_init__(self) -> None:
        self.check(0 <= self.ratio < 1, "ratio", "from 0 to below 1")

    def kept(self, score: Tensor) -> Tensor:
        """Return numbers of the parts that stay, ascending; `score` is (parts,)."""
        count = min(int(len(score) * self.ratio), len(score) - 1)
        return drop_least(score[None], count)[0].nonzero().flatten()


@dataclass(frozen=True, kw_only=True)
class BlockPartPruning(PartPruning):
    """Parts within a block, all of which write through one linear layer."""

    group: ClassVar[str]
    linears: ClassVar[tuple[str, ...]]
    """Names of the layers whose rows are the parts, then of the one whose columns they are."""

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        handle = Handle(self.spelled)
        tokens = context.calibration_for(self.spelled)
        left = all_parts = 0
        for block in blocks_of(model):
            owner, linears = part(block, self.group, self.linears)
            statistics = input_statistics(model, linears[-1:], tokens)[0]
            importance = linears[-1].weight.detach().double().abs() * statistics.norms
            kept, parts = self.shrink(handle, owner, linears, importance.square().sum(0))
            left, all_parts = left + kept, all_parts + parts
        handle.facts["sparsity"] = 1 - left / all_parts
        return handle

    @abstractmethod
    def shrink(
        self, handle: Handle, owner: Any, linears: list[nn.Linear], importance: Tensor
    ) -> tuple[int, int]:
        """Take parts out of `linears`, given the importance of each column of the last one.

        Returns:
            How many parts are left, and how many there were.
        """


@dataclass(frozen=True, kw_only=True)
class Heads(BlockPartPruning):
    """Key-value heads, each with the query heads that read it."""

    name: ClassVar[str] = "prune.heads"
    group = "self_attn"
    linears = ("k_proj", "v_proj", "q_proj", "o_proj")

    @override
    def shrink(
        self, handle: Handle, owner: Any, linears: list[nn.Linear], importance: Tensor
    ) -> tuple[int, int]:
        key, value, query, output = linears
        size = getattr(owner, "head_dim", None)
        if not isinstance(size, int) or key.out_features % size:
            raise ModelError(
                f"{type(owner).__name__}: head_dim is {size!r} beside {key.out_features} key "
                f"outputs; needed is a divisor of them"
            )
        heads = key.out_features // size
        per_group = query.out_features // heads  # query outputs of one key-value head
        kept = self.kept(importance.view(heads, per_group).sum(1))
        rows = (kept[:, None] * size + torch.arange(size)).flatten()
        query_rows = (kept[:, None] * per_group + torch.arange(per_group)).flatten()
        for linear in (key, value):
            take_rows(handle, linear, rows)
        take_rows(handle, query, query_rows)
        take_columns(handle, output, query_rows)
        return len(kept), heads


@dataclass(frozen=True, kw_only=True)
class Ffn(BlockPartPruning):
    """Neurons between the two halves of the MLP."""

    name: ClassVar[str] = "prune.ffn"
    group = "mlp"
    linears = ("gate_proj", "up_proj", "down_proj")

    @override
    def shrink(
        self, handle: Handle, owner: Any, linears: list[nn.Linear], importance: Tensor
    ) -> tuple[int, int]:
        kept = self.kept(importance)
        for linear in linears[:-1]:
            take_rows(handle, linear, kept)
        take_columns(handle, linears[-1], kept)
        return len(kept), len(importance)


@dataclass(frozen=True, kw_only=True)
class Depth(PartPruning):
    """Whole blocks, those first that turn their input least (block influence of ShortGPT)."""

    name: ClassVar[str] = "prune.depth"

    @override
    def apply(self, model: nn.Module, context: Context) -> Handle:
        handle = Handle(self.spelled)
        decoder = decoder_of(model)
        blocks = blocks_of(model)
        influence = block_influence(model, blocks, context.calibration_for(self.spelled))
        kept = [blocks[int(index)] for index in self.kept(influence)]
        handle.replace(decoder, "layers", nn.ModuleList(kept))
        handle.replace(decoder.config, "num_hidden_layers", len(kept))
        for index, block in enumerate(kept):  # a cache is kept by these numbers
            handle.replace(block.self_attn, "layer_idx", index)
        handle.facts["sparsity"] = 1 - len(kept) / len(blocks)
        return handle


def block_influence(model: nn.Module, blocks: list[nn.Module], tokens: Tensor) -> Tensor:
    """Return 1 - mean cosine between what goes into and comes out of each block; (blocks,)."""
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0

    def listener(index: int) -> Any:
        def listen(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal count
            before = (args[0] if args else kwargs["hidden_states"]).double()
            after = (output[0] if isinstance(output, tuple) else output).double()
            cosine = torch.cosine_similarity(before, after, dim=-1)
            sums[index] += (1 - cosine).sum().cpu()
            count += cosine.numel() if index == 0 else 0

        return listen

    hooks = [
        block.register_forward_hook(listener(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    try:
        forward_all(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return sums / count


def take_rows(handle: Handle, linear: nn.Linear, rows: Tensor) -> None:
    """Leave only outputs `rows` in `linear`."""
    handle.replace_weight(linear, linear.weight.detach()[rows].clone())
    if linear.bias is not None:
        bias = nn.Parameter(linear.bias.detach()[rows].clone(), linear.bias.requires_grad)
        handle.replace(linear, "bias", bias)
    handle.replace(linear, "out_features", len(rows))


def take_columns(handle: Handle, linear: nn.Linear, columns: Tensor) -> None:
    """Leave only inputs `columns` in `linear`."""
    handle.replace_weight(linear, linear.weight.detach()[:, columns].clone())
    handle.replace(linear, "in_features", len(columns))
