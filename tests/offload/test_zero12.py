"""ZeRO 1 and 2: gradients are unscaled once per update, whatever became of the one before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lowtide.offload.adapters.zero12 import Zero12


def make() -> tuple[Zero12, list[torch.Tensor], list[int]]:
    leaves = [torch.zeros(4) for _ in range(3)]
    for leaf in leaves:
        leaf.grad = torch.ones(4)
    optimizer = SimpleNamespace(
        single_partition_of_fp32_groups=list(leaves),
        param_buffer_of_bit16_for_cpu_offload_groups=[torch.ones(4)] * 3,
        parallel_partitioned_bit16_groups=[[torch.ones(4)] * 2] * 3,
        get_bit16_param_group=lambda _group: [torch.ones(4)],
        _lazy_init_hp_params_optimizer_state=lambda: None,
    )
    holder = Zero12(optimizer)

    def unscale(gradients: list[torch.Tensor], _norm: Any) -> None:
        for each in gradients:
            each.mul_(0.5)

    holder.unscale = unscale
    seen: list[int] = []
    holder.updater = SimpleNamespace(  # type: ignore[assignment]
        update=lambda _scale: seen.append(sum(int((2 * g.grad).sum()) for g in leaves)),
        masters=holder.masters(), tier=None,
    )  # fmt: skip
    return holder, leaves, seen


def one_update(holder: Zero12, leaves: list[torch.Tensor]) -> None:
    for group, leaf in enumerate(leaves):
        assert leaf.grad is not None
        holder.note([leaf.grad], None)
        holder.update_at(group)
        optimizer = holder._optimizer  # stock rounds now, and finds nothing
        assert optimizer.single_partition_of_fp32_groups[group].numel() == 0
        assert optimizer.parallel_partitioned_bit16_groups[group][1].numel() == 0
    holder.show_rounded()
    assert list(map(id, holder._optimizer.single_partition_of_fp32_groups)) == list(map(id, leaves))
    assert holder._optimizer.parallel_partitioned_bit16_groups[2][1].numel() == 4


def test_each_gradient_is_unscaled_once_before_the_update() -> None:
    holder, leaves, seen = make()
    for _ in range(2):
        for leaf in leaves:
            assert leaf.grad is not None
            leaf.grad.fill_(1.0)
        one_update(holder, leaves)
        assert [float(leaf.grad[0]) for leaf in leaves if leaf.grad is not None] == [0.5] * 3
    assert seen == [12, 12]


def test_an_update_that_was_broken_off_leaves_nothing_behind() -> None:
    holder, leaves, seen = make()
    holder.note([leaves[0].grad], None)  # type: ignore[list-item]
    for leaf in leaves:
        assert leaf.grad is not None
        leaf.grad.fill_(1.0)
    one_update(holder, leaves)
    assert seen == [12]
