"""Run on 2 ranks by test_deepspeed_evaluation.py: engines with and without evaluations."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

import lowtide
from lowtide.core.errors import LowtideError
from tests.evaluation.training.models import Attending, batch, decode, encode, write_suite
from tests.helpers.ranks import leave_result

STEPS = 7
_MODULE = "lowtide.evaluation.plugin"


def config(stage: int, dtype: str, block: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1000000,
    }
    if dtype == "bf16":
        found["bf16"] = {"enabled": True}
    if block is not None:
        found["lowtide"] = {"evaluation": block} if block else {}
    return found


def engine_of(stage: int, dtype: str, block: Any, *, model: Any = Attending, **extra: Any) -> Any:
    torch.manual_seed(0)
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    made = model()
    settings = config(stage, dtype, block) | extra
    return lowtide.initialize(model=made, model_parameters=made.parameters(), config=settings)[0]


def train(engine: Any, steps: int = STEPS) -> list[Any]:
    found = []
    for micro in range(2 * steps):
        loss = engine(*batch(micro, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        found.append((loss.item(), random.random(), float(np.random.rand())))
    return found


def trainings(suite: str) -> dict[str, Any]:
    """Return losses and random numbers with and without evaluations, and what these found."""
    found: dict[str, Any] = {}
    for stage, dtype in [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]:
        case: dict[str, Any] = {}
        block = {"suite": suite, "every_n_steps": 2, "batch_size": 3}
        for name, own in {"stock": None, "on": block}.items():
            engine = engine_of(stage, dtype, own)
            if own is not None:
                engine.lowtide.evaluation.use(encode=encode, decode=decode)
            case[name] = train(engine)
            case[f"{name} rng"] = torch.get_rng_state().sum().item()
            if own is not None:
                case["said"] = engine.lowtide.evaluation.summary()
                case["scalars"] = engine.lowtide.telemetry.snapshot()["scalars"]
            engine.destroy()
        found[f"{stage} {dtype}"] = case
    return found


def one_rank_fails(suite: str) -> dict[str, Any]:
    """Rank 1's tokenizer breaks at its second text: before a forward pass that rank 0 waits in."""
    engine = engine_of(3, "fp32", {"suite": suite, "every_n_steps": 2})
    calls = [0]

    def breaking(text: str) -> list[int]:
        calls[0] += 1
        if dist.get_rank() == 1 and calls[0] == 2:
            raise ValueError("no such token")
        return encode(text)

    engine.lowtide.evaluation.use(encode=breaking, decode=decode)
    losses = [loss for loss, *_ in train(engine)]
    found = {"losses": losses, "said": engine.lowtide.evaluation.summary()}
    engine.destroy()
    return found


def budget(suite: str) -> dict[str, Any]:
    """Rank 1's clock says that there is always time; rank 0's that there never is."""
    block = {"suite": suite, "every_n_steps": 1, "budget_fraction": 0.5}
    engine = engine_of(0, "fp32", block)
    has_time = dist.get_rank() == 1
    engine.lowtide.evaluation._schedule.has_time = lambda: has_time
    train(engine, 3)
    found: dict[str, Any] = engine.lowtide.evaluation.summary()
    engine.destroy()
    return found


def different_suites(folder: Path) -> str:
    own = folder / str(dist.get_rank())
    own.mkdir()
    suite = write_suite(own)
    if dist.get_rank() == 1:
        (own / "held_out.txt").write_bytes(b"another text altogether" * 9)
    engine = engine_of(0, "fp32", {"suite": str(suite), "every_n_steps": 1})
    try:
        train(engine, 1)
    except LowtideError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def pipeline(suite: str) -> str:
    layers = [LayerSpec(torch.nn.Linear, 4, 4) for _ in range(2)]
    model = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
    settings = config(0, "fp32", {"suite": suite})
    try:
        lowtide.initialize(model=model, model_parameters=[*model.parameters()], config=settings)
    except LowtideError as error:
        return str(error)
    return ""


def monitored(folder: Path, suite: str) -> list[str]:
    monitor = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    block = {"suite": suite, "every_n_steps": 2}
    engine = engine_of(0, "fp32", block, csv_monitor=monitor)
    train(engine, 2)
    engine.destroy()
    dist.barrier()
    return sorted(path.name for path in (folder / "csv").rglob("*evaluation*"))


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    engine_of(0, "fp32", {}).destroy()
    engine_of(0, "fp32", {"suite": "none", "enabled": False}).destroy()
    is_imported = _MODULE in sys.modules
    plain, texts = folder / "plain", folder / "texts"
    if dist.get_rank() == 0:
        for each in (plain, texts):
            each.mkdir()
        write_suite(plain)
        write_suite(texts, with_texts=True)
    dist.barrier()
    leave_result(
        {
            "is_imported_when_off": is_imported,
            "trainings": trainings(str(texts / "suite.json")),
            "one rank fails": one_rank_fails(str(texts / "suite.json")),
            "budget": budget(str(plain / "suite.json")),
            "different": different_suites(folder),
            "monitor": monitored(folder, str(plain / "suite.json")),
            # Last: DeepSpeed keeps the grid of a pipeline for engines that come after it.
            "pipeline": pipeline(str(plain / "suite.json")),
        }
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
