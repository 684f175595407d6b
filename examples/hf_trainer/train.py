"""Train a tiny Llama with Hugging Face `Trainer` on DeepSpeed, Lowtide switched on.

torchrun --nproc-per-node 2 examples/hf_trainer/train.py
torchrun --nproc-per-node 2 examples/hf_trainer/train.py --config examples/hf_trainer/low_rank.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import lowtide

lowtide.enable()  # the only line for Lowtide; the rest is transformers as usual

HERE = Path(__file__).resolve().parent
OPS = HERE.parents[1] / ".cache" / "torch_extensions"
if OPS.is_dir():  # the CPU operations that `make train` has compiled: no second wait for them
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(OPS))
SEQUENCE = 64


class Bytes(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The source of some standard-library modules in windows of bytes; nothing to download."""

    def __init__(self) -> None:
        folder = Path(os.__file__).parent
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:40])
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.tokens) // SEQUENCE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * SEQUENCE : (index + 1) * SEQUENCE].long()
        return {"input_ids": window, "labels": window}


class PrintLoss(TrainerCallback):
    """Print the loss with all its digits."""

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hugging Face Trainer + DeepSpeed + Lowtide")
    parser.add_argument("--config", default=str(HERE / "ds.json"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0: save nothing")
    parser.add_argument("--resume", help="go on from this checkpoint, e.g. .../checkpoint-10")
    parser.add_argument("--output", default="runs/hf_trainer", help="folder for checkpoints")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir=options.output,
        deepspeed=options.config,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_steps=options.steps,
        logging_steps=5,
        per_device_eval_batch_size=8,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    set_seed(0)  # the ranks that share one model must start with the same
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=SEQUENCE,
        )
    )
    data, held_out = Bytes(), 64
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=torch.utils.data.Subset(data, range(len(data) - held_out)),
        eval_dataset=torch.utils.data.Subset(data, range(len(data) - held_out, len(data))),
        callbacks=[PrintLoss()],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"evaluation loss {evaluation['eval_loss']!r}", flush=True)
    if torch.distributed.is_initialized():  # its threads must not outlive the interpreter
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
