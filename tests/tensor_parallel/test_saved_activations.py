"""What one rank keeps for backward, per token and block, beside the formulas.

Two measures: what autograd saves (`saved_tensors_hooks`, each storage once, whole), and every
storage that forward made and that is alive after it, whoever holds it.

Source: BOOST (arXiv 2512.12131), low-rank activation checkpointing: d/p + 7r elements where the
middle of the block is computed again; d/p + 7r/p where latents are spread over the ranks too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowtide.tensor_parallel.group import Pending, TensorGroup
from lowtide.tensor_parallel.sharding import shard
from tests.tensor_parallel.reference import LowRankDecoder, Sizes, build, registered

RANKS = 4
SCALED = Sizes(
    width=256, heads=8, kv_heads=8, head_width=32, mlp_width=704, attention_rank=64, mlp_rank=64,
    layers=1, vocabulary=16, activation="silu",
)  # fmt: skip
LLAMA_7B = replace(
    SCALED, width=4096, heads=32, kv_heads=32, head_width=128, mlp_width=11008,
    attention_rank=1024, mlp_rank=1024,
)  # fmt: skip


class AloneGroup(TensorGroup):
    """One rank of several, without the others: collectives have the right shapes and no sender."""

    def __init__(self, size: int, rank: int = 0) -> None:
        super().__init__()
        self.size, self.rank = size, rank

    def start_sum(self, owned: Tensor, *, phase: str) -> Pending:
        return Pending(owned)

    def maximum(self, owned: Tensor, *, phase: str) -> Tensor:
        return owned

    def gather_rows(self, rows: Tensor, *, phase: str) -> Tensor:
        return torch.cat([rows] * self.size)

    def scatter_sum_columns(self, columns: Tensor, *, phase: str) -> Tensor:
        return columns.chunk(self.size, -1)[self.rank].clone()

    def differs(self, values: Tensor) -> bool:
        return False


class Made(TorchDispatchMode):
    """Remembers every storage that an operation returned, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = (reference, storage.nbytes())
        return result

    def alive_bytes(self, without: set[int]) -> int:
        return sum(
            nbytes
            for cdata, (reference, nbytes) in self.storages.items()
            if cdata not in without and not reference.expired()
        )


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Kept:
    """One block of a sharded model after its forward."""

    def __init__(self, model: LowRankDecoder, tier: str, tokens: int, dtype: torch.dtype) -> None:
        group = AloneGroup(RANKS)
        shard(model, group, tier=tier)
        model.train()
        block = model.layers[0]
        own = {storage_of(each) for each in (*block.parameters(), *block.buffers())}
        generator = torch.Generator().manual_seed(0)
        shape = (2, tokens // 2, model.sizes.width // RANKS)
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        cos, sin = model.angles(shape[1], dtype)
        own |= {storage_of(cos), storage_of(sin)}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if storage_of(tensor) not in own:
                saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with Made() as made, saved_tensors_hooks(pack, lambda tensor: tensor):
            y = block(x, cos, sin)
        self.saved = sum(saved.values()) / x.itemsize / tokens
        # x was there before: the block keeps it all the same.
        alive = made.alive_bytes(own | {storage_of(y), storage_of(x)}) + x.nbytes
        self.alive = alive / x.itemsize / tokens
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        self.gradient = x.grad


@pytest.fixture(autouse=True)
def patterns() -> Iterator[None]:
    with registered():
        yield


def formula(sizes: Sizes, tier: str) -> float:
    latents = 4 * sizes.attention_rank + 3 * sizes.mlp_rank
    return sizes.width / RANKS + latents / (RANKS if tier == "sharded_latents" else 1)


def small(sizes: Sizes) -> float:
    """Two norms' statistics, in a message (3 columns of each rank) and once as a float32."""
    return 2 * (3 * RANKS + 2)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tier", ["latents", "sharded_latents"])
def test_a_scaled_model_keeps_what_the_formula_says(
    tier: str, biases: bool, activation: str | None
) -> None:
    sizes = replace(SCALED, activation=activation, has_biases=biases)
    kept = Kept(build(sizes, dtype=torch.bfloat16), tier, 64, torch.bfloat16)
    assert formula(sizes, tier) <= kept.alive <= formula(sizes, tier) + small(sizes)
    if tier == "latents":  # `run_segment` has hooks of its own for the other
        assert kept.saved == kept.alive


def small_of_layer_norm(sizes: Sizes, dtype: torch.dtype, tier: str, tokens: int) -> float:
    """Of both norms: squares and means, A gain and A bias, and the message's room for them.

    And the mean of this rank's columns of x, which the first A takes away again in backward; the
    second A stands in a segment that runs again.
    """
    is_narrow = dtype == torch.bfloat16
    found = 2.0 if is_narrow else 1.0
    columns = 6 * RANKS if is_narrow else 1 + RANKS
    rows = 2 * RANKS * (3 if is_narrow else 1)
    for latents in (3 * sizes.attention_rank, 2 * sizes.mlp_rank):
        vectors = (RANKS + 1) * latents / tokens
        found += (1 + RANKS + vectors) * (2 if is_narrow else 1)
        if tier == "latents":  # the latents are a view of it
            found += columns + rows * (latents + columns) / tokens
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tier", ["latents", "sharded_latents"])
def test_layer_norm_keeps_no_more_than_its_numbers(tier: str, dtype: torch.dtype) -> None:
    sizes = replace(SCALED, norm="layer")
    kept = Kept(build(sizes, dtype=dtype), tier, 64, dtype)
    bound = formula(sizes, tier) + small_of_layer_norm(sizes, dtype, tier, 64)
    assert formula(sizes, tier) <= kept.alive <= bound


def test_tiers_of_a_scaled_model_have_the_same_gradient() -> None:
    tiers = ("none", "latents", "sharded_latents")
    # `AloneGroup` gathers the first rank's tokens in the others' place: no gradient of the last.
    runs = [Kept(build(SCALED, dtype=torch.bfloat16), tier, 64, torch.bfloat16) for tier in tiers]
    assert torch.equal(runs[0].gradient, runs[1].gradient)
    assert runs[0].saved > 2 * runs[1].saved > 4 * runs[2].alive


@pytest.mark.parametrize(("tier", "goal"), [("latents", 9_200), ("sharded_latents", 3_900)])
def test_the_7b_shape_on_4_ranks(tier: str, goal: float) -> None:
    kept = Kept(_empty_7b(), tier, 64, torch.bfloat16)
    print(f"7B, {tier}: {kept.alive} elements per token and block")
    assert formula(LLAMA_7B, tier) <= kept.alive <= goal
    assert kept.saved <= goal


def test_the_7b_shape_without_checkpointing() -> None:
    """z and its activation; x twice, q, k and v, k before its rotation, the context twice; gate,
    its activation, up, and their product.
    """
    kept = Kept(_empty_7b(), "none", 64, torch.bfloat16)
    print(f"7B, none: {kept.alive} elements per token and block")
    sizes = LLAMA_7B
    widths = (8 * sizes.width + 4 * sizes.mlp_width) / RANKS
    assert kept.alive == kept.saved
    assert kept.alive <= 14 * sizes.mlp_rank + widths + 2 * sizes.heads / RANKS + 4


def _empty_7b() -> LowRankDecoder:
    with torch.device("meta"):
        model = LowRankDecoder(LLAMA_7B).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    return model
