"""Run on 2 ranks by test_megatron.py: data- and pipeline-parallel loops, facts left as JSON."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

from lowtide.core.errors import LowtideError
from lowtide.core.lifecycle import Event
from lowtide.core.registry import plugins
from lowtide.hosts import megatron
from tests.helpers.examples import load_example
from tests.helpers.probe_plugin import ProbePlugin
from tests.helpers.ranks import leave_result

STEPS = 3
CONFIG: dict[str, Any] = {"lowtide": {"probe": {}}}


example = load_example("megatron_core")


class Run:
    """One tiny model, optimizer and data stream, made anew with the same seed."""

    def __init__(self, pipeline: int) -> None:
        torch.manual_seed(0)
        options = argparse.Namespace(tensor=1, pipeline=pipeline, rank=0)
        self.chunk, self.optimizer = example.build(options)
        self.data = example.batches()
        self.losses: list[float] = []

    def forward_backward(self, function: Callable[..., Any], **extra: Any) -> None:
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        records = function(
            forward_step_func=example.forward_step,
            data_iterator=self.data,
            model=[self.chunk],
            num_microbatches=example.MICRO_BATCHES,
            seq_length=example.SEQUENCE,
            micro_batch_size=example.BATCH,
            **extra,
        )
        self.losses += [record["loss"].item() for record in records]

    def train(self, function: Callable[..., Any]) -> None:
        for _ in range(STEPS):
            self.forward_backward(function)
            self.optimizer.step()

    def digest(self) -> str:
        hasher = hashlib.sha256()
        for parameter in self.chunk.parameters():
            hasher.update(parameter.detach().numpy().tobytes())
        return hasher.hexdigest()

    def trace(self) -> dict[str, Any]:
        """What a host adapter could leave behind."""
        return {
            "optimizer": sorted(vars(self.optimizer)),
            "inner": [sorted(vars(o)) for o in self.optimizer.chained_optimizers],
            "hooks": [
                [len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)]
                for m in self.chunk.modules()
            ],
            "schedules": [
                f"{name}:{id(value)}" for name, value in vars(schedules).items() if callable(value)
            ],
        }


def events(session: Any, since: int = 0) -> list[list[Any]]:
    """Return [event, micro_batch, applied] of every event seen."""
    pairs = zip(session.probe.seen[since:], session.probe.data[since:], strict=True)
    return [[seen[0], data.get("micro_batch"), data.get("applied")] for seen, data in pairs]


def training_facts(pipeline: int) -> dict[str, Any]:
    """Stock against attached: losses, parameters, order of events, traces."""
    function = get_forward_backward_func()
    stock = Run(pipeline)
    stock.train(function)
    run = Run(pipeline)
    before = run.trace()
    loop = megatron.attach([run.chunk], run.optimizer, config=CONFIG)
    session: Any = loop.session
    during = run.trace()
    run.train(loop.wrap(function))
    facts = {
        "losses": [stock.losses, list(run.losses)],
        "digests": [stock.digest(), run.digest()],
        "events": events(session),
        "step": session.step,
        "spans": session.telemetry.snapshot()["spans"],
        "is_last": parallel_state.is_pipeline_last_stage(),
    }
    loop.close()
    loop.close()
    facts["trace_differs_while_attached"] = before != during
    facts["trace_after_close"] = before == run.trace()
    seen = len(session.probe.seen)
    run.train(function)
    facts["events_after_close"] = len(session.probe.seen) - seen
    return facts


def update_facts() -> dict[str, Any]:
    """What is true at the update events; skipped updates; a step taken apart by the loop."""
    run = Run(1)
    loop = megatron.attach(run.chunk, run.optimizer, config=CONFIG)
    session: Any = loop.session
    function = loop.wrap(get_forward_backward_func())
    digests: dict[str, str] = {}
    gradients: list[float] = []

    def main_gradient() -> float:
        return sum(p.main_grad.abs().sum().item() for p in run.chunk.parameters())

    on = session.hooks.on
    on(Event.AFTER_BACKWARD, lambda _: gradients.append(main_gradient()), plugin="test")
    for event in (Event.BEFORE_UPDATE, Event.AFTER_UPDATE):
        on(event, lambda m: digests.__setitem__(m.event.value, run.digest()), plugin="test")
    digests["start"] = run.digest()
    run.forward_backward(function)
    run.optimizer.step()
    facts: dict[str, Any] = {"digests": dict(digests), "gradients": gradients}

    inner = run.optimizer.chained_optimizers[0]
    inner.prepare_grads = lambda: True  # what a found infinity looks like from outside
    since, at = len(session.probe.seen), run.digest()
    run.forward_backward(function)
    facts["skip_result"] = list(run.optimizer.step())
    facts["skip"] = events(session, since)[-3:]
    facts["skip_unchanged"] = run.digest() == at
    facts["skip_step"] = session.step
    facts["skip_counters"] = session.telemetry.snapshot()["counters"]
    facts["skip_update_spans"] = session.telemetry.snapshot()["spans"]["update"]
    del inner.prepare_grads

    since = len(session.probe.seen)
    run.forward_backward(function)
    run.optimizer.prepare_grads()
    run.optimizer.step_with_ready_grads()
    facts["apart"] = events(session, since)[-3:]

    since = len(session.probe.seen)
    run.forward_backward(function, forward_only=True)
    facts["evaluation"] = [e[0] for e in events(session, since)]
    facts["evaluation_training"] = session.probe.data[-1]["training"]
    loop.close()
    return facts


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """The save and load contexts around the loop's own files."""
    run = Run(1)
    loop: Any = megatron.attach(run.chunk, run.optimizer, config=CONFIG)
    run.train(loop.wrap(get_forward_backward_func()))
    path = folder / f"rank{dist.get_rank()}.pt"
    since = len(loop.session.probe.seen)
    with loop.save(path, tag="a"):
        torch.save(run.chunk.state_dict(), path)
    saved = [loop.session.probe.seen[since:], loop.session.probe.data[since:]]
    try:
        with loop.save(path):
            raise OSError("disk full")
    except OSError:
        failed = loop.session.probe.seen[-1][0]
    loop.close()
    again: Any = megatron.attach(run.chunk, run.optimizer, config=CONFIG)
    with again.load(path) as resume_from:
        run.chunk.load_state_dict(torch.load(path))
        resume_from(STEPS)
    facts = {"saved": saved, "failed": failed, "loaded": again.session.probe.seen[-1]}
    again.close()
    return facts


def torch_optimizer_facts() -> list[list[Any]]:
    """A plain torch optimizer, a model with several outputs, no wrap()."""

    class Two(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return {"both": (y, [y * 2]), "note": "text"}

    model = Two(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = megatron.attach(model, optimizer, config=CONFIG)
    for _ in range(2):
        outputs = model(torch.ones(2, 3))
        (outputs["both"][0].sum() + outputs["both"][1][0].sum()).backward()
        optimizer.step()
    session: Any = loop.session
    loop.close()
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    return events(session)


def error_facts() -> dict[str, str]:
    """The text of every refusal."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mixed, graphed = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    mixed.config = argparse.Namespace(overlap_moe_expert_parallel_comm=True)  # type: ignore[assignment]
    graphed.config = argparse.Namespace(cuda_graph_scope=["full_iteration"])  # type: ignore[assignment]
    failing = {"lowtide": {"probe": {"fail_in": "optimizer_built"}}}
    attempts: dict[str, Callable[[], Any]] = {
        "no_block": lambda: megatron.attach(model, optimizer, config={}),
        "no_method": lambda: megatron.attach(model, object(), config=CONFIG),
        "mixed": lambda: megatron.attach([model, mixed], optimizer, config=CONFIG),
        "graphed": lambda: megatron.attach(graphed, optimizer, config=CONFIG),
        "listener": lambda: megatron.attach(model, optimizer, config=failing),
    }
    texts = {name: refusal(attempt) for name, attempt in attempts.items()}
    texts["left_behind"] = f"{len(model._forward_hooks)}"
    loop = megatron.attach(model, optimizer, config=CONFIG)
    texts["twice"] = refusal(lambda: megatron.attach(model, optimizer, config=CONFIG))
    loop.close()
    symbol = megatron.Symbol("megatron.core.optimizer.optimizer", "MegatronOptimizer.moved")
    stock: Any = megatron._SYMBOLS
    megatron._SYMBOLS = (symbol,)  # type: ignore[assignment]
    texts["moved"] = refusal(lambda: megatron.attach(model, optimizer, config=CONFIG))
    megatron._SYMBOLS = stock
    return texts


def refusal(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except LowtideError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    plugins.register("probe", ProbePlugin)
    dist.init_process_group("gloo")
    facts: dict[str, Any] = {}
    with example.without_gpu():
        parallel_state.initialize_model_parallel(1, 2)
        facts["pipeline"] = training_facts(2)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(1, 1)
        facts["data"] = training_facts(1)
        facts["update"] = update_facts()
        facts["checkpoint"] = checkpoint_facts(Path(sys.argv[1]))
        facts["torch"] = torch_optimizer_facts()
        facts["errors"] = error_facts()
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
