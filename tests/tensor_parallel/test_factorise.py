"""From full rank to low rank: the same function at full rank, the right ranks below it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.bottleneck import BottleneckLinear
from lowtide.tensor_parallel.config import TensorParallelConfig
from lowtide.tensor_parallel.factorisation import Factorisation, factorise
from lowtide.tensor_parallel.factors import svd_factors
from lowtide.tensor_parallel.patterns import find_pattern, register_pattern, unregister_pattern
from lowtide.tensor_parallel.shared_svd import share_out
from tests.helpers.ranks import RankResult, run_ranks
from tests.tensor_parallel.factorise_worker import CASES, digest
from tests.tensor_parallel.models import (
    FAMILIES,
    SMALL,
    ColaLayer,
    SmallDecoder,
    hugging_face,
    in_float64,
    tokens,
)

WORKER = Path(__file__).with_name("factorise_worker.py")
PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def convert(model: nn.Module, **settings: Any) -> Factorisation:
    return factorise(model, TensorParallelConfig(degree=1, **settings))


def put(model: Any, layer: int, role: str, module: nn.Module) -> None:
    model.set_submodule(f"model.layers.{layer}.{PROJECTIONS[role]}", module)


def low_rank(role: str, rank: int, activation: Any = None) -> ColaLayer:
    inputs = 56 if role == "down" else 32
    outputs = {"k": 16, "v": 16, "gate": 56, "up": 56}.get(role, 32)
    return ColaLayer(inputs, rank, outputs, activation)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_rank_factors_give_the_same_logits(family: str) -> None:
    model = in_float64(hugging_face(family))
    expected = model(tokens()).logits
    before = sum(each.numel() for each in model.parameters())
    report = convert(model, rank=32)
    found = model(tokens()).logits
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12
    # Not the same bits: the factors have really been multiplied.
    assert not torch.equal(found, expected)
    kinds = {type(model.get_submodule(each.path)) for each in report.projections}
    assert kinds == {BottleneckLinear}
    assert len(report.projections) == 14
    assert report.parameters_before == before
    assert report.parameters_after == sum(each.numel() for each in model.parameters())
    assert all(each.rank == 32 for each in report.projections)
    assert all(each.relative_error < 1e-13 for each in report.projections)
    assert not [name for name, _ in model.named_modules() if name.endswith("proj.weight")]
    assert find_pattern(model).name == family  # a low-rank model fits its pattern too


def test_renamed_names_tell_old_from_new() -> None:
    model = hugging_face("qwen2")
    old = dict(model.named_parameters())
    report = convert(model, rank=8)
    new = dict(model.named_parameters())
    carried = [each for name in old for each in report.renamed.get(name, (name,))]
    assert sorted(carried) == sorted(new)
    for name, now in report.renamed.items():
        assert now[-1].endswith(name.rpartition(".")[2])
        if name.endswith("bias"):
            assert new[now[0]] is old[name]
        else:
            outputs, inputs = old[name].shape
            assert [tuple(new[each].shape) for each in now] == [(8, inputs), (outputs, 8)]


def test_errors_are_those_of_the_best_approximation() -> None:
    model = hugging_face("llama").double()
    weights = {path: each.weight.detach().numpy() for path, each in model.named_modules()
               if path.endswith("_proj")}  # fmt: skip
    report = convert(model, rank=10)
    for each in report.projections:
        values = np.linalg.svd(weights[each.path], compute_uv=False)
        expected = np.sqrt((values[10:] ** 2).sum() / (values**2).sum())
        assert each.relative_error == pytest.approx(expected, rel=1e-9)
        product = model.get_submodule(each.path)
        left = weights[each.path] - (product.up.weight @ product.down.weight).detach().numpy()
        assert np.linalg.norm(left) / np.linalg.norm(weights[each.path]) == pytest.approx(expected)


def test_energy_gives_each_group_the_largest_rank_that_a_member_needs() -> None:
    model = hugging_face("llama")
    needed: list[dict[str, int]] = []
    for index, layer in enumerate(model.model.layers):
        needed.append({})
        for role, path in PROJECTIONS.items():
            weight = layer.get_submodule(path).weight
            # Queries, and all of layer 1 but its values, have their energy in few directions.
            base = 0.6 if role == "q" or (index and role != "v") else 0.99
            weight.data *= base ** torch.arange(weight.shape[1])
            squares = np.linalg.svd(weight.detach().numpy(), compute_uv=False) ** 2
            share = np.cumsum(squares.astype(np.float64)) / squares.sum(dtype=np.float64)
            needed[index][role] = int(np.argmax(share >= 0.9)) + 1
    assert needed[1]["q"] <= 8 < needed[1]["v"]
    report = convert(model, energy=0.9)
    for found, need in zip(report.layers, needed, strict=True):
        for rank, roles in (
            (found.attention_inputs, "q k v"),
            (found.attention_output, "o"),
            (found.mlp_inputs, "gate up"),
            (found.mlp_output, "down"),
        ):
            most = max(need[role] for role in roles.split())
            assert rank == min(-(-most // 8) * 8, 32)
    assert report.layers[0] != report.layers[1]
    assert all(each.relative_error <= 0.1**0.5 for each in report.projections)


def test_ratio_is_of_the_model_width_and_families_may_differ() -> None:
    report = convert(hugging_face("llama"), rank_ratio=0.3, mlp={"rank": 20})
    assert {each.attention_inputs for each in report.layers} == {16}  # 9.6, rounded up
    assert {each.attention_output for each in report.layers} == {16}
    assert {(each.mlp_inputs, each.mlp_output) for each in report.layers} == {(20, 20)}


def test_a_rank_above_the_width_of_keys_leaves_them_exact() -> None:
    model = hugging_face("llama")
    report = convert(model, rank=24)
    errors = {each.path.rpartition(".")[2]: each.relative_error for each in report.projections}
    assert errors["k_proj"] < 1e-6 < 1e-3 < errors["q_proj"]
    assert model.model.layers[0].self_attn.k_proj.rank == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("init", ["svd", "random"])
def test_dtype_training_and_frozen_weights_stay(dtype: torch.dtype, init: str) -> None:
    model = hugging_face("qwen2").to(dtype)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.model.layers[1].self_attn.k_proj.bias.requires_grad_(False)
    convert(model, rank=8, init=init)
    assert {each.dtype for each in model.parameters()} == {dtype}
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    assert frozen == [
        "model.layers.0.self_attn.q_proj.down.weight",
        "model.layers.0.self_attn.q_proj.up.weight",
        "model.layers.1.self_attn.k_proj.up.bias",
    ]
    assert not model.model.layers[0].mlp.up_proj.training
    if init == "svd":
        expected = svd_factors(weight, 8)
        assert torch.equal(model.model.layers[0].self_attn.q_proj.up.weight, expected.up)


def test_random_factors_follow_seed_and_name() -> None:
    digests = []
    for seed in (0, 0, 1):
        model = hugging_face("llama")
        torch.manual_seed(len(digests))
        report = convert(model, rank=8, init="random", seed=seed, activation="silu")
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]
    assert {each.relative_error for each in report.projections} == {None}
    layer = model.model.layers[0]
    std = 8**-0.25 * (32 + 56) ** -0.25
    assert float(layer.mlp.up_proj.up.weight.detach().std()) == pytest.approx(std, rel=0.2)
    assert layer.mlp.up_proj.activation == "silu"
    assert not torch.equal(layer.mlp.up_proj.up.weight, layer.mlp.gate_proj.up.weight)


def test_the_activation_of_the_gate_can_be_dropped() -> None:
    model = in_float64(hugging_face("llama"))
    other = in_float64(hugging_face("llama", hidden_act="linear"))
    report = convert(model, rank=32, mlp_activation="none")
    assert report.shape.mlp_activation is None
    assert find_pattern(model).shape(model).mlp_activation is None
    torch.testing.assert_close(
        model(tokens()).logits, other(tokens()).logits, rtol=1e-11, atol=1e-12
    )
    assert convert(hugging_face("llama"), rank=32).shape.mlp_activation == "silu"
    # Nothing to drop is nothing to refuse.
    convert(other, rank=32, mlp_activation="none")


def all_low_rank(model: Any, rank: int, activation: Any) -> Any:
    for layer in range(2):
        for role in PROJECTIONS:
            put(model, layer, role, low_rank(role, rank, activation))
    return model


def test_a_low_rank_model_keeps_its_factors() -> None:
    torch.manual_seed(3)
    model = in_float64(all_low_rank(hugging_face("llama"), 12, nn.SiLU()))
    expected = model(tokens()).logits
    old = dict(model.named_parameters())
    report = convert(model)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-11, atol=1e-12)
    assert report.parameters_before == report.parameters_after
    assert {each.relative_error for each in report.projections} == {None}
    assert {each.rank for each in report.projections} == {12}
    new = dict(model.named_parameters())
    assert sorted(e for n in old for e in report.renamed.get(n, (n,))) == sorted(new)
    before = digest(model)
    again = convert(model, rank=12, activation="silu")  # the same as it has
    assert again.renamed == {}
    assert digest(model) == before
    assert model.get_parameter("lm_head.weight") is old["lm_head.weight"]


def test_one_family_may_be_low_rank_already() -> None:
    model = hugging_face("llama")
    for layer in range(2):
        for role in "qkvo":
            put(model, layer, role, low_rank(role, 12, nn.Tanh()))
    report = convert(model, mlp={"rank": 16})
    assert {(each.attention_inputs, each.mlp_inputs) for each in report.layers} == {(12, 16)}
    layer = model.model.layers[1]
    assert (layer.self_attn.o_proj.activation, layer.mlp.up_proj.activation) == ("tanh", None)


def test_the_rest_of_a_group_takes_the_rank_that_it_has() -> None:
    model = hugging_face("llama")
    put(model, 0, "k", low_rank("k", 12))
    report = convert(model, rank=12)
    assert report.layers[0].attention_inputs == 12
    assert model.model.layers[0].self_attn.q_proj.rank == 12


def mixed(*changes: tuple[str, int, Any]) -> Any:
    model = hugging_face("llama")
    for role, rank, activation in changes:
        put(model, 1, role, low_rank(role, rank, activation))
    return model


WHERE = "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("changes", "settings", "error", "message"),
    [
        ([], {}, ConfigError,
         "model.layers.0.self_attn.q_proj is full-rank and no rank is given for attention"),
        ([], {"attention": {"rank": 8}}, ConfigError,
         "model.layers.0.mlp.gate_proj is full-rank and no rank is given for mlp"),
        ([], {"rank": 33}, ConfigError,
         "lowtide.tensor_parallel.rank: got 33, but model.layers.0.self_attn.q_proj has 32 inputs"),
        ([], {"rank": 8, "mlp": {"rank": 40}}, ConfigError,
         r"lowtide.tensor_parallel.mlp.rank: got 40, .*at most 56 outputs, so allowed is at most"),
        ([("o", 8, None)], {"rank": 16}, ConfigError,
         f"tensor_parallel.rank: asks for rank 16, but {WHERE}.o_proj is low-rank .*with rank 8"),
        ([("o", 8, None)], {"rank_ratio": 0.5}, ConfigError,
         f"tensor_parallel.rank_ratio: asks for rank 16, but {WHERE}.o_proj is low-rank already"),
        ([("o", 8, nn.SiLU())], {"rank": 8, "activation": "relu"}, ConfigError,
         f"activation: asks for relu, but {WHERE}.o_proj is low-rank already, with silu"),
        ([("q", 8, None), ("k", 16, None)], {"rank": 8}, ModelError,
         f"rank differs among .*{WHERE}.q_proj has 8, {WHERE}.k_proj has 16"),
        ([("gate", 8, nn.SiLU()), ("up", 8, None)], {"rank": 8}, ModelError,
         "activation differs among .*gate_proj has silu, .*up_proj has None"),
        ([("q", 8, None)], {"energy": 0.5}, ModelError,
         f'{WHERE}.k_proj: is full-rank beside {WHERE}.q_proj and others of rank 8.*"rank": 8'),
        ([("q", 8, nn.SiLU())], {"rank": 8}, ConfigError,
         f"activation: asks for None, but {WHERE}.q_proj is low-rank already, with silu"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_and_nothing_is_touched(
    changes: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = mixed(*changes)
    before = digest(model)
    with pytest.raises(error, match=message):
        convert(model, **settings)
    assert digest(model) == before


def test_shared_weights_are_refused() -> None:
    model = hugging_face("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        ModelError, match=r"layers.0.mlp.up_proj: shares a parameter \(model.*untie"
    ):
        convert(model, rank=8)


def test_nan_is_refused_and_nothing_is_touched() -> None:
    model = hugging_face("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    before = digest(model)
    with pytest.raises(ModelError, match=r"cannot be factorised: model.layers.1.mlp.down_proj: ho"):
        convert(model, rank=8)
    assert digest(model) == before


@pytest.fixture
def small() -> Iterator[None]:
    register_pattern(SMALL)
    yield
    unregister_pattern("small")


def test_a_model_of_ones_own_with_fused_projections(small: None) -> None:
    torch.manual_seed(0)
    model = SmallDecoder().double()
    expected = model(tokens())
    report = convert(model, rank=32)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-11, atol=1e-12)
    assert model.unembedding.weight is model.embedding.weight
    assert report.parameters_after == sum(each.numel() for each in model.parameters())
    assert model.blocks[0].attention.key_value.out_features == 32


def test_an_activation_without_a_place_cannot_be_dropped(small: None) -> None:
    with pytest.raises(ConfigError, match='mlp_activation: is "none", but pattern "small" does no'):
        convert(SmallDecoder(), rank=8, mlp_activation="none")


def test_work_is_shared_evenly() -> None:
    owners = share_out([5, 9, 4, 8, 5, 9, 4, 8], 3)
    loads = [
        sum(c for c, o in zip([5, 9, 4, 8] * 2, owners, strict=True) if o == r) for r in range(3)
    ]
    assert sum(loads) == 52
    assert max(loads) <= 18
    assert share_out([3, 1], 4) == [0, 1]
    assert share_out([], 2) == []


@pytest.fixture(scope="module")
def ranks() -> RankResult:
    pytest.importorskip("transformers")
    return run_ranks([str(WORKER)], nproc=2, timeout_s=150).check()


@pytest.mark.dist
@pytest.mark.parametrize("case", list(CASES))
def test_two_ranks_end_with_the_same_bits(ranks: RankResult, case: str) -> None:
    first, second = (result[case] for result in ranks.results)
    assert first["digest"] == second["digest"]
    assert first["report"] == second["report"]
    model = hugging_face("qwen2").to(torch.bfloat16 if case == "bfloat16" else torch.float32)
    report = convert(model, **CASES[case])
    assert report.as_dict()["layers"] == first["report"]["layers"]
    if case == "random":
        assert digest(model) == first["digest"]
        assert first["calls"] == second["calls"] == 0
    else:
        # Every matrix has one owner, and neither rank did most of the work.
        assert first["calls"] + second["calls"] == 14
        assert 5 <= first["calls"] <= 9
        # Rank 1 had other signs, so bits that are the same on both ranks were sent.
        assert digest(model) != first["digest"]
        for one, two in zip(
            report.as_dict()["projections"], first["report"]["projections"], strict=True
        ):
            assert one["relative_error"] == pytest.approx(two["relative_error"], rel=1e-5, abs=1e-6)


@pytest.mark.dist
def test_both_ranks_hear_of_a_failure(ranks: RankResult) -> None:
    for result in ranks.results:
        assert "ModelError: the model cannot be factorised: model.layers.1.mlp." in result["nan"]
        assert "holds NaN" in result["nan"]
        assert result["other weights"].startswith("ModelError: model.embed_tokens.weight: differs")
