"""Train a tiny byte-level language model with Accelerate on DeepSpeed, Lowtide switched on.

torchrun --nproc-per-node 2 examples/accelerate/train.py
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.utils.data import DataLoader

import lowtide

lowtide.enable()  # the only line for Lowtide; the rest is Accelerate as usual

HERE = Path(__file__).resolve().parent
OPS = HERE.parents[1] / ".cache" / "torch_extensions"
if OPS.is_dir():  # the CPU operations that `make train` has compiled: no second wait for them
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(OPS))
SEQUENCE = 64


class ByteRNN(nn.Module):
    """One recurrent layer over bytes; returns the mean cross-entropy in nats."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # tokens: uint8, (B, SEQUENCE + 1)
        tokens = tokens.long()
        hidden, _ = self.recurrence(self.embedding(tokens[:, :-1]))
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def windows() -> list[torch.Tensor]:
    """Return the source of some standard-library modules in windows of SEQUENCE + 1 bytes."""
    folder = Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:40])
    count = len(text) // (SEQUENCE + 1)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: count * (SEQUENCE + 1)]
    return list(tokens.view(count, SEQUENCE + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Accelerate + DeepSpeed + Lowtide")
    parser.add_argument("--config", default=str(HERE / "ds.json"))
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    if not torch.cuda.is_available():
        # Left to itself with DeepSpeed and no GPU, Accelerate takes each rank for a world of one.
        PartialState(cpu=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=options.config))
    torch.manual_seed(0)
    model = ByteRNN()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data: Any = windows()
    loader: Any = DataLoader(data, batch_size=16, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for step, batch in zip(range(1, options.steps + 1), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"step {step} loss {loss.item()!r}", flush=True)
        model.lowtide.telemetry.scalar("train/loss", loss.item(), step)
    model.destroy()  # before the process group goes: it closes Lowtide's files, too
    accelerator.end_training()


if __name__ == "__main__":
    main()
