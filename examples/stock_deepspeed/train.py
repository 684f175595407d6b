"""A stock DeepSpeed script: a tiny byte-level GPT learns the standard library's source (ZeRO-1).

Nothing in here knows Lowtide. Run it plain, or hand it to the zero-code switch:

    torchrun --nproc-per-node 2 examples/stock_deepspeed/train.py
    torchrun --nproc-per-node 2 -m lowtide.run examples/stock_deepspeed/train.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import deepspeed
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
OPS = HERE.parents[1] / ".cache" / "torch_extensions"
if OPS.is_dir():  # the CPU operations that `make train` has compiled: no second wait for them
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(OPS))
SEQUENCE = 64


class TinyGPT(nn.Module):
    """Two causal transformer layers over bytes; returns the mean cross-entropy in nats."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(SEQUENCE, width)
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=4 * width,
            dropout=0.0,
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # tokens: int64, (B, SEQUENCE + 1)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(SEQUENCE, device=tokens.device)
        x = self.token(inputs) + self.position.weight
        logits = self.head(self.layers(x, mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def windows() -> torch.Tensor:
    """Return the source of some standard-library modules in windows of SEQUENCE + 1 bytes."""
    folder = Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:40])
    count = len(text) // (SEQUENCE + 1)
    tokens = torch.frombuffer(bytearray(text[: count * (SEQUENCE + 1)]), dtype=torch.uint8)
    return tokens.long().view(count, SEQUENCE + 1)


def train(engine: deepspeed.DeepSpeedEngine, loader: Iterable[torch.Tensor], steps: int) -> None:
    """Train for some steps; rank 0 prints the loss of each."""
    batches = iter(loader)
    for step in range(1, steps + 1):
        total = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(next(batches).to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        if deepspeed.comm.get_rank() == 0:
            print(f"step {step} loss {total / engine.gradient_accumulation_steps()!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=str(HERE / "ds.json"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = TinyGPT()
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=list(windows()),
        config=options.config,
    )
    train(engine, loader, options.steps)
    engine.destroy()
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
