"""Run on 2 ranks by test_deepspeed_kmeans.py: engines with and without codebooks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import lowtide
from tests.compression.activations.models import Transformer, batch
from tests.helpers.ranks import leave_result

STEPS = 4
SETTINGS = {"n_clusters": 16, "sub_dim": 4, "every_n_steps": 2, "max_iter": 8}
OFFLOAD = {"device": "emulated", "fraction": 0.5}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 0": (0, {"kmeans": SETTINGS}),
    "stage 2": (2, {"kmeans": SETTINGS}),
    "stage 3": (3, {"kmeans": SETTINGS}),
    "stage 3, offload": (3, {"kmeans": SETTINGS, "offload": OFFLOAD}),
    "outputs 2": (2, {"kmeans": SETTINGS | {"use": "activations", "include": ["blocks.*.up"]}}),
    "outputs 3": (3, {"kmeans": SETTINGS | {"use": "activations", "include": ["blocks.*.up"]}}),
}


def engine_of(stage: int, block: Any, *, is_offloaded: bool = False) -> Any:
    torch.manual_seed(0)
    model = Transformer()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "sub_group_size": 5000,
        },
        "steps_per_print": 1000000,
    }
    if is_offloaded:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["bf16"] = {"enabled": True}
    else:
        config["optimizer"]["params"]["torch_adam"] = True
    if block is not None:
        config["lowtide"] = block
    parameters = [*model.parameters()]
    return lowtide.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for step in range(2 * steps):
        loss = engine(*batch(step, rows=4, rank=dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def errors_by_hand(engine: Any) -> dict[str, float]:
    """Return each codebook's error over all of its parameter, in float64."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        book = engine.lowtide.kmeans.codebooks.get(name)
        if book is not None:
            with deepspeed.zero.GatheredParameters([parameter]):
                vectors = parameter.detach().double().reshape(-1, 1, SETTINGS["sub_dim"])
            gaps = (vectors - torch.from_numpy(book.centroids).double()).square().sum(-1)
            found[name] = (gaps.min(1).values.sum() / vectors.square().sum()).sqrt().item()
    return found


def hooks_of(engine: Any) -> int:
    return sum(len(each._forward_hooks) for each in engine.module.modules())


def case_of(stage: int, block: dict[str, Any]) -> dict[str, Any]:
    is_offloaded = "offload" in block
    stock = engine_of(stage, None, is_offloaded=is_offloaded)
    expected = train(stock, STEPS)
    hooks = hooks_of(stock)
    stock.destroy()
    engine = engine_of(stage, block, is_offloaded=is_offloaded)
    losses = train(engine, STEPS)
    plugin = engine.lowtide.kmeans
    found = {
        "losses": losses,
        "stock": expected,
        "summary": plugin.summary(),
        "centroids": {name: each.centroids.tolist() for name, each in plugin.codebooks.items()},
        "by hand": errors_by_hand(engine) if plugin.config.use == "codebook" else {},
        "hooks": hooks_of(engine) - hooks,
    }
    engine.destroy()
    return found


def resumed(folder: Path) -> dict[str, Any]:
    block = {"kmeans": SETTINGS | {"path": str(folder / "books")}}
    engine = engine_of(2, block)
    train(engine, 2)
    books = engine.lowtide.kmeans.codebooks
    engine.destroy()
    engine = engine_of(2, block)
    again = engine.lowtide.kmeans.codebooks
    engine.destroy()
    return {
        "names": list(again),
        "is same": [
            (again[name].centroids == books[name].centroids).all().item() for name in books
        ],
        "files": sorted(each.name for each in (folder / "books").iterdir()),
    }


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    engine_of(0, {"kmeans": {"enabled": False}}).destroy()
    is_imported = "lowtide.kmeans.plugin" in sys.modules
    cases = {name: case_of(*case) for name, case in CASES.items()}
    leave_result({"is_imported": is_imported, "cases": cases, "resumed": resumed(folder)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
