"""Run by test_deepspeed_tensor_parallel.py: the same training with the model on 1, 2 or 4 ranks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import lowtide
from lowtide.core.errors import LowtideError
from lowtide.tensor_parallel import TensorParallelConfig, factorise
from tests.helpers.ranks import leave_result

warnings.filterwarnings("ignore", category=FutureWarning)
VOCABULARY, BATCH, LENGTH = 101, 4, 16


@dataclass(frozen=True)
class Case:
    """One setting to train under."""

    stage: int = 1
    dtype: str = "fp32"
    tier: str = "none"
    accumulation: int = 1
    is_tied: bool = False
    clip: float = 0.5
    overlaps: bool = False  # where a rank has two sequences or more

    @property
    def name(self) -> str:
        tied = " tied" if self.is_tied else ""
        turns = " in turns" if self.overlaps else ""
        return f"ZeRO {self.stage} {self.dtype} {self.tier} x{self.accumulation}{tied}{turns}"


CASES = (
    Case(stage=0),
    Case(stage=1, tier="latents", is_tied=True),
    Case(stage=2, accumulation=2),
    Case(stage=3, tier="sharded_latents"),
    Case(stage=3, overlaps=True),
    Case(stage=3, dtype="bf16", tier="latents", is_tied=True),
    Case(stage=1, dtype="bf16", overlaps=True),
    Case(stage=0, dtype="bf16"),
)


def model(*, is_tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
            tie_word_embeddings=is_tied,
            attention_bias=True,
        )
    )


def settings(case: Case, degree: int, **more: Any) -> dict[str, Any]:
    readers = max(1, dist.get_world_size() // degree)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // readers,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "zero_optimization": {"stage": case.stage},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "eps": 1e-4, "weight_decay": 0.1, "torch_adam": True},
        },
        "lowtide": {
            "tensor_parallel": {
                "degree": degree,
                "rank": 32,
                "activation_checkpointing": case.tier,
                "overlap_forward": case.overlaps,
            }
        },
        **more,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def groups(net: torch.nn.Module) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not; as generators, which must be read before the conversion."""
    return [
        {"params": (p for p in net.parameters() if p.ndim > 1), "weight_decay": 0.1},
        {"params": (p for p in net.parameters() if p.ndim < 2), "weight_decay": 0.0},
    ]


def open_engine(case: Case, degree: int, **more: Any) -> Any:
    net = model(is_tied=case.is_tied)
    return lowtide.initialize(
        model=net, model_parameters=groups(net), config=settings(case, degree, **more)
    )[0]


def batches(count: int, readers: int, reader: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
             for _ in range(count)]  # fmt: skip
    return [each.chunk(readers)[reader] for each in whole]


def train(engine: Any, steps: int, accumulation: int = 1, *, skip: int = 0) -> dict[str, Any]:
    mpu = engine.mpu
    readers, reader = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    losses, norms = [], []
    for tokens in batches(steps * accumulation, readers, reader)[skip * accumulation :]:
        loss = engine(tokens, labels=tokens).loss
        engine.backward(loss)
        is_update = engine.is_gradient_accumulation_boundary()
        engine.step()
        if is_update:
            norms.append(float(engine.get_global_grad_norm() or 0.0))
        shared = loss.detach().clone()
        dist.all_reduce(shared, group=mpu.get_data_parallel_group())
        losses.append(shared.item() / readers)
    return {"losses": losses, "norms": norms}


def matrix(folder: Path, degree: int) -> dict[str, Any]:
    """Train under every case; rank 0 leaves the unsharded weights in `folder`."""
    facts: dict[str, Any] = {}
    for number, case in enumerate(CASES):
        engine = open_engine(case, degree)
        facts[case.name] = train(engine, 5, case.accumulation)
        state = engine.lowtide.tensor_parallel.state_dict()
        if dist.get_rank() == 0:
            torch.save(state, folder / f"{number}.{dist.get_world_size()}.{degree}.pt")
        facts[case.name]["traffic"] = engine.lowtide.tensor_parallel.summary()["messages"]
        engine.destroy()
    return facts


def save(folder: Path, degree: int) -> dict[str, Any]:
    """Train three steps, save, train three more."""
    engine = open_engine(Case(dtype="bf16"), degree)
    train(engine, 3)
    engine.save_checkpoint(str(folder), tag="saved")
    facts = train(engine, 6, skip=3)
    engine.destroy()
    return facts


def load(folder: Path, degree: int) -> dict[str, Any]:
    """Go on from `save`, at the same degree, or from its universal form at another."""
    universal = (folder / "latest_universal").exists()
    more = {"checkpoint": {"load_universal": True}} if universal else {}
    engine = open_engine(Case(dtype="bf16"), degree, **more)
    path, _ = engine.load_checkpoint(str(folder), tag=None if universal else "saved")
    assert path is not None
    facts = train(engine, 6, skip=3)
    engine.destroy()
    return facts


def lazy(folder: Path, degree: int) -> dict[str, Any]:
    """Save with the checkpoint plugin, resume from it."""
    case = Case(stage=3, dtype="bf16", tier="latents")

    def engine_with_plugin() -> Any:
        config = settings(case, degree)
        config["lowtide"]["checkpoint"] = {}
        net = model()
        return lowtide.initialize(model=net, model_parameters=groups(net), config=config)[0]

    engine = engine_with_plugin()
    train(engine, 3)
    engine.save_checkpoint(str(folder / "lazy"))
    expected = train(engine, 6, skip=3)
    engine.lowtide.checkpoint.wait("committed")
    engine.destroy()
    engine = engine_with_plugin()
    engine.load_checkpoint(str(folder / "lazy"))
    found = train(engine, 6, skip=3)
    engine.destroy()
    return {"expected": expected, "found": found}


def offload(_folder: Path, degree: int) -> dict[str, Any]:
    """Train with DeepSpeed's CPU offload, as it is and planned."""
    facts: dict[str, Any] = {}
    for name, block in (("stock", {}), ("planned", {"offload": {}})):
        config = settings(Case(stage=3, dtype="bf16"), degree)
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        del config["optimizer"]["params"]["torch_adam"]
        config["lowtide"] |= block
        net = model()
        engine = lowtide.initialize(model=net, model_parameters=groups(net), config=config)[0]
        facts[name] = train(engine, 5)
        engine.destroy()
    return facts


def stock(_folder: Path, _degree: int) -> dict[str, Any]:
    """Full rank from SVD, at degree 2, against the model as it was under stock DeepSpeed."""
    config = settings(Case(stage=0, clip=0.0), 2)
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.0}}
    plain = {key: value for key, value in config.items() if key != "lowtide"}
    tokens = batches(1, 1, 0)[0]
    net = model()
    engine = deepspeed.initialize(
        model=net, model_parameters=net.parameters(),
        config={**plain, "train_micro_batch_size_per_gpu": BATCH},
    )[0]  # fmt: skip
    expected = engine(tokens, labels=tokens)
    facts: dict[str, Any] = {"expected": expected.loss.item()}
    engine.destroy()
    config["lowtide"]["tensor_parallel"]["rank"] = 64
    net = model()
    engine = lowtide.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
    facts["found"] = engine(tokens, labels=tokens).loss.item()
    engine.eval()
    logits = engine(tokens).logits
    facts["logits"] = float((logits - expected.logits).norm() / expected.logits.norm())
    engine.destroy()
    return facts


def _said(action: Callable[[], Any]) -> str:
    try:
        action()
    except LowtideError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def faults(folder: Path, _degree: int) -> dict[str, Any]:
    """Everything a user can get wrong; each ends in one typed error on every rank."""
    facts: dict[str, Any] = {}
    facts["degree"] = _said(lambda: open_engine(Case(), 3))

    class Other:
        def get_model_parallel_group(self) -> Any:
            return dist.group.WORLD

        get_data_parallel_group = get_model_parallel_group

        def get_model_parallel_world_size(self) -> int:
            return 1

    def with_mpu() -> None:
        lowtide.initialize(model=model(), mpu=Other(), config=settings(Case(), 2))

    facts["mpu"] = _said(with_mpu)

    def with_split_groups() -> None:
        net = model()
        q = net.model.layers[0].self_attn.q_proj.weight
        rest = [p for p in net.parameters() if p is not q]
        lowtide.initialize(
            model=net, config=settings(Case(), 2),
            model_parameters=[{"params": [q], "lr": 1e-4}, {"params": rest}],
        )  # fmt: skip

    facts["groups"] = _said(with_split_groups)

    def with_a_part_left_out() -> None:
        net = model()
        q = net.model.layers[0].self_attn.q_proj.weight
        lowtide.initialize(model=net, config=settings(Case(), 2), model_parameters=[q])

    facts["left out"] = _said(with_a_part_left_out)

    def with_foreign_parameter() -> None:
        lowtide.initialize(
            model=model(), config=settings(Case(), 2), model_parameters=model().parameters()
        )

    facts["foreign"] = _said(with_foreign_parameter)

    def with_used_optimizer() -> None:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        net(batches(1, 1, 0)[0], labels=batches(1, 1, 0)[0]).loss.backward()
        optimizer.step()
        config = settings(Case(stage=0), 2)
        del config["optimizer"]
        lowtide.initialize(model=net, optimizer=optimizer, config=config)

    facts["optimizer"] = _said(with_used_optimizer)
    facts["pattern"] = _said(
        lambda: lowtide.initialize(model=torch.nn.Linear(4, 4), config=settings(Case(), 2))
    )
    engine = open_engine(Case(), 2)
    tokens = batches(1, 1, 0)[0] + dist.get_rank()
    facts["data"] = _said(lambda: engine(tokens % VOCABULARY, labels=tokens % VOCABULARY))
    same = batches(1, 1, 0)[0]
    facts["labels"] = _said(lambda: engine(same, labels=tokens % VOCABULARY))
    facts["save_pretrained"] = _said(lambda: engine.module.save_pretrained(folder))
    facts["frozen"] = _said(lambda: engine.save_16bit_model(str(folder), "part.bin", True))
    compiled = torch.compile(engine.module, backend="eager")
    facts["compiled"] = compiled(same, labels=same).loss.item()
    facts["not compiled"] = engine(same, labels=same).loss.item()
    engine.save_16bit_model(str(folder), "whole.bin")
    whole, state = torch.load(folder / "whole.bin"), engine.lowtide.tensor_parallel.state_dict()
    facts["whole"] = all(torch.equal(whole[name], value) for name, value in state.items())
    engine.save_checkpoint(str(folder / "other"))
    engine.destroy()

    def load_with(degree: int, plugins: dict[str, Any] | None = None, **more: Any) -> None:
        config = settings(Case(), degree)
        config["lowtide"]["tensor_parallel"] |= more
        config["lowtide"] |= plugins or {}
        net = model()
        engine = lowtide.initialize(model=net, model_parameters=groups(net), config=config)[0]
        try:
            engine.load_checkpoint(str(folder / "other"))
        finally:
            engine.destroy()

    facts["other degree"] = _said(lambda: load_with(1))
    facts["other degree, lazy"] = _said(lambda: load_with(1, plugins={"checkpoint": {}}))
    facts["other activation"] = _said(lambda: load_with(2, activation="silu"))
    facts["same again"] = _said(lambda: load_with(2))

    net = model()
    factorise(net, TensorParallelConfig(degree=1, rank=32))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    config = settings(Case(stage=0), 2)
    del config["optimizer"]
    del config["lowtide"]["tensor_parallel"]["rank"]
    data = list(torch.arange(8 * LENGTH).remainder(VOCABULARY).view(8, LENGTH))
    engine, _, loader, _ = lowtide.initialize(
        model=net, optimizer=optimizer, config=config, training_data=data
    )
    facts["own loader"] = [batch.tolist() for batch in loader]
    facts["own optimizer"] = train(engine, 3)["losses"]
    engine.destroy()
    return facts


if __name__ == "__main__":
    deepspeed.init_distributed()
    action = {f.__name__: f for f in (matrix, save, load, lazy, offload, stock, faults)}[
        sys.argv[1]
    ]
    leave_result(action(Path(sys.argv[2]), int(sys.argv[3])))
    dist.destroy_process_group()
