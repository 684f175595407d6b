"""Train a tiny Megatron-core GPT in your own loop; `megatron.attach` switches Lowtide on.

    torchrun --nproc-per-node 2 examples/megatron_core/train.py [--pipeline 2 | --tensor 2]

`--rank 16` makes the layers low-rank; tensor-parallel ranks then send latents only.

Megatron-core is written for GPUs; without one `without_gpu` below lets the same code run on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|full scope)")
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import (  # noqa: E402
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from lowtide.hosts import megatron  # noqa: E402
from lowtide.tensor_parallel.adapters.megatron import bottleneck_layer_spec, traffic  # noqa: E402

HERE = Path(__file__).resolve().parent
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SEQUENCE, BATCH, MICRO_BATCHES = 64, 4, 2


class _CudaMeansCpu(TorchFunctionMode):
    """Send every ``device="cuda"`` of a torch call to the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Run Megatron-core on the CPU where there is no GPU; with one, change nothing.

    Configuration gets most of the way (`use_cpu_initialization`, no fused kernels, the random
    tracker below). What is left has no switch: schedules, gradient buffers and optimizers write
    ``device="cuda"`` and ``torch.cuda.current_device()`` out in full.
    """
    if HAS_GPU:
        yield
        return
    # The tracker that keeps no GPU random state; dropout is off here, so nothing draws from it.
    initialize_rng_tracker(inference_rng_tracker=True)
    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    try:
        with _CudaMeansCpu():
            yield
    finally:
        torch.cuda.current_device = current_device


def build(options: argparse.Namespace) -> tuple[DistributedDataParallel, Any]:
    """Return the model chunk of this rank and its optimizer."""
    # What bottleneck layers compute: RMSNorm and a gated feed-forward block.
    low_rank = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    }
    settings = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=options.tensor,
        pipeline_model_parallel_size=options.pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,  # needs apex
        batch_p2p_sync=HAS_GPU,  # calls torch.cuda.synchronize
        finalize_model_grads_func=finalize_model_grads,
        **(low_rank if options.rank else {}),
    )
    layer = bottleneck_layer_spec(options.rank) if options.rank else get_gpt_layer_local_spec()
    model = GPTModel(
        config=settings,
        transformer_layer_spec=layer,
        vocab_size=256,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).to(DEVICE)
    # On a CPU neither the distributed optimizer nor clipping: both insist on CUDA tensor types.
    chunk = DistributedDataParallel(settings, DistributedDataParallelConfig(), model)
    settings.no_sync_func = chunk.no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0 if HAS_GPU else 0.0), [chunk]
    )
    return chunk, optimizer


def batches() -> Iterator[torch.Tensor]:
    """Yield bytes of the standard library, (BATCH, SEQUENCE + 1), one stream per data rank."""
    folder = Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:40])
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    random = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    while True:
        starts = torch.randint(len(tokens) - SEQUENCE - 1, (BATCH,), generator=random).tolist()
        yield torch.stack([tokens[i : i + SEQUENCE + 1] for i in starts]).long().to(DEVICE)


def mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = losses.float().mean()
    # A copy: the schedule divides the returned loss in place by the number of micro-batches.
    return loss, {"loss": loss.detach().clone()}


def forward_step(data: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(data)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(BATCH, -1)
    is_hidden = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device=DEVICE).triu(1)
    losses = model(tokens[:, :-1], positions, is_hidden[None, None], labels=tokens[:, 1:])
    return losses, mean_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default=str(HERE / "ds.json"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--rank", type=int, default=0, help="of low-rank layers; 0: full rank")
    options = parser.parse_args()

    if HAS_GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if HAS_GPU else "gloo")
    parallel_state.initialize_model_parallel(options.tensor, options.pipeline)
    torch.manual_seed(0)
    if HAS_GPU:
        model_parallel_cuda_manual_seed(0)
    with without_gpu():
        chunk, optimizer = build(options)
        loop = megatron.attach(chunk, optimizer, config=options.config)
        forward_backward = loop.wrap(get_forward_backward_func())
        data = batches()
        for step in range(1, options.steps + 1):
            chunk.zero_grad_buffer()
            optimizer.zero_grad()
            losses = forward_backward(
                forward_step_func=forward_step,
                data_iterator=data,
                model=[chunk],
                num_microbatches=MICRO_BATCHES,
                seq_length=SEQUENCE,
                micro_batch_size=BATCH,
            )
            optimizer.step()
            # Only the last pipeline stage sees losses; they are equal on its tensor-parallel ranks.
            if losses and parallel_state.get_data_parallel_rank() == 0:
                loss = sum(record["loss"].item() for record in losses) / len(losses)
                loop.session.telemetry.scalar("train/loss", loss, step)
                if parallel_state.get_tensor_model_parallel_rank() == 0:
                    print(f"step {step} loss {loss!r}", flush=True)
        loop.close()
        if options.rank and dist.get_rank() == 0:
            print(f"layers sent {traffic(chunk).as_dict()['messages']}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
