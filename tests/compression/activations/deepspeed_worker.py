"""Run on 2 ranks by test_deepspeed_activations.py: engines with and without the plugin."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lowtide
from tests.compression.activations import models
from tests.compression.activations.models import Transformer, batch, block_of
from tests.helpers.ranks import leave_result

STEPS = 18
CHECKPOINTED = 10
_MODULES = "lowtide.compression.activations.saving"


def config(stage: int, dtype: str, lowtide_block: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {
            "stage": stage,
            # A weight is gathered for its module and given up after it.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "steps_per_print": 1000000,
    }
    if dtype == "bf16":
        found["bf16"] = {"enabled": True}
    if lowtide_block is not None:
        found["lowtide"] = lowtide_block
    return found


def engine_of(
    stage: int,
    lowtide_block: Any,
    *,
    dtype: str = "fp32",
    model: Callable[[], nn.Module] | None = None,
) -> Any:
    torch.manual_seed(0)
    made = (model or Transformer)()
    return lowtide.initialize(
        model=made,
        model_parameters=[p for p in made.parameters() if p.requires_grad],
        config=config(stage, dtype, lowtide_block),
    )[0]


def train(engine: Any, steps: int, begin: int = 0) -> list[float]:
    losses = []
    for step in range(begin, begin + steps):
        loss = engine(*batch(step, rank=dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def facts_of(engine: Any) -> dict[str, Any]:
    facts: dict[str, Any] = engine.lowtide.compression.summary()["activations"]
    return facts


def with_deepspeed_checkpoints(block: nn.Module, x: Tensor) -> Tensor:
    return deepspeed.checkpointing.checkpoint(block, x)  # type: ignore[no-any-return]


WAYS: dict[str, Any] = {
    "torch": models.again,
    "reentrant": models.again_reentrant,
    "deepspeed": with_deepspeed_checkpoints,
}


def trainings() -> dict[str, Any]:
    """Return losses and facts of runs, by name."""
    found: dict[str, Any] = {}
    for stage, dtype, bits, steps in (
        (0, "fp32", 8, 3), (1, "bf16", 8, 3),
        (2, "fp32", None, STEPS), (2, "fp32", 8, STEPS), (2, "fp32", 4, STEPS),
        (3, "bf16", None, STEPS), (3, "bf16", 8, STEPS),
    ):  # fmt: skip
        engine = engine_of(stage, None if bits is None else block_of(bits=bits), dtype=dtype)
        case: dict[str, Any] = {"losses": train(engine, steps)}
        case["rng"] = torch.get_rng_state().sum().item()
        case["facts"] = None if bits is None else facts_of(engine)
        found[f"{stage} {dtype} {bits or 'stock'}"] = case
        engine.destroy()
    for stage, way in ((2, "torch"), (3, "torch"), (3, "reentrant"), (3, "deepspeed")):
        engine = engine_of(stage, block_of(), model=lambda w=way: Transformer(checkpoints=WAYS[w]))
        losses = train(engine, CHECKPOINTED)
        found[f"{stage} {way}"] = {"losses": losses, "facts": facts_of(engine)}
        engine.destroy()
    return found


def gathered_after_forward(lowtide_block: Any) -> dict[str, Any]:
    """Return how much of the gathered weights is still there between forward and backward."""
    engine = engine_of(3, lowtide_block)
    weights: list[StorageWeakRef] = []

    def note(module: Any, *_: Any) -> None:
        weights.append(StorageWeakRef(module.weight.untyped_storage()))

    for module in engine.module.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_pre_hook(note)
    train(engine, 2)
    weights.clear()
    loss = engine(*batch(9, rank=dist.get_rank()))
    # Gloo's threads let go of what they gathered a moment later, in stock too.
    deadline_s = time.monotonic() + 5.0
    while not all(each.expired() for each in weights) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    found = {"seen": len(weights), "kept": sum(not each.expired() for each in weights)}
    engine.backward(loss)
    engine.step()
    engine.destroy()
    return found


class Outside(nn.Module):
    """A frozen weight that is gathered by hand, and gone again when the backward pass comes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.other = nn.Linear(64, 48, bias=False)
        self.other.requires_grad_(False)
        self.hidden = [self.other.weight]  # a look-up through the module would gather it

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with deepspeed.zero.GatheredParameters(self.hidden):
            return F.linear(x, self.hidden[0]).square().mean()


def gathered_by_hand(lowtide_block: Any) -> dict[str, Any]:
    engine = engine_of(3, lowtide_block, model=Outside)
    loss = engine(torch.randn(16, 32, generator=torch.Generator().manual_seed(3)))
    engine.backward(loss)
    grads = [safe_get_full_grad(each) for each in engine.module.first.parameters()]
    facts = None if lowtide_block is None else facts_of(engine)
    found = {"grads": [each.flatten().tolist() for each in grads], "facts": facts}
    engine.destroy()
    return found


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(models.WORDS, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.words(tokens)
        return found


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def pipelined(lowtide_block: Any) -> dict[str, Any]:
    """Return losses over two stages with four micro-batches under way."""
    torch.manual_seed(0)
    layers = [LayerSpec(Words), *(LayerSpec(models.Block, 32, 4, 0.0) for _ in range(2))]
    model = PipelineModule(
        [*layers, LayerSpec(nn.Linear, 32, models.WORDS)], num_stages=2, loss_fn=loss_of
    )
    settings = config(0, "fp32", lowtide_block) | {"gradient_accumulation_steps": 4}
    engine = lowtide.initialize(
        model=model, model_parameters=[*model.parameters()], config=settings
    )[0]
    batches = (batch(step) for step in itertools.count())
    losses = [engine.train_batch(data_iter=batches).item() for _ in range(5)]
    found = {"losses": losses, "facts": None if lowtide_block is None else facts_of(engine)}
    engine.destroy()
    return found


def resumed(folder: Path) -> dict[str, Any]:
    engine = engine_of(2, block_of(bits=2))
    train(engine, 4)
    engine.save_checkpoint(str(folder), tag="four")
    expected = train(engine, 4, begin=4)
    engine.destroy()
    engine = engine_of(2, block_of(bits=2))
    engine.load_checkpoint(str(folder), tag="four")
    found = train(engine, 4, begin=4)
    engine.destroy()
    return {"expected": expected, "found": found}


def evaluated() -> dict[str, Any]:
    """Return losses of evaluation with and without the plugin, and what was packed for it."""
    found = {}
    for name, block in {"stock": None, "8": block_of()}.items():
        engine = engine_of(2, block)
        engine.eval()
        found[name] = engine(*batch(0)).item()
        if block is not None:
            found["facts"] = facts_of(engine)
        engine.destroy()
    return found


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    engine_of(2, {}).destroy()
    engine_of(2, {"compression": {"enabled": False}}).destroy()
    is_imported = _MODULES in sys.modules
    leave_result(
        {
            "is_imported_when_off": is_imported,
            "trainings": trainings(),
            "gathered": {
                "stock": gathered_after_forward(None),
                "8": gathered_after_forward(block_of()),
            },
            "by hand": {"stock": gathered_by_hand(None), "8": gathered_by_hand(block_of())},
            "resumed": resumed(folder),
            "evaluated": evaluated(),
            # Last: DeepSpeed keeps the grid of a pipeline for engines that come after it.
            "pipeline": {"stock": pipelined(None), "8": pipelined(block_of())},
        }
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
