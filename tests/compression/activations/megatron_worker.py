"""Run on 2 ranks by test_megatron_activations.py: pipeline and data parallel, facts as JSON."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from lowtide.hosts import megatron
from tests.compression.activations.models import block_of
from tests.helpers.ranks import leave_result
from tests.hosts.megatron_worker import Run, example

STEPS = 8


def trained(pipeline: int, block: Any) -> dict[str, Any]:
    """Return losses of every micro-batch, and what was held of the last one."""
    run = Run(pipeline)
    gradients: list[float] = []

    def step(function: Any) -> None:
        run.forward_backward(function)
        if not gradients:
            gradients.extend(
                value
                for each in run.chunk.parameters()
                for value in each.main_grad.flatten().tolist()
            )
        run.optimizer.step()

    function = get_forward_backward_func()
    if block is None:
        for _ in range(STEPS):
            step(function)
        return {"losses": run.losses, "gradients": gradients}
    loop = megatron.attach([run.chunk], run.optimizer, config={"lowtide": block})
    for _ in range(STEPS):
        step(loop.wrap(function))
    facts = loop.session.compression.summary()["activations"]
    loop.close()
    return {"losses": run.losses, "gradients": gradients, "facts": facts}


def errors(pipeline: int) -> dict[str, Any]:
    """Return losses and facts, with the first step's gradients as their distance to stock's."""
    stock = trained(pipeline, None)
    wanted = torch.tensor(stock["gradients"])
    found: dict[str, Any] = {"stock": stock["losses"]}
    for bits in (8, 4):
        run = trained(pipeline, block_of(bits=bits, exclude=["*.word_embeddings"]))
        distance = (torch.tensor(run["gradients"]) - wanted).norm() / wanted.norm()
        found[str(bits)] = {**run, "gradients": distance.item()}
    return found


def main() -> None:
    dist.init_process_group("gloo")
    facts: dict[str, Any] = {}
    with example.without_gpu():
        for name, pipeline in (("pipeline", 2), ("data", 1)):
            parallel_state.initialize_model_parallel(1, pipeline)
            facts[name] = errors(pipeline)
            parallel_state.destroy_model_parallel()
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
