"""What cannot be sharded is refused before anything is sent or changed, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel.bottleneck import BottleneckLinear
from lowtide.tensor_parallel.group import Pending, TensorGroup
from lowtide.tensor_parallel.shard import load_unsharded_state_dict, shard
from tests.tensor_parallel.reference import LowRankDecoder, Sizes, build, registered
from tests.tensor_parallel.starts import of_each

pytestmark = pytest.mark.timeout(600)  # the first test of each number of ranks runs all


class SilentGroup(TensorGroup):
    """Pretends to be rank 0 of `size`; a collective is an error."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a message was sent")

    def start_sum(self, owned: Tensor, *, phase: str) -> Pending:
        return self._refuse()

    maximum = gather_rows = gather_columns = scatter_sum_columns = differs = _refuse


@pytest.fixture(autouse=True)
def patterns() -> Iterator[None]:
    with registered():
        yield


def refused(model: LowRankDecoder, size: int, text: str, kind: Any = ModelError, **kw: Any) -> None:
    """Expect an error that says `text`, nothing sent, and the model as it was."""
    before = {name: id(module) for name, module in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=re.escape(text)):
        shard(model, SilentGroup(size), **kw)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())


SMALL = Sizes(layers=2)


@pytest.mark.parametrize(
    ("sizes", "size", "text"),
    [
        (replace(SMALL, width=50), 4, "50 width cannot be divided among 4 ranks"),
        (
            replace(SMALL, heads=6, kv_heads=2), 4,
            "6 query heads cannot be divided among 4 ranks",
        ),
        (
            replace(SMALL, heads=8, kv_heads=2), 4,
            "2 key/value heads cannot be divided among 4 ranks",
        ),
        (
            replace(SMALL, mlp_width=54), 4,
            "54 feed-forward width cannot be divided among 4 ranks",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(sizes: Sizes, size: int, text: str) -> None:
    refused(build(sizes), size, text)


def test_message_says_which_degrees_are_allowed() -> None:
    refused(build(SMALL), 5, "lowtide.tensor_parallel.degree may be one of [1, 2, 3, 4, 6, 8")


@pytest.mark.parametrize("tier", ["latent", "", "sharded"])
def test_unknown_tier_is_refused(tier: str) -> None:
    text = f'lowtide.tensor_parallel.activation_checkpointing: got "{tier}", allowed are'
    refused(build(SMALL), 2, text, ConfigError, tier=tier)


def test_missing_norm_is_named() -> None:
    model = build(SMALL)
    del model.layers[1].mlp_norm
    refused(model, 2, "layers.1 (Layer): has no mlp_norm")


def test_missing_projection_is_named() -> None:
    model = build(SMALL)
    del model.layers[0].up
    refused(model, 2, "layers.0 (Layer): has no up")


def test_layer_norm_is_refused() -> None:
    model = build(SMALL)
    model.norm = nn.LayerNorm(SMALL.width)  # type: ignore[assignment]
    refused(model, 2, "norm: norm is layer, allowed is rms")


def test_full_rank_projection_is_named() -> None:
    model = build(SMALL)
    model.layers[1].o = nn.Linear(48, 48).double()
    refused(model, 2, "layers.1.o: is Linear, a BottleneckLinear is needed")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rank": 12}, "layers.1: rank of projections that read the same input must be equal"),
        ({"activation": "silu"}, "layers.1: activation of projections that read the same input"),
        ({"bias": True}, "layers.1.q: has no up.bias"),
        ({"latent_bias": True}, "layers.1.q: has no down.bias"),
    ],
)
def test_projections_of_one_input_must_agree(change: dict[str, Any], text: str) -> None:
    model = build(SMALL)
    settings: dict[str, Any] = {"rank": 20, "activation": None} | change
    rank, activation = settings.pop("rank"), settings.pop("activation")
    model.layers[1].v = BottleneckLinear(48, rank, 24, activation, **settings).double()
    refused(model, 2, text)


def test_half_frozen_group_is_refused() -> None:
    model = build(SMALL)
    model.layers[1].k.down.weight.requires_grad_(False)
    refused(model, 2, "layers.1.k.down.weight: is frozen, but it is one parameter with")


def test_values_on_the_meta_device_are_refused() -> None:
    model = build(SMALL)
    weight = model.layers[1].down.up.weight
    model.layers[1].down.up.weight = nn.Parameter(weight.to("meta"))
    with pytest.raises(ModelError, match=r"layers\.1\.down\.up\.weight: its values are not here"):
        shard(model, SilentGroup(2))


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no pattern matches this model"):
        shard(nn.Sequential(nn.Linear(2, 2)), SilentGroup(2))


def test_a_shardable_model_is_sharded_without_a_message() -> None:
    """What the tests above take for granted: `SilentGroup` does not stop `shard` itself."""
    model = build(SMALL)
    names = set(model.state_dict())
    shards = shard(model, SilentGroup(2))
    assert model.layers[0].attention_in.down.weight.shape == (60, 24)
    assert set(shards.renamed) == names
    now = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert set(shards.renamed.values()) == now


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("layers.0.q.down.weight"), "layers.0.q.down.weight: is not in"),
        (
            lambda state: state.update({"layers.0.q.up.weight": torch.zeros(46, 20)}),
            "has shape (46, 20) in the state dict that was to be loaded, allowed is (48, 20)",
        ),
        (  # one row less than the vocabulary, which is filled up by a row
            lambda state: state.update({"head.weight": torch.zeros(100, 48)}),
            "head.weight: has shape (100, 48)",
        ),
    ],
)
def test_state_dict_that_does_not_fit_is_refused(change: Any, text: str) -> None:
    model, state = build(SMALL), build(SMALL, seed=1).state_dict()
    group = SilentGroup(2)
    shard(model, group)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    with pytest.raises(ModelError, match=re.escape(text)):
        load_unsharded_state_dict(model, state, group)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_loss_without_labels_is_refused() -> None:
    model = build(SMALL)
    shard(model, TensorGroup())
    with pytest.raises(ModelError, match="pass labels to the model"):
        model.loss_function(logits=torch.zeros(1, 2, 101))


@pytest.mark.dist
@pytest.mark.parametrize("nproc", [2, 4])
def test_different_data_is_refused_on_every_rank(nproc: int) -> None:
    """And all ranks go on together afterwards."""
    for found in of_each(nproc, "different_data"):
        for model in ("untied", "tied"):
            for case in ("token", "order", "shape", "length"):
                text = found[f"{model}, {case}"]
                assert f"the {nproc} ranks of one tensor-parallel group got different" in text
                assert "(this rank: shape (" in text
            assert found[f"{model}, same"] == ""
            assert found[f"{model}, unchecked"] == 0


@pytest.mark.parametrize(
    "nproc",
    [1, pytest.param(2, marks=pytest.mark.dist), pytest.param(4, marks=pytest.mark.dist)],
)
def test_tokens_and_labels_beyond_the_vocabulary_fail_on_every_rank(nproc: int) -> None:
    for found in of_each(nproc, "out_of_range"):
        assert len(found) == 12
        assert set(found.values()) <= {"IndexError", "RuntimeError"}
