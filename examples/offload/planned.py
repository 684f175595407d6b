"""Optimizer state that moves, on a machine without a GPU: an emulated device, and what it did.

The model and the text are those of examples/stock_deepspeed. Stock and planned runs print the same
losses; the planned one also shows its plan and who worked when in the last update:

    torchrun --nproc-per-node 2 examples/offload/planned.py
    torchrun --nproc-per-node 2 examples/offload/planned.py --stock
    torchrun --nproc-per-node 2 examples/offload/planned.py --storage runs/a --storage runs/b
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch

import lowtide

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "stock_deepspeed"))
from train import TinyGPT, train, windows  # noqa: E402 - the folder must be known first


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(HERE / "ds.json"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stock", action="store_true", help="leave the lowtide block out")
    parser.add_argument("--storage", action="append", metavar="DIR", help="state in files there")
    options = parser.parse_args()
    config = json.loads(Path(options.config).read_text(encoding="utf-8"))
    if options.stock:
        del config["lowtide"]
    elif options.storage:
        for folder in options.storage:
            Path(folder).mkdir(parents=True, exist_ok=True)
        # About half of what a rank holds; the rest lives in the folders.
        config["lowtide"]["offload"]["storage"] = {
            "paths": options.storage,
            "host_memory_bytes": 600_000,
        }

    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = TinyGPT()
    engine, _, loader, _ = lowtide.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=list(windows()),
        config=config,
    )
    train(engine, loader, options.steps)
    if deepspeed.comm.get_rank() == 0 and not options.stock:
        print(engine.lowtide.offload.plan())
        print(engine.lowtide.offload.chart())
    engine.destroy()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
