"""Run on 2 ranks by test_deepspeed_quality.py: engines with and without the plugin."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import lowtide
from tests.helpers.ranks import leave_result
from tests.quality.models import Net, block_of

STEPS = 4


def run(stage: int, dtype: str, block: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1000000,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if block is not None:
        config["lowtide"] = block
    model = Net()
    engine = lowtide.initialize(model=model, model_parameters=[*model.parameters()], config=config)[
        0
    ]
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(2 * STEPS):
        x = torch.randn(64, 64, generator=generator)
        loss = engine(x.bfloat16() if dtype == "bf16" else x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    found: dict[str, Any] = {"losses": losses, "rng": torch.get_rng_state().sum().item()}
    if block is not None:
        found["kinds"] = engine.lowtide.quality.summary()["kinds"]
        found["failed"] = engine.lowtide.quality.summary()["failed"]
        found["newest"] = engine.lowtide.quality.newest("parameters")
        telemetry = engine.lowtide.report()["telemetry"]
        found["counters"] = telemetry["counters"]
        found["looks"] = telemetry["spans"].get("quality", {"count": 0})["count"]
    engine.destroy()
    return found


def main() -> None:
    deepspeed.init_distributed("gloo")
    stock = {f"{stage} {dtype}": run(stage, dtype, None)
             for stage, dtype in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"))}  # fmt: skip
    is_imported = "lowtide.quality.plugin" in sys.modules
    quality = {case: run(int(case[0]), case[2:], block_of()) for case in stock}
    leave_result({"stock": stock, "quality": quality, "is_imported_when_off": is_imported})


if __name__ == "__main__":
    main()
