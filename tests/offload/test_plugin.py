"""Settings of the offload key, and what is refused before anything is built."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lowtide.core.config import resolve
from lowtide.core.errors import ConfigError, StorageError
from lowtide.core.lifecycle import Session
from lowtide.core.schema import key_table
from lowtide.offload.config import OffloadConfig
from lowtide.offload.executor import Executor
from lowtide.offload.plugin import OffloadPlugin
from lowtide.offload.scheduler import Scheduler
from lowtide.offload.subgroup import Subgroup

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


def stored(**changes: Any) -> dict[str, Any]:
    return {"offload": {"storage": {"paths": ["/a"], "host_memory_bytes": 64e9, **changes}}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_storage_is_for_all_stages(stage: int) -> None:
    config = resolve(stored(), host_config=with_zero(stage=stage)).plugins["offload"]
    assert isinstance(config, OffloadConfig)
    assert config.storage is not None
    assert [each.path for each in config.storage.folders] == ["/a"]
    assert config.storage.buffers == "auto"


def test_a_rank_whose_neighbour_cannot_store_gives_up_too(tmp_path: Path) -> None:
    config = resolve(stored(paths=[str(tmp_path)]), host_config=GOOD).plugins["offload"]
    assert isinstance(config, OffloadConfig)
    plugin = OffloadPlugin(config)
    with pytest.raises(StorageError, match="another rank cannot store its optimizer state"):
        plugin._open_storage([4096], lambda numbers: [0.0 for _ in numbers], 0)
    assert plugin._open_storage([4096], lambda numbers: numbers, 0) is None  # all of it fits


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"paths": []}, r"storage\.paths: got \[\], allowed is 1 or more"),
        ({"paths": [{"path": "/a", "read_bytes_per_s": 0}]}, '"read_bytes_per_s" must be above 0'),
        ({"paths": [{"folder": "/a"}]}, "folder"),
        ({"host_memory_bytes": 0}, r"host_memory_bytes"),
        ({"host_memory_bytes": "64GB"}, r"write 64000000000"),
        ({"buffers": 0}, '"buffers" must be 1 to 64'),
        ({"path": ["/a"]}, r"storage\.path: unknown key"),
    ],
)
def test_nonsense_about_storage_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(stored(**changes), host_config=GOOD)


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
        (with_zero(zenflow={}), "zenflow is set too"),  # on with its defaults
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
        ({"fraction": 1.5}, r"fraction: got 1\.5, allowed are \"auto\" and numbers from 0 to 1"),
        ({"plan": "random"}, r"plan: got 'random', allowed are \"auto\" and \"random:<seed>\""),
        ({"plan": "random:x"}, r"random:<seed>"),
        ({"device": "gpu"}, r"device.*\"gpu\""),
        ({"device_memory_bytes": -1}, "must be 0 or more"),
        ({"device_memory_bytes": 8e9}, r"got 8000000000\.0 .*write 8000000000\)"),
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


def test_a_device_none_of_whose_memory_may_be_used_is_there_all_the_same() -> None:
    block = {"offload": {"device": "emulated", "device_memory_bytes": 0}}
    session = Session.open(block, host="megatron")
    plugin = session.plugins["offload"]
    assert isinstance(plugin, OffloadPlugin)
    with contextlib.closing(plugin._open(session)) as device:
        assert device.kind == "emulated"
        pieces = [Subgroup("subgroup/0", 0, 0, 0, *torch.zeros(3, 64), weights=None)]
        executor = Executor(device, pieces, session.state)
        scheduler = Scheduler(plugin.config, device, lambda numbers: numbers)
        assert scheduler.next_plan(executor).is_host_only
        executor.close()
    session.close()


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
