"""Run on 2 ranks by test_deepspeed.py: many engines in one process start, facts left as JSON."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule

import lowtide
from lowtide.core.errors import PluginError
from lowtide.core.registry import plugins
from lowtide.hosts.deepspeed import detach
from tests.helpers.probe_plugin import ProbePlugin
from tests.helpers.ranks import leave_result

STEPS = 4
ACCUMULATION = 2


class Net(torch.nn.Module):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.second = torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x.to(self.first.weight.dtype)
        return F.cross_entropy(self.second(torch.tanh(self.first(x))), y)


def ds_config(stage: int, block: Any = None, **extra: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": 3, "warmup_min_lr": 1e-3, "warmup_max_lr": 1e-2},
        },
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000000,
        **extra,
    }
    if block is not None:
        config["lowtide"] = block
    return config


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return [
        (torch.randn(4, 16, generator=generator), torch.randint(0, 4, (4,), generator=generator))
        for _ in range(STEPS * ACCUMULATION)
    ]


def digest(engine: Any) -> str:
    hasher = hashlib.sha256()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for parameter in engine.module.parameters():
            hasher.update(parameter.detach().float().numpy().tobytes())
    return hasher.hexdigest()


def train(engine: Any, *, is_torch_style: bool = False) -> list[float]:
    losses = []
    for x, y in batches(1):
        loss = engine(x, y)
        if is_torch_style:
            loss.backward()
        else:
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def build(initialize: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    return initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def stage_facts(stage: int, **extra: Any) -> dict[str, Any]:
    """Losses and parameters of stock, lowtide without block, empty block, and a probe plugin."""
    facts: dict[str, Any] = {}
    probe = {"probe": {"is_watching": True}}
    for name, initialize, block in [
        ("stock", deepspeed.initialize, None),
        ("absent", lowtide.initialize, None),
        ("empty", lowtide.initialize, {}),
        ("disabled", lowtide.initialize, {"probe": {"enabled": False}}),
        ("probe", lowtide.initialize, probe),
    ]:
        engine = build(initialize, ds_config(stage, block, **extra))
        facts[name] = {
            "losses": train(engine),
            "digest": digest(engine),
            "class": f"{type(engine).__module__}.{type(engine).__qualname__}",
            "is_stock_class": type(engine) is deepspeed.DeepSpeedEngine,
            "has_handle": hasattr(engine, "lowtide"),
        }
        if name == "probe":
            session = engine.lowtide
            facts["seen"] = session.probe.seen
            facts["checksums"] = session.probe.checksums
            facts["update_data"] = [d for d in session.probe.data if "applied" in d]
            facts["spans"] = session.telemetry.snapshot()["spans"]
            detach(engine)
            facts["after_detach"] = {
                "is_stock_class": type(engine) is deepspeed.DeepSpeedEngine,
                "has_handle": "lowtide" in engine.__dict__,
                "leftover": [k for k in engine.__dict__ if "lowtide" in k],
                "closed_seen": session.probe.seen[-1][0],
            }
        engine.destroy()
    return facts


def torch_style_facts() -> dict[str, Any]:
    """``loss.backward()`` instead of ``engine.backward(loss)``."""
    engine = build(lowtide.initialize, ds_config(2, {"probe": {}}))
    train(engine, is_torch_style=True)
    seen = engine.lowtide.probe.seen
    engine.destroy()
    return {"seen": seen}


def overflow_facts() -> dict[str, Any]:
    """A gradient that is not finite: the skipped update is told as such."""
    bf16 = {"enabled": True, "check_grad_overflow": True}
    engine = build(lowtide.initialize, ds_config(2, {"probe": {}}, bf16=bf16))
    for index, (x, y) in enumerate(batches(1)):
        engine.backward(engine(x * torch.inf if index == 0 else x, y))
        engine.step()
    facts = {
        "applied": [d["applied"] for d in engine.lowtide.probe.data if "applied" in d],
        "skipped": engine.skipped_steps,
        "counters": engine.lowtide.telemetry.snapshot()["counters"],
    }
    engine.destroy()
    return facts


def enable_facts() -> dict[str, Any]:
    """enable() and disable() around deepspeed.initialize."""
    stock = deepspeed.initialize
    lowtide.enable()
    lowtide.enable()
    wrapped = deepspeed.initialize
    with_block = build(deepspeed.initialize, ds_config(1, {}))
    without = build(deepspeed.initialize, ds_config(1))
    facts = {
        "wraps": wrapped is not stock,
        "with_block": "lowtide" in with_block.__dict__,
        "without": type(without) is deepspeed.DeepSpeedEngine,
    }
    both = build(lowtide.initialize, ds_config(1, {"probe": {}}))
    facts["attached_once"] = len([s for s in both.lowtide.probe.seen if s[0] == "configured"]) == 1
    lowtide.disable()
    facts["restored"] = deepspeed.initialize is stock
    lowtide.disable()
    facts["still_restored"] = deepspeed.initialize is stock
    for engine in (with_block, without, both):
        engine.destroy()
    facts["destroy_gives_class_back"] = type(both) is deepspeed.DeepSpeedEngine
    return facts


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """Save with lowtide, load with stock and with lowtide; file telemetry on disk."""
    telemetry = {"telemetry": {"dir": str(folder / "telemetry"), "flush_interval_s": 0.01}}
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "monitor"}
    engine = build(
        lowtide.initialize, ds_config(2, {**telemetry, "probe": {}}, csv_monitor=monitor)
    )
    train(engine)
    engine.save_checkpoint(str(folder / "ckpt"))
    engine.lowtide.telemetry.scalar("train/loss", 1.5, engine.global_steps)
    saved = digest(engine)
    seen_save = [s for s in engine.lowtide.probe.seen if "save" in s[0]]
    engine.destroy()
    stock = build(deepspeed.initialize, ds_config(2))
    stock.load_checkpoint(str(folder / "ckpt"))
    stock_digest = digest(stock)
    stock.destroy()
    engine = build(lowtide.initialize, ds_config(2, {**telemetry, "probe": {}}))
    engine.load_checkpoint(str(folder / "ckpt"))
    rows = [
        path.read_text().splitlines()[-1]
        for path in (folder / "monitor").rglob("*.csv")
        if "Lowtide" in path.name
    ]
    facts = {
        "monitor": rows,
        "seen_save": seen_save,
        "loaded": engine.lowtide.probe.seen[-1],
        "step": engine.lowtide.step,
        "digests": [saved, stock_digest, digest(engine)],
        "resolved_stored": (folder / "ckpt" / f"global_step{STEPS}" / "lowtide.json").exists(),
    }
    engine.destroy()
    return facts


def pipeline_facts() -> dict[str, Any]:
    """Two pipeline stages: micro-batch events, and one update per train_batch."""
    facts: dict[str, Any] = {}
    for name, block in [("stock", None), ("probe", {"probe": {"is_watching": True}})]:
        torch.manual_seed(0)
        layers = [LayerSpec(torch.nn.Linear, 16, 32), LayerSpec(torch.nn.Tanh),
                  LayerSpec(torch.nn.Linear, 32, 4)]  # fmt: skip
        model = PipelineModule(layers, num_stages=2, loss_fn=F.cross_entropy)
        engine = lowtide.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(0, block)
        )[0]
        data = iter(batches(1))
        facts[name] = [engine.train_batch(data_iter=data).item() for _ in range(2)]
        if block is not None:
            facts["seen"] = engine.lowtide.probe.seen
            facts["checksums"] = engine.lowtide.probe.checksums
            facts["class"] = type(engine).__name__
        engine.destroy()
    return facts


def failure_facts() -> dict[str, Any]:
    """A listener that raises: typed error naming plugin and event; session closed, threads gone."""
    engine = build(lowtide.initialize, ds_config(1, {"probe": {"fail_in": "after_backward"}}))
    try:
        train(engine)
        text = "no error"
    except PluginError as error:
        text = str(error)
    engine.destroy()
    try:
        build(lowtide.initialize, ds_config(1, {"probe": {"fail_in": "optimizer_built",
                                                          "has_thread": True}}))  # fmt: skip
        at_start = "no error"
    except PluginError as error:
        at_start = str(error)
    threads = [t.name for t in threading.enumerate() if t.name == "lowtide-probe"]
    return {"text": text, "at_start": at_start, "threads": threads}


def main() -> None:
    plugins.register("probe", ProbePlugin)
    folder = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    facts: dict[str, Any] = {f"stage{stage}": stage_facts(stage) for stage in (0, 1, 2, 3)}
    facts["bf16"] = stage_facts(3, bf16={"enabled": True})
    facts["torch_style"] = torch_style_facts()
    facts["overflow"] = overflow_facts()
    facts["enable"] = enable_facts()
    facts["checkpoint"] = checkpoint_facts(folder)
    facts["failure"] = failure_facts()
    facts["pipeline"] = pipeline_facts()
    leave_result(facts)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
