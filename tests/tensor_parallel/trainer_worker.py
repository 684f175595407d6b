"""Run by test_trainer.py: `Trainer`, and Accelerate without it, with a model on 1 or 2 ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, DummyOptim, DummyScheduler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lowtide
from lowtide.core.errors import ConfigError
from tests.helpers.ranks import leave_result

lowtide.enable()

VOCABULARY, LENGTH, STEPS, SAVED, GLOBAL_BATCH = 101, 12, 6, 4, 8
EVALUATED = 12  # one batch and a half


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random tokens; with gaps, some are no targets, and batches have different numbers of them."""

    def __init__(self, count: int, *, has_gaps: bool) -> None:
        generator = torch.Generator().manual_seed(count)
        self.tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
        gaps = torch.arange(LENGTH) < torch.arange(count)[:, None] % LENGTH
        self.labels = self.tokens.masked_fill(gaps & has_gaps, -100)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class Log(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def settings(degree: int) -> dict[str, Any]:
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto", "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
        "zero_optimization": {"stage": 2},
        "lowtide": {"tensor_parallel": {"degree": degree, "rank": 16, "activation": "silu"}},
    }


def metrics(prediction: Any) -> dict[str, Any]:
    logits, labels = prediction
    return {"samples": len(labels), "labels": int(labels.sum()), "size": float(abs(logits).mean())}


def trainer(folder: Path, degree: int, log: Log) -> Trainer:
    groups = int(os.environ["WORLD_SIZE"]) // degree
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=settings(degree),
        per_device_train_batch_size=GLOBAL_BATCH // groups,
        per_device_eval_batch_size=GLOBAL_BATCH // groups,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1e-4,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVED,
        eval_strategy="steps",
        eval_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_nan_inf_filter=False,
    )
    return Trainer(
        model=model(),
        args=arguments,
        train_dataset=Samples(80, has_gaps=True),
        eval_dataset=Samples(EVALUATED, has_gaps=False),
        compute_metrics=metrics,
        callbacks=[log],
    )


def accelerator(config: dict[str, Any], **loading: Any) -> Accelerator:
    AcceleratorState._reset_state()
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        dataloader_config=DataLoaderConfiguration(**loading),
    )


def loader(count: int, size: int) -> Any:
    return torch.utils.data.DataLoader(range(count), batch_size=size)  # type: ignore[arg-type]


def own_loop(degree: int) -> dict[str, Any]:
    """Accelerate without `Trainer`: loaders, gathered metrics, a schedule, weights."""
    config = settings(degree)
    del config["optimizer"], config["scheduler"]
    config |= {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
    one = accelerator(config)
    facts: dict[str, Any] = {"tensors": [], "objects": []}
    facts["alone"] = [batch.tolist() for batch in one.prepare_data_loader(loader(11, 2))]
    net = model()
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=1.0)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 * (step + 1))
    net, optimizer, data, schedule = one.prepare(net, optimizer, loader(11, 2), schedule)
    facts["batch"] = net.train_batch_size()
    for batch in data:
        facts["tensors"] += one.gather_for_metrics({"at": batch})["at"].tolist()
        facts["objects"] += one.gather_for_metrics([str(each) for each in batch.tolist()])
        tokens = batch[:, None] + torch.arange(4)
        one.backward(net(tokens, labels=tokens).loss)
        optimizer.step()
        schedule.step()
    facts["no samples"] = list(one.gather_for_metrics(torch.empty(0, 3)).shape)
    facts |= {"lr": schedule.get_last_lr(), "weights": sorted(one.get_state_dict(net))}
    net.destroy()
    facts["split"] = [
        batch.tolist()
        for batch in accelerator(config, split_batches=True).prepare(loader(12, 6))
    ]  # fmt: skip
    try:
        accelerator(config, dispatch_batches=True).prepare(loader(12, 6))
    except ConfigError as error:
        facts["dispatched"] = str(error)
    return facts


def shuffled(degree: int) -> list[list[int]]:
    """Return what this rank reads, with seeds of its own, in two epochs of each kind of loader."""
    torch.manual_seed(dist.get_rank())
    own = torch.Generator().manual_seed(dist.get_rank())
    seen = []
    for loading, options in (
        ({}, {}),
        ({}, {"generator": own}),
        ({"use_seedable_sampler": True}, {}),
    ):
        data = torch.utils.data.DataLoader(range(32), batch_size=4, shuffle=True, **options)  # type: ignore[arg-type]
        ready = accelerator(settings(degree), **loading).prepare_data_loader(data)
        seen += [torch.cat(list(ready)).tolist() for _ in range(2)]
    return seen


def planned_steps(degree: int) -> int:
    """Return the length of a schedule whose numbers Accelerate fills in."""
    config = settings(degree)
    config["optimizer"]["params"] = {"lr": 0.1, "torch_adam": True}
    config |= {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
    net = model()
    optimizer = DummyOptim(net.parameters(), lr=0.1)
    schedule = DummyScheduler(optimizer, total_num_steps=11)
    net, *_ = accelerator(config).prepare(net, optimizer, loader(11, 2), schedule)
    return int(net.lr_scheduler.total_num_steps)


def main() -> None:
    folder, degree = Path(sys.argv[1]), int(sys.argv[2])
    log = Log()
    one = trainer(folder, degree, log)
    one.train()
    facts: dict[str, Any] = {"losses": log.losses, "norms": log.norms, "epoch": one.state.epoch}
    facts["evaluations"] = [
        {key: each[f"eval_{key}"] for key in ("loss", "samples", "labels", "size")}
        for each in one.state.log_history
        if "eval_loss" in each
    ]
    if one.args.world_size == 2:
        log = Log()
        again = trainer(folder, degree, log)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
        facts |= {"resumed": log.losses, "shuffled": shuffled(degree)}
    if one.args.world_size == 4:
        facts |= {"own loop": own_loop(degree), "planned steps": planned_steps(degree)}
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
