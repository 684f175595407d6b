"""Settings of the offload key, and what is refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from lowtide.core.config import resolve
from lowtide.core.errors import ConfigError
from lowtide.core.lifecycle import Session
from lowtide.core.schema import key_table
from lowtide.offload.config import OffloadConfig

GOOD: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
}


def with_zero(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "zero_optimization": {**GOOD["zero_optimization"], **changes}}


def with_offload(**changes: Any) -> dict[str, Any]:
    return with_zero(offload_optimizer={"device": "cpu", **changes})


def test_smallest_block() -> None:
    config = resolve({"offload": {}}, host_config=GOOD).plugins["offload"]
    assert isinstance(config, OffloadConfig)
    assert (config.device, config.fraction, config.plan) == ("auto", "auto", "auto")
    assert config.random_seed is None


@pytest.mark.parametrize(
    ("host_config", "said"),
    [
        ({}, None),
        (with_zero(stage=2), None),
        ({**GOOD, "zero_optimization": {}}, r'stage 0 with offload_optimizer.device "none"; set'),
        (with_zero(offload_optimizer={"device": "nvme"}), r'device is "nvme".*"storage": {"paths"'),
        (with_zero(offload_optimizer={}), r'device "none"; set'),
        (with_offload(super_offload=True), "super_offload is set too"),
        (with_offload(ratio=0.5), "ratio is set too"),
        (with_zero(zenflow={"topk_ratio": 0.1}), "zenflow is set too"),
        (with_zero(mics_shard_size=2), "mics_shard_size is set too"),
        ({**GOOD, "optimizer": {"type": "Muon"}}, r'optimizer.type is "Muon", allowed are "Adam"'),
        ({**GOOD, "optimizer": {"type": "Adam"}}, None),
    ],
)
def test_combinations_with_deepspeed(host_config: dict[str, Any], said: str | None) -> None:
    if said is None:
        resolve({"offload": {}}, host_config=host_config)
        return
    with pytest.raises(ConfigError, match=rf"lowtide\.offload.*{said}"):
        resolve({"offload": {}}, host_config=host_config)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"fraction": 1.5}, r"fraction.*allowed are \"auto\" and numbers from 0 to 1"),
        ({"plan": "random"}, r"plan.*allowed are \"auto\" and \"random:<seed>\""),
        ({"plan": "random:x"}, r"random:<seed>"),
        ({"device": "gpu"}, r"device.*\"gpu\""),
        ({"device_memory_bytes": -1}, "must be 0 or more"),
        ({"emulated": {"device_params_per_s": 1e6}}, '"device" is not "emulated"'),
        ({"device": "emulated", "emulated": {"host_params_per_s": 0}}, "host_params_per_s"),
        ({"fracton": 0.5}, 'Did you mean "fraction"'),
        ({"max_slots": 0}, "max_slots"),
    ],
)
def test_bad_settings_say_where_and_what_is_allowed(block: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve({"offload": block}, host_config=GOOD)


def test_random_plans_have_a_seed() -> None:
    config = resolve({"offload": {"plan": "random:12"}}, host_config=GOOD).plugins["offload"]
    assert isinstance(config, OffloadConfig)
    assert config.random_seed == 12


def test_only_behind_hosts_that_keep_the_optimizer_in_host_memory() -> None:
    with pytest.raises(ConfigError, match=r'inside DeepSpeed\'s ZeRO.*Megatron.*host is "torch"'):
        Session.open({"offload": {}}, host="torch")


def test_only_deepspeeds_json_says_where_the_optimizer_is() -> None:
    block: dict[str, Any] = {"offload": {}}
    with pytest.raises(ConfigError, match="stage 0"):
        resolve(block, host_config={"lowtide": block})
    assert "offload" in resolve(block, host_config={"lowtide": block}, host="megatron").plugins


def test_every_setting_is_explained_and_named_as_the_house_names() -> None:
    rows = [row for row in key_table() if row.path.startswith("lowtide.offload")]
    assert len(rows) > 10
    assert all(row.description for row in rows)
