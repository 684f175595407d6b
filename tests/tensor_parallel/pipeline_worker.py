"""One rank of a pipeline of sharded stages, against a plain loop with the ordinary model."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.engine as ds_engine
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import p2p
from torch import Tensor, nn

import lowtide
from lowtide.core.errors import ConfigError, ModelError
from lowtide.tensor_parallel import TensorParallelConfig, factorise
from lowtide.tensor_parallel.adapters.pipeline import pipeline_module
from tests.helpers.ranks import leave_result

WIDTH, LAYERS, VOCABULARY, RANK = 32, 4, 51, 8
MICRO, PARTS, LENGTH, STEPS = 2, 2, 9, 3
CLIP = 0.05  # well below the norm: it acts in every step
# A large epsilon: with 1e-8 Adam would turn the rounding of a gradient of 1e-9 into a whole step.
ADAM = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}


def build(*, tied: bool = False) -> nn.Module:
    """Return an ordinary Llama, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
        )
    )
    return model


def batches(replicas: int) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """Return micro-batches by step, replica and part of a step."""
    generator = torch.Generator().manual_seed(3)

    def micro() -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, VOCABULARY, (MICRO, LENGTH), generator=generator)
        labels = ids.clone()
        labels[0, :2] = -100
        return ids, labels

    return [[[micro() for _ in range(PARTS)] for _ in range(replicas)] for _ in range(STEPS)]


def settings(scenario: dict[str, Any]) -> dict[str, Any]:
    """Return the tensor_parallel block of a scenario."""
    block: dict[str, Any] = {"degree": scenario["tp"], "rank": RANK, "activation": "silu"}
    return block | scenario.get("block", {})


def open_gates(model: nn.Module) -> None:
    """Make crossings matter from the first step on."""
    for name, parameter in model.named_parameters():
        if ".crossing." in name:
            torch.nn.init.constant_(parameter, 0.05)


def expected(scenario: dict[str, Any], replicas: int) -> dict[str, Any]:
    """Train the ordinary low-rank model in a plain loop."""
    model = build(tied=scenario.get("tied", False))
    block = settings(scenario) | {"degree": 1, "activation_checkpointing": "none"}
    factorise(model, TensorParallelConfig(**block))
    open_gates(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    losses, norms = [], []
    for step in batches(replicas):
        optimizer.zero_grad()
        total = 0.0
        for ids, labels in (micro for replica in step for micro in replica):
            loss = model(ids, labels=labels).loss / (replicas * PARTS)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        found = [
            model(ids, labels=labels).loss.item()
            for replica in batches(replicas)[0]
            for ids, labels in replica
        ]
    evaluation = sum(found) / len(found)
    return {"losses": losses, "norms": norms, "state": state, "evaluation": evaluation}


class Watch:
    """Records gradient norms and what this rank sends to other stages."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.sent: list[int] = []
        self._clip, self._send = ds_engine.clip_grad_norm_, p2p.send

    def __enter__(self) -> Watch:
        def clip(*args: Any, **kwargs: Any) -> Any:
            norm = self._clip(*args, **kwargs)
            self.norms.append(float(norm))
            return norm

        def send(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.is_floating_point() and tensor.ndim > 1:
                self.sent.append(tensor.nbytes)
            return self._send(tensor, *args, **kwargs)

        ds_engine.clip_grad_norm_, p2p.send = clip, send
        return self

    def __exit__(self, *_: object) -> None:
        ds_engine.clip_grad_norm_, p2p.send = self._clip, self._send


def engine_of(scenario: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return an engine for the scenario's pipeline."""
    model = build(tied=scenario.get("tied", False))
    if scenario.get("block", {}).get("crossing"):  # low-rank already, with its own crossings
        factorise(model, TensorParallelConfig(**(settings(scenario) | {"degree": 1})))
        open_gates(model)
    module = pipeline_module(model, config, num_stages=scenario["pp"])
    optimizer = torch.optim.AdamW(module.parameters(), **ADAM)
    return lowtide.initialize(model=module, optimizer=optimizer, config=config)[0]


def config_of(scenario: dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a scenario."""
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": PARTS,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": scenario.get("zero", 0)},
        "steps_per_print": 1000,
        "lowtide": {"tensor_parallel": settings(scenario)},
    }


def feed(engine: Any, replicas: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this replica's micro-batches."""
    place = engine.grid.get_data_parallel_rank()
    for step in batches(replicas):
        yield from step[place]


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    """Train a scenario and compare with the plain loop."""
    replicas = dist.get_world_size() // (scenario["pp"] * scenario["tp"])
    config = config_of(scenario)
    with Watch() as watch:
        engine = engine_of(scenario, config)
        data = feed(engine, replicas)
        losses, zero_norms = [], []
        for _ in range(STEPS):
            losses.append(float(engine.train_batch(data_iter=data)))
            zero_norms.append(float(getattr(engine.optimizer, "_global_grad_norm", 0.0)))
    plugin = engine.lowtide.tensor_parallel
    state = plugin.state_dict(on_rank=None)
    report: dict[str, Any] = {"sent": watch.sent, "stage": engine.stage_id}
    wanted = expected(scenario, replicas)
    norms = zero_norms if scenario.get("zero", 0) else watch.norms
    report["names"] = sorted(state) == sorted(wanted["state"])
    report["parameters"] = max(
        float((state[name] - value).norm() / value.norm())
        for name, value in wanted["state"].items()
    )
    report["losses"] = max(abs(a - b) for a, b in zip(losses, wanted["losses"], strict=True))
    report["norms"] = max(abs(a / b - 1) for a, b in zip(norms, wanted["norms"], strict=True))
    evaluation = float(engine.eval_batch(feed(engine, replicas)))
    report["evaluation"] = abs(evaluation - wanted["evaluation"])
    if scenario.get("saves"):
        report["resumed"] = resumes(scenario, config, engine, replicas)
    engine.destroy()
    return report


def resumes(scenario: dict[str, Any], config: dict[str, Any], engine: Any, replicas: int) -> float:
    """Save, load into a fresh engine; return by how much the next steps differ."""
    folder = [tempfile.mkdtemp(prefix="pipeline-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    engine.save_checkpoint(folder[0], tag="a")
    fresh = engine_of(scenario, config)
    fresh.load_checkpoint(folder[0], tag="a")
    losses = []
    for each in (engine, fresh):
        data = feed(each, replicas)
        losses.append([float(each.train_batch(data_iter=data)) for _ in range(2)])
    fresh.destroy()
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def refusals() -> dict[str, str]:
    """Return the messages of what must be refused."""
    scenario: dict[str, Any] = {"pp": 2, "tp": 2}
    config = config_of(scenario)
    module = pipeline_module(build(), config, num_stages=2)
    found: dict[str, str] = {}

    def note(name: str, action: Any, *kinds: type[Exception]) -> None:
        try:
            action()
        except kinds as error:
            found[name] = str(error)

    stock = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), **ADAM),
        config={key: value for key, value in config.items() if key != "lowtide"},
    )[0]
    layer = next(each for each in module.forward_funcs if hasattr(each, "is_boundary"))
    local = torch.zeros(1, 2, WIDTH // 2)
    note("stock", lambda: layer(local), ModelError)
    stock.destroy()
    other = config_of({"pp": 2, "tp": 2, "block": {"activation": "relu"}})
    note("other", lambda: lowtide.initialize(model=module, config=other), ConfigError)
    note("degree", lambda: pipeline_module(build(), config, num_stages=3), ConfigError)
    alone = config_of({"pp": 4, "tp": 1})
    short = build()
    short.model.layers = short.model.layers[:2]  # type: ignore[union-attr, index, assignment]
    short.config.num_hidden_layers = 2  # type: ignore[union-attr]
    note("stages", lambda: pipeline_module(short, alone, num_stages=4), ModelError)
    plain = deepspeed.PipelineModule([nn.Linear(2, 2), nn.Linear(2, 2)], num_stages=2)
    note("plain", lambda: lowtide.initialize(model=plain, config=config), ModelError)
    if module.stage_id == 0:
        note("fed", lambda: module.forward_funcs[0](local), ModelError)
    return found


def main() -> None:
    """Run the scenarios given as JSON; with four ranks the refusals too."""
    deepspeed.init_distributed("gloo")
    reports = [run(each) for each in json.loads(sys.argv[1])]
    leave_result([*reports, refusals() if dist.get_world_size() == 4 else {}])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert Path(lowtide.__file__).exists()
    main()
