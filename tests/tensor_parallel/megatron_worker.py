"""Run on 4 ranks by test_megatron_layer.py; facts left as JSON, tensors as files.

One start for all degrees: with fewer than 4 tensor-parallel ranks, the others hold replicas that
train on the same batches.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode

from lowtide.core.errors import LowtideError
from lowtide.tensor_parallel.adapters.megatron import bottleneck_layer_spec, traffic
from tests.helpers.examples import load_example
from tests.helpers.ranks import leave_result
from tests.tensor_parallel import megatron_reference as reference

STEPS, MORE_STEPS, MICRO_BATCHES = 5, 3, 2
TRAINED = "cola"


example = load_example("megatron_core")


def build(
    variant: dict[str, Any],
    dtype: torch.dtype,
    *,
    seed: int = reference.SEED,
    parallel_output: bool = True,
    **extra: Any,
) -> Any:
    """Return this rank's chunk of the model."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "num_layers": reference.LAYERS,
        "hidden_size": reference.WIDTH,
        "num_attention_heads": reference.HEADS,
        "num_query_groups": reference.KV_HEADS,
        "kv_channels": reference.HEAD,
        "ffn_hidden_size": reference.MLP,
        "layernorm_epsilon": reference.EPSILON,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": True,
        "finalize_model_grads_func": finalize_model_grads,
    }
    model = GPTModel(
        config=TransformerConfig(**(fields | variant["config"] | extra)),
        transformer_layer_spec=bottleneck_layer_spec(**variant["spec"], seed=seed),
        vocab_size=reference.VOCABULARY,
        max_sequence_length=reference.SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=parallel_output,
        position_embedding_type="rope",
        rotary_percent=variant.get("rotary_percent", 1.0),
    )
    return model.to(dtype)


def fill(model: Any, variant: dict[str, Any]) -> None:
    """Give norms and biases the reference's values; factors stay as they were initialised."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for layer in model.decoder.layers:
        for name, parameter in layer.block.named_parameters():
            names, dim = reference.LAYOUT[name]
            if name.endswith(("down.weight", "up.weight")):
                continue
            tensors = [reference.whole(variant, layer.layer_number - 1, each) for each in names]
            with torch.no_grad():
                parameter.copy_(reference.cut(tensors, dim, rank, size))


class Collectives(TorchDispatchMode):
    """Counts every collective that torch sees, whoever makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def error_of_bfloat16(name: str) -> float:
    """Relative error of logits in bfloat16 against float64."""
    variant, results = reference.VARIANTS[name], []
    tokens, _ = reference.batch()
    positions = torch.arange(reference.SEQUENCE).expand(reference.BATCH, -1)
    for dtype in (torch.float64, torch.bfloat16):
        model = build(variant, dtype, parallel_output=False)
        fill(model, variant)
        with torch.no_grad():
            results.append(model(tokens, positions, None).double())
    return float((results[1] - results[0]).norm() / results[0].norm())


def gradients(folder: Path, name: str) -> dict[str, Any]:
    """Loss and gradients in float64, and what the layers sent."""
    variant = reference.VARIANTS[name]
    model = build(variant, torch.float64, parallel_output=False)
    fill(model, variant)
    tokens, labels = reference.batch()
    positions = torch.arange(reference.SEQUENCE).expand(reference.BATCH, -1)
    mask = torch.ones(reference.SEQUENCE, reference.SEQUENCE, dtype=torch.bool).triu(1)
    facts: dict[str, Any] = {}
    for kind, given in (("mask", mask[None, None]), ("causal", None)):
        model.zero_grad()
        logits = model(tokens, positions, given)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        facts[kind] = loss.item()
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if parallel_state.get_data_parallel_rank() == 0:
        torch.save(
            {name: (p.detach(), p.grad) for name, p in model.named_parameters()},
            folder / f"{name}.{size}.{rank}.pt",
        )
    counted = traffic(model).as_dict()["messages"]
    hidden = torch.randn(
        reference.SEQUENCE, reference.BATCH, reference.WIDTH,
        dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    angles = model.rotary_pos_emb(reference.SEQUENCE)
    with Collectives() as forward:
        out = model.decoder(hidden, None, rotary_pos_emb=angles)
    with Collectives() as backward:
        out.sum().backward()
    facts |= {"forward": dict(forward.seen), "backward": dict(backward.seen)}
    after = traffic(model).as_dict()["messages"]
    facts["counted"] = {key: after[key] - counted[key] for key in after}
    facts["flags"] = {
        name: [p.tensor_model_parallel, p.partition_dim, p.partition_stride, p.sequence_parallel]
        for name, p in model.decoder.layers[0].block.named_parameters()
    }
    return facts


class Run:
    """A model with Megatron-core's own wrapper, schedule and optimizer, in float32."""

    def __init__(self, seed: int = reference.SEED) -> None:
        self.model = build(reference.VARIANTS[TRAINED], torch.float32, seed=seed)
        config = self.model.config
        self.chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), self.model)
        config.no_sync_func = self.chunk.no_sync
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=0.0), [self.chunk]
        )
        self.inner = self.optimizer.chained_optimizers[0]

    def train(self, first: int, steps: int) -> dict[str, list[float]]:
        losses, norms = [], []
        for step in range(first, first + steps):
            self.chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            records = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=batches(step),
                model=[self.chunk],
                num_microbatches=MICRO_BATCHES,
                seq_length=reference.SEQUENCE,
                micro_batch_size=reference.BATCH,
            )
            self.optimizer.prepare_grads()
            norms.append(self.inner.get_grad_norm())
            self.optimizer.step()
            losses += [record["loss"].item() for record in records]
        return {"losses": losses, "norms": norms}

    def state(self, *, is_loading: bool) -> dict[str, Any]:
        model = self.model.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        loaded = dist_checkpointing.load(self.state(is_loading=True), str(folder))
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])


def batches(step: int) -> Iterator[torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    while True:
        shape = (reference.BATCH, reference.SEQUENCE + 1)
        yield torch.randint(reference.VOCABULARY, shape, generator=random)


def forward_step(data: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(data)
    positions = torch.arange(reference.SEQUENCE).expand(reference.BATCH, -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]), example.mean_loss


def refusals() -> dict[str, str]:
    """The text of what the model's constructor or a call refuses."""
    variant = reference.VARIANTS["plain"]
    model = build(variant, torch.float32)
    layer = model.decoder.layers[0]
    hidden = torch.zeros(reference.SEQUENCE, reference.BATCH, reference.WIDTH)
    wide = torch.zeros(reference.SEQUENCE, 1, 1, 2 * reference.HEAD)
    attempts = {
        "head norms": lambda: build(variant, torch.float32, qk_layernorm=True),
        "norm": lambda: build(variant, torch.float32, normalization="L2Norm"),
        "rank": lambda: build(variant | {"spec": {"rank": 99}}, torch.float32),
        "packed": lambda: layer(hidden, packed_seq_params=object()),
        "rotary": lambda: layer(hidden, rotary_pos_emb=wide),
    }
    texts = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            texts[name] = "no error"
        except LowtideError as error:
            texts[name] = f"{type(error).__name__}: {error}"
    return texts


def run_tensor_parallel(folder: Path, size: int) -> dict[str, Any]:
    parallel_state.initialize_model_parallel(size)
    facts: dict[str, Any] = {name: gradients(folder, name) for name in reference.VARIANTS}
    facts["bfloat16"] = {name: error_of_bfloat16(name) for name in reference.VARIANTS}
    run = Run()
    facts["train"] = run.train(0, STEPS)
    checkpoint = folder / "checkpoint"
    if size == 2:
        if dist.get_rank() == 0:
            checkpoint.mkdir()
        dist.barrier()
        dist_checkpointing.save(run.state(is_loading=False), str(checkpoint))
        saved = dist_checkpointing.load_tensors_metadata(str(checkpoint))
        facts["saved"] = {key: list(tensor.global_shape) for key, tensor in saved.items()}
        facts["more"] = run.train(STEPS, MORE_STEPS)
    else:
        facts["more"] = resumed(checkpoint)
    if size == 1:
        facts["refusals"] = refusals()
    parallel_state.destroy_model_parallel()
    return facts


def resumed(checkpoint: Path) -> dict[str, list[float]]:
    """Load into a model that was initialised otherwise, and go on."""
    run = Run(seed=reference.SEED + 1)
    run.load(checkpoint)
    return run.train(STEPS, MORE_STEPS)


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    # Megatron-core's checkpoints wait for a device that is not there.
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    with example.without_gpu():
        # Two first: they write the checkpoint.
        facts = {str(size): run_tensor_parallel(folder, size) for size in (2, 1, 4)}
        parallel_state.initialize_model_parallel(2, 2)
        facts["pipeline"] = resumed(folder / "checkpoint")
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
