"""Codebooks of the weights, fitted while training runs; then the model as its codes say it is.

The model and the text are those of examples/stock_deepspeed, and so are the losses, bit for bit:

    torchrun --nproc-per-node 2 examples/kmeans/codebooks.py
    torchrun --nproc-per-node 2 examples/kmeans/codebooks.py --stock
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


def loss_of(engine: deepspeed.DeepSpeedEngine, data: torch.Tensor) -> float:
    """Return the mean loss over some windows that training has not come to."""
    with torch.no_grad():
        return sum(engine.module(part).item() for part in data.split(32)) / len(data.split(32))


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
    data = windows()
    engine, _, loader, _ = lowtide.initialize(
        model=model, model_parameters=model.parameters(), training_data=list(data), config=config
    )
    train(engine, loader, options.steps)
    if not options.stock and deepspeed.comm.get_rank() == 0:
        report(engine, data[-256:])
    engine.destroy()
    deepspeed.comm.destroy_process_group()


def report(engine: deepspeed.DeepSpeedEngine, data: torch.Tensor) -> None:
    """Print each codebook, then the loss of the model whose weights are what their codes say."""
    facts = engine.lowtide.kmeans.summary()
    for name, book in facts["codebooks"].items():
        print(f"{name}: {book['bits_per_value']} bits, relative error {book['relative_error']:.3f}")
    before = loss_of(engine, data)
    parameters = dict(engine.module.named_parameters())
    with torch.no_grad():
        for name, book in engine.lowtide.kmeans.codebooks.items():
            parameters[name].copy_(book.decode(book.encode(parameters[name])))
    print(f"loss {before:.4f}; of the model as its codes say it is {loss_of(engine, data):.4f}")
    faults = facts["faults"]
    print(
        f"{facts['fits']} fits took {facts['share']:.1%} of the time; of {faults['checks']} checks "
        f"{faults['detected']} found an error"
    )


if __name__ == "__main__":
    main()
