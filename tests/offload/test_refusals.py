"""Engines whose optimizer the plugin cannot update with stock's bits, seen once it is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from lowtide.core.errors import ConfigError
from lowtide.offload.adapters import zero3, zero12
from lowtide.offload.adapters.deepspeed import _refuse


def cpu_adam(*, fp32_optimizer_states: bool = True) -> Any:
    adam = object.__new__(DeepSpeedCPUAdam)  # its operator need not be built
    adam.fp32_optimizer_states = fp32_optimizer_states
    return adam


def optimizer(adapter: Any, **changes: Any) -> Any:
    """Return a stand-in for what DeepSpeed builds."""
    master = [torch.zeros(4)]
    facts = {
        "optimizer": cpu_adam(),
        "torch_autocast_gradscaler": None,
        "zenflow": False,
        "use_muon": False,
        "has_moe_layers": False,
        "fp32_partitioned_groups_flat": master,
        "fp16_partitioned_groups_flat": master,
        "single_partition_of_fp32_groups": master,
        "class": adapter.CLASS,
        **changes,
    }
    return type(facts.pop("class"), (), facts)()


@pytest.mark.parametrize("adapter", [zero3, zero12])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"optimizer": None}, 'no optimizer to update; add "optimizer"'),
        (
            {"optimizer": torch.optim.AdamW([torch.zeros(1)])},
            r"adamw\.AdamW, .* without \"torch_adam\"",
        ),
        ({"class": "MiCS_Optimizer"}, "DeepSpeed made a MiCS_Optimizer, and the plugin knows"),
        ({"optimizer": cpu_adam(fp32_optimizer_states=False)}, "with 16-bit optimizer states"),
        ({"torch_autocast_gradscaler": object()}, "with torch.autocast's gradient scaler"),
        ({"zenflow": True}, "with ZenFlow"),
        (
            {
                "fp32_partitioned_groups_flat": [torch.zeros(4, dtype=torch.bfloat16)],
                "single_partition_of_fp32_groups": [torch.zeros(4, dtype=torch.bfloat16)],
            },
            "with 16-bit masters",
        ),
        (
            {
                "fp32_partitioned_groups_flat": [torch.zeros(4, device="meta")],
                "single_partition_of_fp32_groups": [torch.zeros(4, device="meta")],
            },
            "with masters outside of host memory",
        ),
    ],
)
def test_what_cannot_be_done_is_named(
    adapter: Any, changes: dict[str, Any], said: str | None
) -> None:
    if said is None:
        _refuse(optimizer(adapter, **changes), adapter)
        return
    with pytest.raises(ConfigError, match=rf"lowtide\.offload: .*{said}"):
        _refuse(optimizer(adapter, **changes), adapter)


@pytest.mark.parametrize(
    ("adapter", "changes", "said"),
    [
        (zero3, {"use_muon": True}, "with Muon"),
        (zero3, {"fp16_partitioned_groups_flat": [None]}, "with parameters on NVMe"),
        (zero12, {"has_moe_layers": True}, "with mixture of experts"),
    ],
)
def test_what_one_stage_has_is_named(adapter: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"lowtide\.offload: .*{said}"):
        _refuse(optimizer(adapter, **changes), adapter)
