"""Latent crossing: unsharded model, sharded model, recomputation, refusals."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel import TensorGroup, TensorParallelConfig, factorise, shard
from lowtide.tensor_parallel.crossing import ARGUMENT, LatentGate, gate_shapes
from lowtide.tensor_parallel.parameters import Successors
from lowtide.tensor_parallel.recompute import TIERS
from tests.helpers.ranks import run_ranks
from tests.tensor_parallel.crossing_model import (
    GATES,
    LAYERS,
    RANK,
    WIDTH,
    llama,
    loss_of,
    reference,
    tokens,
)
from tests.tensor_parallel.crossing_worker import compare

pytest.importorskip("transformers")
WORKER = str(Path(__file__).with_name("crossing_worker.py"))
ROUNDING = 2e-6  # the norms of transformers compute in float32


def step(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = tokens() if ids is None else ids
    loss: torch.Tensor = loss_of(model(ids).logits, ids)
    return loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters()}


@pytest.mark.parametrize("gate", GATES)
def test_unsharded_model_computes_the_formula(gate: str) -> None:
    model = llama(gate)
    loss, expected = reference(model, gate)
    without, _ = reference(model, None)
    found = step(model)
    found.backward()
    assert abs(found - loss) < ROUNDING
    assert abs(found - without) > 100 * ROUNDING  # the crossing matters in this model
    size = torch.stack([each.norm() for each in expected.values()]).norm()
    for name, gradient in gradients(model).items():
        assert (gradient - expected[name]).norm() <= ROUNDING * size, name


def test_gates_start_closed_and_get_gradients() -> None:
    for gate in ("scalar", "linear", "low_rank"):
        torch.manual_seed(0)
        module = LatentGate(gate, RANK, RANK, dtype=torch.float64)
        latent = torch.randn(3, RANK, dtype=torch.float64)
        out = module(latent)
        assert torch.equal(out, torch.zeros_like(out))
        out.sum().backward()
        assert any(each.grad.abs().max() > 0 for each in module.parameters())


def test_second_run_of_a_checkpointed_layer_when_another_call_came_between() -> None:
    model = llama("linear")
    step(model).backward()
    expected = gradients(model)
    model.zero_grad()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = step(model)
    step(model, tokens(seed=6))  # leaves latents of other tokens
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_reentrant_checkpointing_is_refused() -> None:
    model = llama("identity")
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        loss = step(model)
        with pytest.raises(ModelError, match="use_reentrant"):
            loss.backward()


def test_calls_leave_no_latents_behind() -> None:
    import gc
    import weakref

    model = llama("linear")
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gc.collect()
    gc.disable()
    try:
        found: list[Any] = []
        model.model.layers[0].register_forward_pre_hook(
            lambda _m, _a, kwargs: found.append(weakref.ref(kwargs[ARGUMENT])), with_kwargs=True
        )
        loss = step(model)
        assert found[0]() is not None  # its checkpointed layers may run again
        del loss  # never run backward
        assert found[0]() is None
    finally:
        gc.enable()


def test_generation_is_the_same_with_and_without_cache() -> None:
    model = llama("low_rank").eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(tokens(), use_cache=True, **settings)
        assert torch.equal(found, model.generate(tokens(), use_cache=False, **settings))


def test_copies_are_independent() -> None:
    model = llama("scalar")
    expected = step(model).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(step(other), expected)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".crossing." in name:
                    parameter.zero_()
        assert not torch.equal(step(other), expected)
        assert torch.equal(step(model), expected)


def test_projection_alone_is_refused() -> None:
    model = llama("identity")
    projection = model.get_submodule("model.layers.1.self_attn.q_proj")
    with pytest.raises(ModelError, match="called outside of its model"):
        projection(torch.randn(2, WIDTH, dtype=torch.float64))


def test_gates_join_the_parameter_group_of_their_projection() -> None:
    model = llama(None, rank=RANK)
    projections = [p for name, p in model.named_parameters() if "_proj" in name]
    others = [p for name, p in model.named_parameters() if "_proj" not in name]
    successors = Successors(model)
    settings = TensorParallelConfig(degree=1, crossing="linear")
    made = factorise(model, settings)
    shards = shard(model, TensorGroup())
    successors.follow(model, made.renamed, {old: (new,) for old, new in shards.renamed.items()})
    groups = successors.groups(
        [{"params": projections, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    )
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == set(found)
    gates = [p for name, p in model.named_parameters() if ".gates." in name]
    assert len(gates) == 4 * (LAYERS - 1)
    assert {found[id(gate)] for gate in gates} == {0.1}


@pytest.mark.parametrize(("ranks", "gates"), [(1, GATES), (2, GATES), (4, ("linear",))])
def test_sharded_equals_reference(ranks: int, gates: tuple[str, ...]) -> None:
    results: list[Any] = [compare(gates, TensorGroup())] if ranks == 1 else []
    if ranks > 1:
        results = run_ranks([WORKER, *gates], nproc=ranks, timeout_s=100).check().results
    for found, gate, tier in ((r[g], g, t) for r in results for g in gates for t in TIERS):
        assert found["tiers_equal"]
        assert found["in turns"]["loss"] <= 1e-12
        assert found["in turns"]["gradient"] <= 1e-12
        assert found["in turns"]["spread"] == 0.0
        report = found[tier]
        assert report["loss"] <= 1e-12
        assert report["gradient"] <= 1e-12
        assert report["names"]
        assert report["export"]
        assert report["spread"] == 0.0
        assert report["flagged"] == []
        assert (report["gates"] > 0) == (gate != "identity")
        if ranks == 1:
            assert report["backward"] == {}
            continue
        assert report["forward"]["forward/all_reduce"] == 4 * LAYERS
        assert report["backward"]["backward/all_reduce"] == 4 * LAYERS
        gathers = 4 * LAYERS + 4 * (LAYERS - 1) if tier == "sharded_latents" else 0
        assert report["backward"].get("recompute/all_gather", 0) == gathers


def saved_elements(gate: str | None) -> int:
    """Return how many elements of activations the latents tier keeps for backward."""
    model = llama(gate)
    shard(model, TensorGroup(), tier="latents")
    model.train()
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        model.model(tokens())
    return sum(each.untyped_storage().size() // 8 for at, each in found.items() if at not in own)


def test_checkpointing_keeps_one_more_latent_per_projection() -> None:
    more = saved_elements("identity") - saved_elements(None)
    assert more == 7 * RANK * (LAYERS - 1) * tokens().numel()


def test_model_with_crossings_trains() -> None:
    model = llama("linear", rank=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = step(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_settings_that_contradict_are_refused() -> None:
    model = llama(None)
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    other = type(layer)(48, 6, 32, "silu", dtype=torch.float64)
    model.set_submodule("model.layers.1.mlp.down_proj", other)
    with pytest.raises(ConfigError, match="needs one rank in all decoder layers"):
        factorise(model, TensorParallelConfig(degree=1, crossing="identity"))
    with pytest.raises(ConfigError, match='has a "linear" crossing already'):
        factorise(llama("linear"), TensorParallelConfig(degree=1, crossing="scalar"))
    with pytest.raises(ValueError, match="energy"):
        TensorParallelConfig(degree=1, energy=0.9, crossing="identity")
    with pytest.raises(ConfigError, match='got "tensor"'):
        gate_shapes("tensor", 4, 4)
    with pytest.raises(ModelError, match="rank 4 to rank 6"):
        gate_shapes("scalar", 4, 6)


@pytest.mark.parametrize("gate", ["linear", "low_rank"])
def test_gates_lead_between_different_ranks(gate: str) -> None:
    model = llama(None)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        layer = model.get_submodule(f"model.layers.1.{name}")
        other = type(layer)(layer.in_features, 6, 32, "silu", dtype=torch.float64)
        model.set_submodule(f"model.layers.1.{name}", other)
    factorise(model, TensorParallelConfig(degree=1, crossing=gate))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".crossing." in name:
                parameter.normal_()
    loss, _ = reference(model, gate)
    assert abs(step(model) - loss) < ROUNDING


def test_model_without_keyword_arguments_is_refused() -> None:
    model = llama(None)
    forward = type(model.model).forward

    def narrow(self: Any, input_ids: Any = None) -> Any:
        return forward(self, input_ids)

    model.model.__class__ = type("Narrow", (type(model.model),), {"forward": narrow})
    with pytest.raises(ModelError, match=r"takes no \*\*kwargs"):
        factorise(model, TensorParallelConfig(degree=1, crossing="identity"))
