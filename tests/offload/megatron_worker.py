"""Run on 2 ranks by test_megatron_offload.py: Megatron's own CPU offload, stock and planned."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lowtide.core.errors import LowtideError
from lowtide.core.lifecycle import Event
from lowtide.hosts import megatron
from tests.helpers.pretend_gpu import pretend_gpu
from tests.helpers.ranks import leave_result
from tests.hosts.megatron_worker import example

STEPS = 30
VOCABULARY = 250  # no multiple of 16: shards have tails
DEVICE = {"device": "emulated", "device_memory_bytes": 1 << 22}
RANDOM = {**DEVICE, "plan": "random:7"}


class Case(NamedTuple):
    """How Megatron is set up."""

    dtype: torch.dtype = torch.bfloat16
    is_distributed: bool = True
    is_precision_aware: bool = True
    fraction: float = 1.0
    overlap: bool = True
    clip: float = 1.0


CASES = {
    "fp32, every rank all": Case(torch.float32, False, False),
    "fp32 masters on the GPU too": Case(is_precision_aware=False, overlap=False),
    "bf16": Case(),
    "bf16, half on the host, one AdamW, no clipping": Case(fraction=0.5, overlap=False, clip=0.0),
    "fp16 with skipped steps": Case(torch.float16),
}


class Run:
    """One tiny model, optimizer and data stream, made anew with the same seed."""

    def __init__(self, case: Case, block: dict[str, Any] | None = None) -> None:
        self.case = case
        torch.manual_seed(0)
        self.chunk, self.optimizer = build(case)
        self.inner = self.optimizer.chained_optimizers[0]
        self.data = example.batches()
        self.loop: Any = None
        self.function: Callable[..., Any] = get_forward_backward_func()
        if block is not None:
            config = {"lowtide": {"offload": block}}
            self.loop = megatron.attach(self.chunk, self.optimizer, config=config)
            self.function = self.loop.wrap(self.function)
        self.steps = 0
        self.log: list[Any] = []
        self.lanes: set[str] = set()
        self.grew: list[int] = []

    @property
    def hybrid(self) -> Any:
        return self.inner.optimizer

    @property
    def plugin(self) -> Any:
        return self.loop.session.plugins["offload"]

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.steps += 1
            for group in self.optimizer.param_groups:  # a schedule of both
                group["lr"] = 1e-3 * min(1.0, self.steps / 8)
                group["weight_decay"] = 0.1 * group["wd_mult"]
            self.chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            records = self.function(
                forward_step_func=example.forward_step,
                data_iterator=self.data,
                model=[self.chunk],
                num_microbatches=example.MICRO_BATCHES,
                seq_length=example.SEQUENCE,
                micro_batch_size=example.BATCH,
            )
            is_applied, norm, _ = self.optimizer.step()
            loss = [record["loss"].item() for record in records]
            self.log.append([is_applied, norm, loss, digest(self.chunk.parameters())])
            if self.loop is not None and self.plugin.plan() is not None:
                self.lanes |= {each["lane"] for each in self.plugin.trace()}

    def state(self) -> dict[str, str]:
        """Return a digest of all that the hybrid optimizer keeps."""
        state, hybrid = self.hybrid.state, self.hybrid
        entries = [state[p] for group in hybrid.param_groups for p in group["params"]]
        masters = [hybrid.param_to_inner_param[p] for g in hybrid.param_groups for p in g["params"]]
        named = {k: digest(e[k] for e in entries) for k in ("step", "exp_avg", "exp_avg_sq")}
        keys = sorted({",".join(entry) for entry in entries})
        return {**named, "masters": digest(masters), "keys": str(keys)}

    def saved(self, folder: Path, name: str) -> dict[str, Any]:
        """Save as Megatron does: replicated part, and parameter state in a file of its own."""
        path = str(folder / f"{name}.pt")
        self.optimizer.save_parameter_state(path)
        return {"common": self.optimizer.state_dict(), "path": path, "steps": self.steps}

    def load(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved["common"])
        self.optimizer.load_parameter_state(saved["path"])
        self.inner._copy_main_params_to_model_params()
        self.steps = saved["steps"]


def build(case: Case, **changes: Any) -> tuple[Any, Any]:
    """Return a model chunk and Megatron's optimizer for it."""
    settings = TransformerConfig(
        num_layers=2, hidden_size=48, num_attention_heads=4, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        batch_p2p_sync=False, bf16=case.dtype == torch.bfloat16, fp16=case.dtype == torch.float16,
        params_dtype=case.dtype,
    )  # fmt: skip
    model: Any = GPTModel(
        config=settings, transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY + 6, max_sequence_length=example.SEQUENCE,
        position_embedding_type="rope",
    ).to(case.dtype)  # fmt: skip
    chunk = DistributedDataParallel(
        settings,
        DistributedDataParallelConfig(
            use_distributed_optimizer=case.is_distributed, grad_reduce_in_fp32=True
        ),
        model,
    )
    settings.no_sync_func = chunk.no_sync
    wanted: dict[str, Any] = {
        "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.1, "clip_grad": case.clip,
        "bf16": settings.bf16, "fp16": settings.fp16, "params_dtype": case.dtype,
        "initial_loss_scale": 2.0**20, "hysteresis": 1, "loss_scale_window": 5,
        "use_distributed_optimizer": case.is_distributed,
        "use_precision_aware_optimizer": case.is_precision_aware, "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": case.fraction, "overlap_cpu_optimizer_d2h_h2d": case.overlap,
    }  # fmt: skip
    config = OptimizerConfig(**{**wanted, **changes})
    optimizer = get_megatron_optimizer(config, [chunk], get_standard_config_overrides(config))
    settings.grad_scale_func = optimizer.scale_loss
    return chunk, optimizer


def digest(tensors: Any) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def case_facts(case: Case) -> dict[str, Any]:
    """Stock against planned: losses, norms and weights of every step, all state at the end."""
    stock = Run(case)
    stock.train(STEPS)
    facts: dict[str, Any] = {"stock": [stock.log, stock.state()]}
    for name, block in {"random": RANDOM, "auto": DEVICE, "cpu": {"device": "cpu"}}.items():
        run = Run(case, block)
        count = STEPS if name == "random" else 5
        run.train(count)
        state = run.state() if count == STEPS else None
        facts[name] = [run.log, state]
        facts[f"{name} lanes"] = sorted(run.lanes)
        facts[f"{name} updates"] = run.plugin.summary().get("updates")
        run.loop.close()
    return facts


def main() -> None:
    dist.init_process_group("gloo")
    facts: dict[str, Any] = {}
    with pretend_gpu(example.without_gpu):
        parallel_state.initialize_model_parallel(1, 1)
        facts["cases"] = {name: case_facts(case) for name, case in CASES.items()}
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
