"""One rank: a sharded model with crossings against the plain reference."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowtide.tensor_parallel import TensorGroup, shard, unsharded_state_dict
from lowtide.tensor_parallel.recompute import TIERS
from lowtide.tensor_parallel.sharding import sharded_parameters
from tests.helpers.ranks import leave_result
from tests.tensor_parallel.crossing_model import llama, loss_of, reference, tokens


def distance(a: Tensor, b: Tensor) -> float:
    """Return the relative distance in the Frobenius norm."""
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def whole_gradients(model: nn.Module, group: TensorGroup) -> dict[str, Tensor]:
    """Return the gradients of the unsharded weights."""
    result = {}
    for name, parts in sharded_parameters(model):
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        by_rank = group.gather_rows(gradient.unsqueeze(0), phase="export")
        for part in parts:
            result[part.name] = part.join([each[part.rows] for each in by_rank])
    return result


def spread(model: nn.Module, group: TensorGroup) -> float:
    """Return by how much replicated gradients differ between ranks; 0 is none."""
    worst = 0.0
    for name, parts in sharded_parameters(model):
        if parts[0].dim is None:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            rows = group.gather_rows(gradient.unsqueeze(0), phase="export")
            worst = max(worst, float((rows - rows[:1]).abs().max()))
    return worst


def run(
    model: nn.Module,
    expected_loss: Tensor,
    expected: dict[str, Tensor],
    tier: str,
    group: TensorGroup,
    overlaps: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Shard a model, run one step, compare with the expected loss and gradients."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    shard(model, group, tier=tier, overlaps_forward=overlaps)
    exported = unsharded_state_dict(model, group)
    group.traffic.messages.clear()
    group.traffic.payload_bytes.clear()
    model.train()
    loss = loss_of(model(tokens()).logits, tokens())
    forward = dict(group.traffic.messages)
    loss.backward()
    backward = dict(group.traffic.messages)
    gradients = whole_gradients(model, group)
    flagged = [
        name
        for name, parameter in model.named_parameters()
        if ".gates." in name and getattr(parameter, "tensor_model_parallel", None) is not False
    ]
    return {
        "loss": distance(loss.detach(), expected_loss),
        "gradient": max(distance(gradients[name], each) for name, each in expected.items()),
        "names": sorted(gradients) == sorted(expected),
        "gates": sum(".crossing." in name for name in gradients),
        "export": all(torch.equal(exported[name], before[name]) for name in before),
        "spread": spread(model, group),
        "flagged": flagged,
        "forward": forward,
        "backward": backward,
    }, gradients


def compare(gates: Sequence[str], group: TensorGroup) -> dict[str, Any]:
    """Return one report per gate and tier."""
    group.check_data = False
    result: dict[str, Any] = {}
    for gate in gates:
        source = llama(gate)
        loss, expected = reference(source, gate)
        by_tier = {tier: run(copy.deepcopy(source), loss, expected, tier, group) for tier in TIERS}
        plain = by_tier["none"][1]
        result[gate] = {tier: report for tier, (report, _) in by_tier.items()}
        in_turns, _ = run(source, loss, expected, "none", group, overlaps=True)
        result[gate]["in turns"] = {key: in_turns[key] for key in ("loss", "gradient", "spread")}
        result[gate]["tiers_equal"] = all(
            torch.equal(plain[name], gradients[name])
            for _, gradients in by_tier.values()
            for name in plain
        )
    return result


def main() -> None:
    """Compare the gates named on the command line on all ranks."""
    dist.init_process_group("gloo")
    leave_result(compare(sys.argv[1:], TensorGroup(dist.group.WORLD)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
