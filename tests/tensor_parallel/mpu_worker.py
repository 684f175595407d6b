"""Run on 2 or 4 ranks by test_mpu.py: DeepSpeed on its own groups, then on Megatron-core's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from megatron.core import parallel_state
from transformers import LlamaConfig, LlamaForCausalLM

import lowtide
from lowtide.core.errors import LowtideError
from lowtide.tensor_parallel.adapters.mpu import ModelParallelUnit
from tests.helpers.ranks import leave_result

warnings.filterwarnings("ignore", category=FutureWarning)
STEPS, BATCH, LENGTH, VOCABULARY = 4, 4, 12, 96


def open_engine(degree: int, mpu: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=VOCABULARY,
        )
    )  # fmt: skip
    readers = dist.get_world_size() // degree
    config = {
        "train_micro_batch_size_per_gpu": BATCH // readers,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "lowtide": {"tensor_parallel": {"degree": degree, "rank": 16, "activation": "silu"}},
    }
    return lowtide.initialize(
        model=model, model_parameters=model.parameters(), config=config, mpu=mpu
    )[0]


def train(degree: int, mpu: Any, readers: int, reader: int) -> dict[str, Any]:
    engine = open_engine(degree, mpu)
    facts: dict[str, Any] = {"losses": [], "norms": []}
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        tokens = tokens.chunk(readers)[reader]
        loss = engine(tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        facts["losses"].append(loss.item())
        facts["norms"].append(float(engine.get_global_grad_norm()))
    facts["tensor_ranks"] = dist.get_process_group_ranks(
        engine.lowtide.tensor_parallel.group.process_group
    )
    facts["data_ranks"] = dist.get_process_group_ranks(groups._get_data_parallel_group())
    facts["is_ours"] = engine.mpu is mpu
    engine.destroy()
    return facts


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except LowtideError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    degree = int(sys.argv[1])
    deepspeed.init_distributed()
    rank, size = dist.get_rank(), dist.get_world_size()
    facts: dict[str, Any] = {"none": said(ModelParallelUnit.from_megatron)}
    facts["own"] = train(degree, None, size // degree, rank // degree)
    parallel_state.initialize_model_parallel(1, size)
    facts["pipeline"] = said(ModelParallelUnit.from_megatron)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(degree)
    mpu = ModelParallelUnit.from_megatron()
    readers, reader = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    facts["megatron"] = train(degree, mpu, readers, reader)
    facts["theirs"] = {
        "tensor_ranks": dist.get_process_group_ranks(
            parallel_state.get_tensor_model_parallel_group()
        ),
        "data_ranks": dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        "places": [
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_src_rank(),
        ],
    }
    facts["places"] = [
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_model_parallel_world_size(),
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
        mpu.get_tensor_model_parallel_src_rank(),
    ]
    facts["degree"] = said(lambda: open_engine(1, mpu))
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
