"""Activations held in 4 bits: the losses, and what a forward pass leaves in memory.

The model and the text are those of examples/stock_deepspeed. The first losses are those of stock;
later ones differ a little, as gradients do:

    torchrun --nproc-per-node 2 examples/activations/held.py
    torchrun --nproc-per-node 2 examples/activations/held.py --stock
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
    options = parser.parse_args()
    config = json.loads(Path(options.config).read_text(encoding="utf-8"))
    if options.stock:
        del config["lowtide"]

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
        facts = engine.lowtide.compression.summary()["activations"]
        print(
            f"held {facts['held_bytes'] / 1e6:.2f} MB of {facts['saved_bytes'] / 1e6:.2f} MB: "
            f"{facts['packed']} tensors in {facts['bits']} bits, {facts['shared']} found again"
        )
        for reason, nbytes in facts["raw_bytes"].items():
            print(f"  as they were: {nbytes / 1e6:.2f} MB {reason}")
    engine.destroy()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
