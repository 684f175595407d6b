"""Bottleneck layers in a Megatron-core GPT model: 1, 2 and 4 ranks against a plain reference."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowtide.core.errors import ConfigError, HostError, ModelError
from lowtide.tensor_parallel.adapters import megatron_checkpoint
from lowtide.tensor_parallel.adapters.megatron import bottleneck_layer_spec, layer_class
from lowtide.tensor_parallel.adapters.megatron_settings import (
    LayerSizes,
    check_config,
    tier_of,
)
from lowtide.tensor_parallel.layers import Part
from tests.helpers.ranks import REPOSITORY, free_port, run_command, run_ranks
from tests.tensor_parallel import megatron_reference as reference

pytest.importorskip("megatron.core.package_info")

SIZES = (1, 2, 4)
ENDS = {
    "embedding.word_embeddings.weight": 0,
    "decoder.final_layernorm.weight": None,
    "decoder.final_layernorm.bias": None,
    "output_layer.weight": 0,
}


class Start:
    """What one start of 4 ranks left, for each number of tensor-parallel ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        argv = ["tests/tensor_parallel/megatron_worker.py", str(folder)]
        ranks = run_ranks(argv, nproc=4, timeout_s=240).check().results
        self.facts = {size: [facts[str(size)] for facts in ranks] for size in SIZES}
        self.pipeline = [facts["pipeline"] for facts in ranks]

    def tensors(self, variant: str, size: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Whole values and gradients by their global names."""
        files = [self.folder / f"{variant}.{size}.{rank}.pt" for rank in range(size)]
        ranks = [torch.load(path) for path in files]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in ranks[0]:
            layer = re.match(r"decoder\.layers\.(\d+)\.block\.", name)
            if layer is None:
                names, dim, at = [name], ENDS[name], ""
            else:
                names, dim = reference.LAYOUT[name[layer.end() :]]
                at = f"decoder.layers.{layer[1]}."
            lengths = [self._rows(variant, at, each, ranks[0][name][0], size) for each in names]
            both = [reference.joined([r[name][i] for r in ranks], dim, lengths) for i in (0, 1)]
            found |= {
                at + each: pair for each, pair in zip(names, zip(*both, strict=True), strict=True)
            }
        return found

    @staticmethod
    def _rows(variant: str, at: str, name: str, local: Tensor, size: int) -> int:
        if at:
            return len(reference.whole(reference.VARIANTS[variant], 0, name))
        return len(local) * (1 if ENDS[name] is None else size)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return Start(tmp_path_factory.mktemp("megatron"))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_loss_and_gradients_are_those_of_the_plain_model(
    start: Start, variant: str, size: int
) -> None:
    found = start.tensors(variant, size)
    plain = reference.Reference(
        reference.VARIANTS[variant], {name: found[name][0] for name in ENDS if name in found}
    )
    loss = plain.loss(*reference.batch())
    loss.backward()
    for facts in start.facts[size]:
        for kind in ("mask", "causal"):
            assert facts[variant][kind] == pytest.approx(loss.item(), rel=1e-13)
    assert found.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert tensor.grad is not None
        assert distance(found[name][1], tensor.grad) < 1e-12, name


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_bfloat16_is_no_less_exact_than_on_one_rank(start: Start, size: int) -> None:
    alone = start.facts[1][0]["bfloat16"]
    for facts in start.facts[size]:
        for variant, error in facts["bfloat16"].items():
            assert 1e-4 < error < 1.5 * alone[variant], variant


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
def test_initial_model_is_the_same_for_every_number_of_ranks(start: Start, size: int) -> None:
    for variant in reference.VARIANTS:
        found, alone = start.tensors(variant, size), start.tensors(variant, 1)
        for name, (value, _) in found.items():
            assert torch.equal(value, alone[name][0]), name
            if name not in ENDS:
                _, _, layer, rest = name.split(".", 3)
                expected = reference.whole(reference.VARIANTS[variant], int(layer), rest)
                assert torch.equal(value, expected), name


@pytest.mark.dist
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_a_layer_sends_its_messages_and_a_stage_one_gather(
    start: Start, variant: str, size: int
) -> None:
    layers = reference.LAYERS
    forward, backward = (reference.VARIANTS[variant][way] for way in ("forward", "backward"))
    for facts in start.facts[size]:
        if size == 1:
            assert facts[variant]["forward"] == facts[variant]["backward"] == {}
            continue
        # Seen by torch, whoever calls; the second count is the layers' own.
        assert facts[variant]["forward"] == {
            "allreduce_": forward * layers, "_allgather_base_": 1,
        }  # fmt: skip
        assert facts[variant]["backward"] == {
            "allreduce_": backward * layers, "_allgather_base_": 1,
        }  # fmt: skip
        assert facts[variant]["counted"] == {
            "forward/all_reduce": forward * layers, "forward/all_gather": 1,
            "backward/all_reduce": backward * layers, "backward/all_gather": 1,
        }  # fmt: skip


@pytest.mark.dist
def test_parameters_carry_megatrons_attributes(start: Start) -> None:
    for facts in start.facts[2]:
        flags = facts["cola"]["flags"]
        layout = {n: each for n, each in reference.LAYOUT.items() if "norm_bias" not in n}
        assert flags.keys() == layout.keys()
        for name, (_, dim) in layout.items():
            expected = [False, -1, 1, False] if dim is None else [True, dim, 1, False]
            assert flags[name] == expected, name


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_training_with_megatrons_optimizer_goes_as_on_one_rank(start: Start, size: int) -> None:
    expected = start.facts[1][0]["train"]
    assert len(set(expected["losses"])) == len(expected["losses"]) == 10
    for facts in start.facts[size]:
        assert facts["train"]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert facts["train"]["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.dist
def test_checkpoint_holds_whole_tensors_by_projection(start: Start) -> None:
    saved = start.facts[2][0]["saved"]
    variant = reference.VARIANTS["cola"]
    expected = {
        f"decoder.layers.{name}": [reference.LAYERS, *reference.whole(variant, 0, name).shape]
        for name in reference.layer_names(variant)
    }
    expected |= {name: saved[name] for name in ENDS if "bias" not in name}  # Megatron-core's own
    states = {
        f"optimizer.state.{kind}.{name}": shape
        for kind in ("exp_avg", "exp_avg_sq")
        for name, shape in expected.items()
    }
    assert saved == expected | states


@pytest.mark.dist
def test_checkpoint_of_two_ranks_goes_on_with_other_numbers_of_ranks(start: Start) -> None:
    expected = start.facts[2][0]["more"]
    assert len(expected["losses"]) == 6
    resumed = [facts["more"] for size in (1, 4) for facts in start.facts[size]]
    resumed += start.pipeline  # 2 stages of 2 ranks; only the last sees losses
    assert [len(each["losses"]) for each in resumed] == [6] * 8 + [0, 0, 6, 6]
    for facts in resumed:
        assert facts["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        if facts["losses"]:
            assert facts["losses"] == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        ("head norms", ["TransformerConfig.qk_layernorm", "beside LayerNorm", "RMSNorm"]),
        ("norm", ["TransformerConfig.normalization", "'L2Norm'", "'RMSNorm'", "change it"]),
        ("rank", ["decoder.layers.0.self_attention.linear_q", "rank 99", "at most 32"]),
        ("packed", ["decoder.layers.0", "packed_seq_params", "attention mask"]),
        ("rotary", ["rotary_pos_emb", "(6, 1, 1, 8)", "at most 4"]),
    ],
)
def test_models_and_calls_that_cannot_be_are_refused(
    start: Start, attempt: str, parts: list[str]
) -> None:
    text = start.facts[1][0]["refusals"][attempt]
    assert text.startswith("ModelError: ")
    for part in parts:
        assert part in text


def configuration(**fields: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    base = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "num_query_groups": 4,
        "ffn_hidden_size": 48, "normalization": "RMSNorm", "gated_linear_unit": True,
        "hidden_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return TransformerConfig(**(base | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"gated_linear_unit": False},
        {"hidden_dropout": 0.1},
        {"attention_dropout": 0.1},
        {"sequence_parallel": True, "tensor_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"fp32_residual_connection": True},
        {"window_size": (4, 0)},
        {"softmax_type": "off-by-one"},
        {"rotary_interleaved": True},
        {"layernorm_zero_centered_gamma": True},
        {"num_moe_experts": 2, "moe_ffn_hidden_size": 32, "add_bias_linear": False},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_configs_that_would_be_left_out_are_refused_by_field(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    check_config(configuration())
    with pytest.raises(ModelError, match=rf"TransformerConfig\.{name}: got .*{fields[name]}"):
        check_config(configuration(**fields))


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size"]
)
def test_sizes_must_divide(name: str) -> None:
    config = configuration()
    setattr(config, name, 6)
    with pytest.raises(ModelError, match=rf"TransformerConfig\.{name}: got 6, which 4 "):
        LayerSizes.of(config, 4)


def test_flat_ranges_of_joined_projections_are_refused() -> None:
    part = Part("linear_q.up.weight", slice(None), (8,), 0)
    maker = megatron_checkpoint._Maker("up.weight", (part,), (), None)
    with pytest.raises(ModelError, match=r"layers\.up\.weight: a flat range .*fully_reshardable"):
        maker.split("layers.up.weight", torch.zeros(8, 2), (0, 0, 0), slice(0, 4))


@pytest.mark.parametrize(
    ("given", "granularity", "tier"),
    [
        (None, None, "none"),
        (None, "selective", "latents"),
        ("none", "selective", "none"),
        ("sharded_latents", None, "sharded_latents"),
    ],
)
def test_recompute_granularity_is_a_tier_unless_one_is_given(
    given: str | None, granularity: str | None, tier: str
) -> None:
    spec = bottleneck_layer_spec(8, activation_checkpointing=given)
    config = configuration(recompute_granularity=granularity)
    assert tier_of(spec.params["setting"], config) == tier


def test_overlap_does_not_go_with_checkpointing() -> None:
    spec = bottleneck_layer_spec(8, overlap_forward=True)
    assert tier_of(spec.params["setting"], configuration()) == "none"
    with pytest.raises(ConfigError, match='"none" only, got "latents"'):
        tier_of(spec.params["setting"], configuration(recompute_granularity="selective"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "attention_rank is None, allowed is a whole number from 1"),
        ({"attention_rank": 8}, "mlp_rank is None"),
        ({"rank": 0}, "attention_rank is 0"),
        ({"rank": 8, "activation": "silo"}, '"silo".*silu'),
        ({"rank": 8, "activation_checkpointing": "latent"}, '"latent".*latents'),
    ],
)
def test_specs_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bottleneck_layer_spec(**options)


def test_missing_megatron_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.module", None)
    with pytest.raises(HostError, match="megatron-core cannot be imported"):
        layer_class.__wrapped__()


def test_key_of_the_json_is_refused_under_megatron_and_points_to_the_spec() -> None:
    from lowtide.hosts import megatron

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"lowtide": {"tensor_parallel": {"degree": 2, "rank": 8}}}
    with pytest.raises(ConfigError) as caught:
        megatron.attach(model, optimizer, config=config)
    where = "lowtide.tensor_parallel.adapters.megatron.bottleneck_layer_spec"
    assert where in str(caught.value)
    assert where == f"{bottleneck_layer_spec.__module__}.{bottleneck_layer_spec.__name__}"
    assert not model._forward_hooks


@pytest.mark.dist
def test_example_learns_with_low_rank_layers(tmp_path: Path) -> None:
    script = str(REPOSITORY / "examples" / "megatron_core" / "train.py")
    command = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), script]
    command += ["--tensor", "2", "--rank", "16", "--steps", "20"]
    log = run_command(command, timeout_s=150, cwd=tmp_path).check().logs[0]
    losses = [float(text) for text in re.findall(r"^step \d+ loss (\S+)$", log, re.MULTILINE)]
    assert len(losses) == 20
    assert losses[0] > 5.0
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0
    # 2 layers, 2 micro-batches, 20 steps.
    assert f"'forward/all_reduce': {4 * 2 * 2 * 20}" in log
