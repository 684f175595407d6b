"""What the planner says of latents that cross, beside models that have them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lowtide.cli import app
from lowtide.tensor_parallel import TensorParallelConfig, factorise, shard
from lowtide.tensor_parallel.block_shape import BlockShape
from lowtide.tensor_parallel.footprint import block_parameters
from lowtide.tensor_parallel.gates import GATES
from lowtide.tensor_parallel.traffic import (
    BOTTLENECK,
    FULL_RANK,
    NAIVE,
    Tier,
    block_messages,
    recompute_messages,
    reduced_elements,
)
from lowtide.tensor_parallel.work import block_linears, recomputed_linears, saved_elements
from tests.tensor_parallel.models import hugging_face
from tests.tensor_parallel.test_saved_activations import AloneGroup

RANKS, RANK, TOKENS = 4, 64, (4, 64)
PLAIN = BlockShape(
    width=256, mlp_width=512, heads=8, kv_heads=8, head_width=32, attention_rank=RANK,
    mlp_rank=RANK,
)  # fmt: skip


def block(crossing: str | None) -> BlockShape:
    return dataclasses.replace(PLAIN, crossing=crossing)


def model_of(crossing: str | None, layers: int, tier: str) -> Any:
    """One of four ranks of a model with those blocks, in bfloat16."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 8, "num_hidden_layers": layers}
    model = hugging_face("llama", **sizes).to(torch.bfloat16)
    setting = {"rank": RANK, "activation": "silu", "init": "random", "crossing": crossing}
    factorise(model, TensorParallelConfig(degree=RANKS, **setting))  # type: ignore[arg-type]
    return shard(model, AloneGroup(RANKS), tier=tier).model.train()


def kept(model: Any) -> float:
    """Return the elements per token that the model keeps for backward."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(torch.zeros(TOKENS, dtype=torch.long))
    assert output is not None  # alive until here, and so are all storages
    return sum(found.values()) / 2 / (TOKENS[0] * TOKENS[1])


@pytest.mark.parametrize("gate", GATES)
def test_parameters_are_those_of_a_model(gate: str) -> None:
    counts = [
        sum(each.numel() for each in model_of(gate, layers, "none").parameters())
        for layers in (2, 3)
    ]
    assert block_parameters(block(gate), RANKS, BOTTLENECK) == counts[1] - counts[0]
    assert block_parameters(block(gate), RANKS, FULL_RANK) == (
        block_parameters(PLAIN, RANKS, FULL_RANK)
    )


@pytest.mark.parametrize("tier", ["none", "latents"])
@pytest.mark.parametrize("gate", GATES)
def test_a_crossing_keeps_as_much_more_as_in_a_model(gate: str, tier: Tier) -> None:
    measured = {
        crossing: kept(model_of(crossing, 3, tier)) - kept(model_of(crossing, 2, tier))
        for crossing in (None, gate)
    }
    planned = saved_elements(block(gate), RANKS, BOTTLENECK, tier)
    planned -= saved_elements(PLAIN, RANKS, BOTTLENECK, tier)
    assert measured[gate] - measured[None] == planned


def test_ours_sends_nothing_more_but_gathers_what_was_kept_in_parts() -> None:
    latents = 7 * RANK
    for gate in GATES:
        assert block_messages(block(gate), RANKS, BOTTLENECK) == (
            block_messages(PLAIN, RANKS, BOTTLENECK)
        )
        again = recompute_messages(block(gate), RANKS, BOTTLENECK, "sharded_latents")
        assert sum(each.elements for each in again) == 2 * latents
        assert recompute_messages(block(gate), RANKS, BOTTLENECK, "latents") == []
        found = saved_elements(block(gate), RANKS, BOTTLENECK, "sharded_latents")
        assert found == (256 + 2 * latents) / RANKS


@pytest.mark.parametrize(
    ("gate", "more"), [("identity", 0), ("scalar", 0), ("linear", 7 * 64 / 2), ("low_rank", 7 * 16)]
)
def test_naive_layout_sends_what_matrices_read(gate: str, more: float) -> None:
    for ours, plain in zip(
        block_messages(block(gate), RANKS, NAIVE), block_messages(PLAIN, RANKS, NAIVE), strict=True
    ):
        assert reduced_elements(ours) - reduced_elements(plain) == more
    assert block_messages(block(gate), RANKS, FULL_RANK) == block_messages(PLAIN, RANKS, FULL_RANK)


def test_gates_run_again_with_kept_latents() -> None:
    again = recomputed_linears(block_linears(block("linear"), RANKS, BOTTLENECK))
    gates = [layer for layer in again if layer.part == "gate"]
    assert [(each.where, each.inputs, each.outputs, each.count) for each in gates] == [
        ("qkv", 64, 64, 3), ("o", 64, 64, 1), ("gate_up", 64, 64, 2), ("down", 64, 64, 1)
    ]  # fmt: skip


def test_command_tells_the_gate() -> None:
    words = ["plan", "tensor_parallel", "--model", "llama-7b", "--crossing"]
    result = CliRunner().invoke(app, [*words, "linear"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "each latent reads that of the block before: linear" in result.stdout
    wrong = CliRunner().invoke(app, [*words, "matrix"])
    assert (wrong.exit_code, 'crossing: got "matrix"' in wrong.stderr) == (2, True)
