"""Settings: what contradicts is refused, and each family finds its rule."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from lowtide.core.errors import ConfigError
from lowtide.tensor_parallel.bottleneck import ACTIVATIONS
from lowtide.tensor_parallel.config import (
    Activation,
    RankRule,
    TensorParallelConfig,
    round_up,
)

PATH = "lowtide.tensor_parallel"


def config(**settings: Any) -> TensorParallelConfig:
    return TensorParallelConfig.model_validate({"degree": 2, **settings})


def test_defaults_ask_for_a_model_that_is_low_rank_already() -> None:
    settings = config()
    assert settings.rank_rule("attention") is None
    assert settings.rank_rule("mlp") is None
    assert (settings.init, settings.mlp_activation, settings.activation) == ("svd", "keep", None)
    assert settings.check_data
    assert settings.activation_checkpointing == "none"


def test_a_family_overrides_the_rank_of_all() -> None:
    settings = config(rank=64, mlp={"energy": 0.9})
    assert settings.rank_rule("attention") == RankRule(path=PATH, rank=64)
    assert settings.rank_rule("mlp") == RankRule(path=f"{PATH}.mlp", energy=0.9)
    assert config(attention={"rank": 8}).rank_rule("mlp") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degree": 0}, "degree"),
        ({"degree": 2.0}, "degree"),
        ({"rank": 0}, "rank"),
        ({"rank_ratio": 0.0}, "rank_ratio"),
        ({"rank_ratio": 1.5}, "rank_ratio"),
        ({"energy": 1.01}, "energy"),
        ({"rank": 8, "rank_ratio": 0.5}, "got rank and rank_ratio, which contradict"),
        ({"rank": 8, "energy": 0.5}, "got rank and energy, which contradict"),
        ({"attention": {}}, 'got none of "rank", "rank_ratio" and "energy", allowed is exactly'),
        ({"mlp": {"rank": 8, "energy": 0.5}}, 'got rank, energy of "rank"'),
        ({"mlp": {"ranks": 8}}, "mlp.ranks"),
        ({"init": "svd2"}, "init"),
        ({"init": "random", "energy": 0.9}, '"energy" measures the weights'),
        (
            {"rank": 8, "overlap_forward": True, "activation_checkpointing": "latents"},
            '"overlap_forward" goes with "activation_checkpointing": "none" only, got "latents"',
        ),
        ({"init": "random", "rank": 8, "mlp": {"energy": 0.9}}, '"energy" measures the weights'),
        ({"activation": "swish"}, "activation"),
        ({"mlp_activation": "drop"}, "mlp_activation"),
        ({"activation_checkpointing": "all"}, "activation_checkpointing"),
        ({"seed": -1}, "seed"),
        ({"degre": 2}, "degre"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**settings)


def test_degree_has_no_default() -> None:
    with pytest.raises(ValidationError, match="degree"):
        TensorParallelConfig.model_validate({"rank": 8})


def test_activations_are_those_that_exist() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("rule", "width", "limit", "rank"),
    [
        ({"rank": 10}, 4096, 4096, 10),
        ({"rank": 10}, 8, 4, 10),  # the limit is not for a rank that was asked for
        ({"rank_ratio": 0.25}, 4096, 4096, 1024),
        ({"rank_ratio": 0.25}, 36, 36, 16),
        ({"rank_ratio": 0.28}, 200, 200, 56),  # 0.28 * 200 is a little more than 56
        ({"rank_ratio": 1.0}, 100, 60, 60),
        ({"rank_ratio": 1.0}, 44, 44, 44),
        ({"energy": 0.9}, 4096, 4096, None),
    ],
)
def test_a_rule_gives_a_rank(
    rule: dict[str, Any], width: int, limit: int, rank: int | None
) -> None:
    assert RankRule(path=PATH, **rule).fixed_rank(width, limit) == rank


def test_ranks_are_rounded_up_to_multiples_of_8_within_the_limit() -> None:
    assert [round_up(rank, 20) for rank in (1, 8, 9, 16, 17, 20)] == [8, 8, 16, 16, 20, 20]


@pytest.mark.parametrize("name", ["rank", "rank_ratio", "energy"])
def test_a_rule_knows_its_key(name: str) -> None:
    assert RankRule(path=f"{PATH}.mlp", **{name: 1}).key == f"{PATH}.mlp.{name}"


@pytest.mark.parametrize(
    ("theirs", "key"),
    [
        ({"autotp_size": 2}, "tensor_parallel.autotp_size is 2"),
        ({"tp": {"tp_size": 4}}, "tensor_parallel.tp.tp_size is 4"),
        ({"tensor_parallel": {"tp_size": 4}}, "tensor_parallel.tensor_parallel.tp_size is 4"),
    ],
)
def test_the_tensor_parallelism_of_deepspeed_is_refused(theirs: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{PATH}: {key} too, and both shard the model; remove"):
        config().check_host({"tensor_parallel": theirs})


@pytest.mark.parametrize(
    "host", [{}, {"tensor_parallel": {}}, {"tensor_parallel": {"autotp_size": 1}}]
)
def test_other_hosts_are_fine(host: dict[str, Any]) -> None:
    config().check_host(host)


def test_every_setting_is_described() -> None:
    schema = TensorParallelConfig.model_json_schema()
    described = [schema["properties"], schema["$defs"]["RankConfig"]["properties"]]
    for properties in described:
        for name, entry in properties.items():
            assert entry.get("description"), name
