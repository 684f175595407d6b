"""Run on 2 ranks by test_deepspeed_checkpoint.py: engines with and without the plugin."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule

import lowtide
from lowtide.checkpoint.files.image import Image
from lowtide.checkpoint.saving import Stage
from lowtide.core.errors import CheckpointError, PluginError
from tests.helpers.ranks import leave_result

ACCUMULATION = 2
LOADERS: list[tuple[str, Any, Any]] = [
    ("stock", deepspeed.initialize, None),
    ("lazy", lowtide.initialize, {"checkpoint": {}}),
]


class Net(torch.nn.Module):
    """Odd sizes (padding), a buffer that each forward changes, tied weights, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(17, 33)
        self.second = torch.nn.Linear(33, 17, bias=False)
        self.second.weight = torch.nn.Parameter(torch.randn(17, 33) / 6)
        self.head = torch.nn.Linear(17, 5)
        self.register_buffer("mean", torch.zeros(33))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.first(x.to(self.first.weight.dtype))
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0).to(self.mean.dtype))
        x = x - self.mean.to(x.dtype)
        return F.cross_entropy(self.head(self.second(torch.tanh(x))).float(), y)


def ds_config(stage: int, block: Any = None, **extra: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1000000,
        **extra,
    }
    if stage == 3:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if block is not None:
        config["lowtide"] = block
    return config


def build(initialize: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    return initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def steps(engine: Any, count: int, seed: int = 1) -> list[float]:
    generator = torch.Generator().manual_seed(seed * 100 + dist.get_rank())
    losses = []
    for _ in range(count * ACCUMULATION):
        x = torch.randn(4, 17, generator=generator)
        y = torch.randint(0, 5, (4,), generator=generator)
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def resumed(initialize: Any, config: Any, folder: Path, tag: Any = None) -> dict[str, Any]:
    engine = build(initialize, config)
    with pytest.MonkeyPatch.context() as patch:
        loads: list[int] = []
        load = Image.load
        counted = lambda image, *args: (loads.append(image.size_bytes), load(image, *args))[1]  # noqa: E731
        patch.setattr(Image, "load", counted)
        path, state = engine.load_checkpoint(str(folder), tag=tag)
    facts = {
        "path": path,
        "loads from memory": len(loads),
        "client_state": {k: str(v) for k, v in state.items() if k in ("average", "note")},
        "step": engine.global_steps,
        "calls": int(engine.module.calls),
        "losses": steps(engine, 3, seed=2),
    }
    engine.destroy()
    return facts


def stage_facts(folder: Path, stage: int, **extra: Any) -> dict[str, Any]:
    """Save with stock and lazily, go on, load each with both."""
    facts: dict[str, Any] = {}
    block = {"checkpoint": {}}
    for name, initialize, config in [
        ("stock", deepspeed.initialize, ds_config(stage, **extra)),
        ("lazy", lowtide.initialize, ds_config(stage, block, **extra)),
    ]:
        engine = build(initialize, config)
        before = steps(engine, 3)
        average = torch.full((3,), 1.0)
        engine.save_checkpoint(
            str(folder / name), client_state={"average": average, "note": "mine"}
        )
        average.fill_(2.0)  # the script goes on with what it owns
        after = steps(engine, 3, seed=2)
        if name == "lazy":
            facts["was_waiting"] = engine.lowtide.checkpoint.status()[0]["stage"]
            facts["committed"] = engine.lowtide.checkpoint.wait("committed", 60)
            facts["summary"] = engine.lowtide.checkpoint.summary()
        if name == "lazy" and stage < 3:
            engine.save_16bit_model(str(folder), "weights.bin")
            facts["16 bit"] = (folder / "weights.bin").is_file()
        facts[name] = {"before": before, "after": after}
        engine.destroy()
    for writer in ("stock", "lazy"):
        stock = ds_config(stage, **extra)
        lazy = ds_config(stage, block, **extra)
        facts[f"{writer} in stock"] = resumed(deepspeed.initialize, stock, folder / writer)
        facts[f"{writer} in lazy"] = resumed(lowtide.initialize, lazy, folder / writer)
    return facts


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def fallback_facts(folder: Path) -> dict[str, Any]:
    """The newest has a flipped bit: all ranks load the one before; asked for, it raises."""
    config = ds_config(2, {"checkpoint": {}})
    engine = build(lowtide.initialize, config)
    for _ in range(3):
        steps(engine, 1)
        engine.save_checkpoint(str(folder))
    engine.lowtide.checkpoint.wait("committed")
    engine.destroy()
    dist.barrier()
    if dist.get_rank() == 0:
        damage(folder / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    dist.barrier()
    facts = {"fallback": resumed(lowtide.initialize, config, folder)["step"]}
    try:
        resumed(lowtide.initialize, config, folder, tag="global_step3")
        facts["explicit"] = "loaded"
    except CheckpointError as error:
        facts["explicit"] = str(error)
    # With a "stop" key the kernel has a choice of its own, which looks at sizes only: it must not
    # take what the plugin has refused.
    if dist.get_rank() == 0:
        for tag in ("global_step1", "global_step2"):
            damage(folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    dist.barrier()
    stop = {"stop": {"then": "tell"}, "checkpoint": {}}
    engine = build(lowtide.initialize, ds_config(2, stop))
    facts["all damaged"] = engine.load_checkpoint(str(folder))[0]
    engine.destroy()
    return facts


def fault_facts(folder: Path) -> dict[str, Any]:
    """A folder that cannot be written: told on all ranks, training goes on, or not if so asked."""
    blocked = folder / "blocked"
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    facts: dict[str, Any] = {}
    for on_error in ("warn", "raise"):
        settings = {"on_error": on_error, "tiers": [{"path": str(blocked)}]}
        engine = build(lowtide.initialize, ds_config(1, {"checkpoint": settings}))
        steps(engine, 1)
        engine.save_checkpoint(str(blocked), tag="ok")
        engine.lowtide.checkpoint.wait("committed")
        if dist.get_rank() == 0:  # what takes the place of a checkpoint's folder cannot be a folder
            (blocked / "taken").write_text("a file")
        dist.barrier()
        engine.save_checkpoint(str(blocked), tag="taken/deeper")
        try:
            steps(engine, 2)
            engine.lowtide.checkpoint._saver.wait(Stage.COMMITTED)
            engine.save_checkpoint(str(blocked), tag="next")
            facts[on_error] = "went on"
        except CheckpointError as error:
            facts[on_error] = f"raised {error}"
        facts[f"{on_error} error"] = str(engine.lowtide.checkpoint.last_error)
        try:
            engine.destroy()
        except PluginError as error:
            facts["destroy"] = str(error)
        dist.barrier()
    return facts


def raised(work: Any) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def naming_facts(folder: Path) -> dict[str, Any]:
    """Tags of all sorts, a level by another name, and a folder that is none."""
    levels, taken = folder / "levels", folder / "taken"
    if dist.get_rank() == 0:
        (levels / "slow").mkdir(parents=True)
        (levels / "alias").symlink_to("slow")
        taken.write_text("a file")
    dist.barrier()
    tiers = [{"path": str(levels / "fast")}, {"path": str(levels / "slow")}]
    engine = build(lowtide.initialize, ds_config(1, {"checkpoint": {"tiers": tiers}}))
    checkpoint = engine.lowtide.checkpoint
    facts: dict[str, Any] = {}
    for tag in ("run/a/step1", 7):
        steps(engine, 1)
        engine.save_checkpoint(str(folder / "tags"), tag=tag)
        facts[f"{tag} as latest"] = engine.load_checkpoint(str(folder / "tags"))[0]
        facts[f"{tag} by its name"] = engine.load_checkpoint(str(folder / "tags"), tag=tag)[0]
    facts["missing"] = raised(lambda: engine.load_checkpoint(str(folder / "tags"), tag="step9"))
    facts["refused"] = [
        raised(lambda tag=tag: engine.save_checkpoint(str(folder / "tags"), tag=tag))  # type: ignore[misc]
        for tag in ("", ".", "run/..", ".hidden", "/")
    ]
    engine.save_checkpoint(str(taken), tag="t")  # rank 0 alone sees it at first
    steps(engine, 1)
    facts["taken"] = [checkpoint.wait(), str(checkpoint.last_error)]
    engine.save_checkpoint(str(levels / "fast" / ".." / "alias"), tag="t")
    checkpoint.wait("drained")
    with pytest.MonkeyPatch.context() as patch:  # rank 0's copy of zero_to_fp32.py hangs
        answers, waited = threading.Event(), list[bool]()
        hang = lambda *_: waited.append(answers.wait(20))  # noqa: E731
        patch.setattr("deepspeed.runtime.engine.copyfile", hang)
        engine.save_checkpoint(str(folder / "scripts"), tag="t")
        facts["scripts"] = [not waited, checkpoint.wait()]
        answers.set()
    facts["alias"] = [Path(each).name for each in checkpoint.status()[-2]["levels"]]
    facts["alias loads"] = engine.load_checkpoint(str(levels / "alias"))[0]
    engine.destroy()
    return facts


def model_only_facts(folder: Path) -> dict[str, Any]:
    """The weights alone, from and into ZeRO 3, and into a model that has more."""
    facts: dict[str, Any] = {}
    weights: dict[str, list[float]] = {}
    for stage in (2, 3):
        engine = build(lowtide.initialize, ds_config(stage, {"checkpoint": {}}))
        fresh = flat_weights(engine)
        steps(engine, 4)
        engine.save_checkpoint(str(folder / str(stage)))
        weights[str(stage)] = flat_weights(engine)
        facts[f"{stage} has learnt"] = weights[str(stage)] != fresh
        engine.destroy()
    for saved, stage in ((2, 3), (3, 2), (3, 3)):
        engine = build(lowtide.initialize, ds_config(stage, {"checkpoint": {}}))
        engine.module.register_buffer("extra", torch.ones(2))
        source, name = str(folder / str(saved)), f"{saved} to {stage}"
        if saved != stage:
            refused = lambda: engine.load_checkpoint(source, load_module_only=True)  # noqa: E731, B023
            facts[f"{name} strict"] = raised(refused)
        engine.load_checkpoint(source, load_module_only=True, load_module_strict=False)
        facts[name] = flat_weights(engine) == weights[str(saved)]
        facts[f"{name} steps"] = engine.global_steps
        engine.destroy()
    return facts


def flat_weights(engine: Any) -> list[float]:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([p.detach().flatten() for p in parameters]).tolist()


def interval_facts(folder: Path) -> dict[str, Any]:
    """Lowtide saves by itself, on two levels."""
    fast, slow = folder / "fast", folder / "slow"
    settings = {
        "every_n_steps": 2,
        "keep": 2,
        "tiers": [{"path": str(fast)}, {"path": str(slow), "every": 2}],
    }
    engine = build(lowtide.initialize, ds_config(1, {"checkpoint": settings}))
    engine.lowtide.checkpoint.client_state = lambda: {"note": f"at {engine.global_steps}"}
    for _ in range(10):
        steps(engine, 1)
        engine.lowtide.checkpoint.wait("drained")
    engine.destroy()
    dist.barrier()
    facts: dict[str, Any] = {
        "fast": sorted(p.name for p in fast.iterdir() if p.is_dir()),
        "slow": sorted(p.name for p in slow.iterdir() if p.is_dir()),
    }
    config = ds_config(1, {"checkpoint": {**settings, "every_n_steps": None}})
    facts["resumed"] = resumed(lowtide.initialize, config, slow)
    auto = {"every_n_steps": "auto", "tiers": [{"path": str(folder / "auto")}]}
    engine = build(lowtide.initialize, ds_config(1, {"checkpoint": auto}))
    steps(engine, 12)
    engine.lowtide.checkpoint.wait("committed")
    facts["auto"] = [s["step"] for s in engine.lowtide.checkpoint.status()]
    engine.destroy()
    return facts


def compact_facts(folder: Path) -> dict[str, Any]:
    """The slow level holds small copies; without the fast one they are expanded and loaded."""
    fast, slow = folder / "fast", folder / "slow"
    compact = {"codec": "lowtide.zstd", "delta": True}
    tiers = [{"path": str(fast)}, {"path": str(slow), "compact": compact}]
    settings = {"keep": 1, "tiers": tiers}
    engine = build(lowtide.initialize, ds_config(2, {"checkpoint": settings}))
    for _ in range(3):
        steps(engine, 1)
        engine.save_checkpoint(str(slow))
        engine.lowtide.checkpoint.wait("drained")
    after = steps(engine, 3, seed=2)
    engine.destroy()
    dist.barrier()
    facts: dict[str, Any] = {"after": after, "from fast": None}
    config = ds_config(2, {"checkpoint": settings})
    facts["from fast"] = resumed(lowtide.initialize, config, slow)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(fast)
    dist.barrier()
    facts["from slow"] = resumed(lowtide.initialize, config, slow)
    dist.barrier()
    facts["slow"] = sorted(p.name for p in slow.iterdir() if p.is_dir())
    facts["files"] = sorted(p.name for p in (slow / "global_step3").iterdir())
    return facts


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


def pipeline_facts(folder: Path) -> dict[str, Any]:
    """Two pipeline stages: the update does not go through engine.step()."""

    def run(initialize: Any, config: Any, load: bool) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        layers = [LayerSpec(_Block) for _ in range(4)]
        model = PipelineModule(layers=layers, num_stages=2, loss_fn=F.mse_loss)
        engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        if load:
            engine.load_checkpoint(str(folder))
        generator = torch.Generator().manual_seed(engine.global_steps)
        data = [(torch.randn(4, 16, generator=generator),) * 2 for _ in range(64)]
        batches = iter(data)
        losses = [float(engine.train_batch(batches)) for _ in range(2)]
        if not load:
            engine.save_checkpoint(str(folder))
            engine.reset_activation_shape()
            generator.manual_seed(engine.global_steps)
            data = [(torch.randn(4, 16, generator=generator),) * 2 for _ in range(64)]
            batches = iter(data)
            losses += [float(engine.train_batch(batches)) for _ in range(2)]
        return engine, losses

    engine, losses = run(lowtide.initialize, ds_config(1, {"checkpoint": {}}), False)
    facts: dict[str, Any] = {"losses": losses}
    facts["committed"] = engine.lowtide.checkpoint.wait("committed", 60)
    engine.destroy()
    dist.barrier()
    facts["files"] = sorted(p.name for p in (folder / "global_step2").iterdir())
    for name, initialize, block in LOADERS:
        engine, facts[name] = run(initialize, ds_config(1, block), True)
        engine.destroy()
    return facts


def moe_facts(folder: Path) -> dict[str, Any]:
    """A mixture of experts, one expert per rank: files of its own for each."""
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    def run(initialize: Any, block: Any, load: bool) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        expert = torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)
        )
        moe = MoE(16, expert=expert, num_experts=2, ep_size=2, k=1, min_capacity=8)

        class Sparse(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.moe = moe
                self.head = torch.nn.Linear(16, 4)

            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return F.cross_entropy(self.head(self.moe(x)[0]), y)

        model = Sparse()
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        config = ds_config(0, block)
        engine = initialize(model=model, model_parameters=groups, config=config)[0]
        if load:
            engine.load_checkpoint(str(folder))
        losses = []
        for part in range(1 if load else 2):
            torch.manual_seed(7 + engine.global_steps)  # the gate draws at random
            generator = torch.Generator().manual_seed(engine.global_steps + dist.get_rank() * 50)
            for _ in range(2 * ACCUMULATION):
                x = torch.randn(8, 16, generator=generator)
                y = torch.randint(0, 4, (8,), generator=generator)
                loss = engine(x, y)
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            if part == 0 and not load:
                engine.save_checkpoint(str(folder))
        return engine, losses

    engine, losses = run(lowtide.initialize, {"checkpoint": {}}, False)
    facts: dict[str, Any] = {"losses": losses}
    facts["committed"] = engine.lowtide.checkpoint.wait("committed", 60)
    engine.destroy()
    dist.barrier()
    facts["files"] = sorted(p.name for p in (folder / "global_step2").iterdir())
    for name, initialize, block in LOADERS:
        engine, facts[name] = run(initialize, block, True)
        engine.destroy()
    return facts


def last_words(folder: Path) -> None:
    """The script ends right after its last save, without engine.destroy()."""
    engine = build(lowtide.initialize, ds_config(1, {"checkpoint": {}}))
    steps(engine, 1)
    engine.save_checkpoint(str(folder))
    globals()["kept"] = engine  # not collected either


def main() -> None:
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    which = sys.argv[2]
    facts: dict[str, Any] = {}
    if which == "stages":
        for stage, extra in [(0, {}), (1, {"bf16": {"enabled": True}}), (2, {}), (3, {})]:
            facts[str(stage)] = stage_facts(folder / str(stage), stage, **extra)
    else:
        facts["fallback"] = fallback_facts(folder / "fallback")
        facts["fault"] = fault_facts(folder / "fault")
        facts["naming"] = naming_facts(folder / "naming")
        facts["model only"] = model_only_facts(folder / "model_only")
        facts["interval"] = interval_facts(folder / "interval")
        facts["compact"] = compact_facts(folder / "compact")
        facts["moe"] = moe_facts(folder / "moe")
        last_words(folder / "last")
        # Last of all: DeepSpeed keeps the groups of a pipeline for the rest of the process.
        facts["pipeline"] = pipeline_facts(folder / "pipeline")
    leave_result(facts)


if __name__ == "__main__":
    begin_s = time.monotonic()
    main()
    sys.stderr.write(f"rank {os.environ['RANK']}: {time.monotonic() - begin_s:.1f} s\n")
