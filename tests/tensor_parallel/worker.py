"""Run on 2 or 4 ranks by starts.py: the sharded layers beside the unsharded reference."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist

from lowtide.tensor_parallel.group import TensorGroup
from tests.helpers.ranks import leave_result
from tests.tensor_parallel import scenarios, traffic, use_scenarios
from tests.tensor_parallel.reference import registered


def main() -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    group = TensorGroup(dist.group.WORLD)
    facts: dict[str, Any] = {}
    chosen = scenarios.of_size(group.size) | traffic.ALL
    with registered():
        for name, scenario in chosen.items():
            facts[name] = scenario(group)
    for name, scenario in use_scenarios.ALL.items() if group.size == 2 else ():
        facts[name] = scenario(group)
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
