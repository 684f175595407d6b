"""Run by test_deepspeed_offload.py on 1, 2 or 4 ranks: engines with and without the plugin."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
)

import lowtide
from lowtide.core.device import Lane
from lowtide.offload.adapters.zero3 import Zero3
from tests.helpers.ranks import leave_result

RANDOM = {
    "device": "emulated",
    "device_memory_bytes": 10_000_000,
    "plan": "random:7",
    "subgroup_params": 1024,
    "max_slots": 3,
}
AUTO = {
    "device": "emulated",
    "subgroup_params": 1024,
    "replan_every_n_steps": 4,
    "emulated": {
        "host_to_device_bytes_per_s": 4e8,
        "device_to_host_bytes_per_s": 4e8,
        "device_params_per_s": 1e8,
        "host_params_per_s": 1e7,
    },
}
FULL_EVERY = 7  # steps between looks at optimizer state, which bring residents home


class Net(torch.nn.Module):
    """Odd sizes (tails, padding), a frozen layer, and one that only some batches pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(37, 129)
        self.second = torch.nn.Linear(129, 65)
        self.frozen = torch.nn.Linear(65, 65)
        self.sometimes = torch.nn.Linear(65, 65)
        self.last = torch.nn.Linear(65, 8, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, passes: bool) -> torch.Tensor:
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        x = self.frozen(torch.tanh(self.second(x)))
        if passes:
            x = torch.tanh(self.sometimes(x))
        return F.cross_entropy(self.last(x).float(), y)


@dataclass(frozen=True)
class Case:
    """One setting to train under."""

    stage: int = 3
    dtype: str = "bf16"
    accumulation: int = 1
    clip: float = 1.0
    optimizer: str = "AdamW"
    groups: bool = False  # two parameter groups, with betas of their own
    sometimes: bool = False  # a layer misses whole windows
    freezes: bool = True
    steps: int = 40
    extra: dict[str, Any] = field(default_factory=dict)


def ds_config(case: Case, block: Any, others: dict[str, Any]) -> dict[str, Any]:
    params = {"lr": 1e-2, "weight_decay": 0.01, "betas": [0.9, 0.95]}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "optimizer": {"type": case.optimizer, "params": params},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
        "zero_optimization": {
            "stage": case.stage,
            "sub_group_size": 3000,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu"},
        },
        "steps_per_print": 1000000,
    }
    if case.dtype != "fp32":
        config[case.dtype] = {"enabled": True}
    if case.dtype == "fp16":  # overflows at first, so some updates are skipped
        config["fp16"] |= {"initial_scale_power": 20, "loss_scale_window": 20}
    config |= case.extra
    if block is not None:
        config["lowtide"] = {"offload": block, **others}
    return config


def build(case: Case, block: Any, **others: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    model.frozen.requires_grad_(not case.freezes)
    trained: Any = [p for p in model.parameters() if p.requires_grad]
    if case.groups:
        biases = [p for p in trained if p.ndim == 1]
        matrices = [p for p in trained if p.ndim > 1]
        trained = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": biases, "weight_decay": 0.0, "betas": (0.8, 0.99), "lr": 3e-3},
        ]
    initialize = deepspeed.initialize if block is None else lowtide.initialize
    return initialize(model=model, model_parameters=trained, config=ds_config(case, block, others))[
        0
    ]


def train(
    engine: Any, case: Case, steps: int, *, begin: int = 0, look: Callable[[int], Any] | None = None
) -> list[Any]:
    """Train and return (loss, weights) of each step, optimizer state of some, as text."""
    found: list[Any] = []
    for step in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        passes = not case.sometimes or step % 3 == 0
        for _ in range(case.accumulation):
            x = torch.randn(4, 37, generator=generator)
            y = torch.randint(0, 7, (4,), generator=generator)
            loss = engine(x, y, passes)
            engine.backward(loss)
            if look is not None:
                found.append(look(step))
            try:
                engine.step()
            except Exception as error:
                if "loss scale already at minimum" not in str(error):
                    raise
                return [*found, str(error)]  # such NaNs end stock's run in time
        facts = [loss.item(), weights_digest(engine)]
        if step % FULL_EVERY == FULL_EVERY - 1 or step == begin + steps - 1:
            facts.append(state_digest(engine))
        found.append(facts)
    return found


def _digest(tensors: list[torch.Tensor]) -> str:
    text = hashlib.sha256()
    for tensor in tensors:
        # Stock itself makes NaNs of a layer that misses windows behind an overflow (4 ranks, ZeRO
        # 1, float16). Their places must be the same; what else is in their bits may differ.
        found = tensor.detach().to(torch.float32, copy=True)
        text.update(found.masked_fill_(found.isnan(), torch.nan).numpy().tobytes())
    return text.hexdigest()[:16]


def weights_digest(engine: Any) -> str:
    """Digest of the 16-bit weights that this rank holds, without padding."""
    tensors = []
    for parameter in engine.module.parameters():
        shard = getattr(parameter, "ds_tensor", parameter)
        if shard is not parameter:
            begin = shard.numel() * dist.get_rank()
            shard = shard.view(-1)[: max(0, min(shard.numel(), parameter.ds_numel - begin))]
        tensors.append(shard)
    return _digest(tensors)


def state_digest(engine: Any) -> str:
    """Digest of masters and moments, through DeepSpeed's own interface. Collective."""
    tensors = []
    if engine.zero_optimization_stage() < 3:  # its interface knows the first group only
        states = engine.optimizer.state  # asked here, it is the newest
        for leaf in engine.optimizer.single_partition_of_fp32_groups:
            state = states[leaf]
            tensors += [leaf, state["exp_avg"], state["exp_avg_sq"]]
        return _digest(tensors)
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        tensors.append(safe_get_full_fp32_param(parameter))
        tensors += [
            safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")
        ]
    return _digest(tensors)


def gradient_digest(engine: Any) -> str:
    """Digest of the float32 gradients, through DeepSpeed's own interface. Collective."""
    found = [safe_get_full_grad(p) for p in engine.module.parameters() if p.requires_grad]
    return _digest([each for each in found if each is not None])


# -- what the tests ask for --------------------------------------------------------------------

SHORT = {
    "zero3 bf16 clip 1": Case(),
    "zero3 fp16 accumulation 4 clip 0.1": Case(dtype="fp16", accumulation=4, clip=0.1),
    "zero3 fp32 two groups": Case(dtype="fp32", clip=0.0, groups=True),
    "zero3 bf16 accumulation 4, a layer misses windows": Case(
        accumulation=4, clip=0.0, sometimes=True
    ),
    "zero3 Adam with l2, a layer misses updates": Case(
        optimizer="Adam", sometimes=True, extra={"zero_force_ds_cpu_optimizer": True}
    ),
    "zero2 fp16 two groups": Case(stage=2, dtype="fp16", groups=True),
    "zero1 bf16 accumulation 4, a layer misses windows": Case(
        stage=1, accumulation=4, sometimes=True
    ),
}
FULL = {
    f"zero{stage} {dtype} accumulation {accumulation} clip {clip} {groups} {sometimes}": Case(
        stage=stage, dtype=dtype, accumulation=accumulation, clip=clip,
        groups=groups == "groups", sometimes=sometimes == "misses",
    )
    for stage in (1, 2, 3)
    for dtype in ("bf16", "fp16", "fp32")
    for accumulation in (1, 4)
    for clip in (0.0, 1.0)
    for groups, sometimes in (("", ""), ("groups", "misses"))
}  # fmt: skip


def matrix(cases: dict[str, Case], steps: int) -> dict[str, Any]:
    """Train every case stock, by random plans, and some of them by measured plans."""
    facts: dict[str, Any] = {}
    for name, case in cases.items():
        print(name, flush=True)
        facts[name] = {}
        for way, block in [("stock", None), ("random", RANDOM), ("auto", AUTO)]:
            if way == "auto" and name not in list(SHORT)[:1]:
                continue
            # As on a GPU, where the host's accumulation buffer is not where gradients come from.
            is_far = (lambda *_: True) if way == "random" else (lambda *_: False)
            with mock.patch.object(Zero3, "_is_far", staticmethod(is_far)):
                engine = build(case, block)
                facts[name][way] = train(engine, case, steps)
            if block is not None:
                summary = engine.lowtide.offload.summary()
                facts[name][f"{way} updates"] = summary["updates"]
                facts[name][f"{way} lanes"] = sorted(
                    {each["lane"] for each in engine.lowtide.offload.trace()}
                )
            engine.destroy()
    return facts


def resume(folder: Path) -> dict[str, Any]:
    """Save half way with one, go on with the other."""
    facts: dict[str, Any] = {}
    for case in (Case(), Case(stage=2)):
        for writer, block in [("stock", None), ("ours", RANDOM)]:
            engine = build(case, block)
            train(engine, case, 9)
            engine.save_checkpoint(str(folder / f"{case.stage} {writer}"))
            engine.destroy()
        for writer in ("stock", "ours"):
            for reader, block in [("stock", None), ("ours", RANDOM)]:
                engine = build(case, block)
                if reader == "ours":
                    train(engine, case, 2)  # residents and moments that loading must replace
                engine.load_checkpoint(str(folder / f"{case.stage} {writer}"))
                facts[f"{case.stage} {writer} {reader}"] = train(engine, case, 9, begin=9)
                engine.destroy()
    return facts


def with_checkpoint(folder: Path) -> dict[str, Any]:
    """Both plugins at once: saved lazily while residents are on the device, read by stock."""
    facts: dict[str, Any] = {}
    for case in (Case(), Case(stage=2)):
        for way, block, others in [("stock", None, {}), ("both", RANDOM, {"checkpoint": {}})]:
            engine = build(case, block, **others)
            found = train(engine, case, 4)
            engine.save_checkpoint(str(folder / f"{case.stage} {way}"))
            facts[f"{case.stage} {way}"] = found + train(engine, case, 4, begin=4)
            engine.destroy()
            engine = build(case, None)
            engine.load_checkpoint(str(folder / f"{case.stage} {way}"))
            facts[f"{case.stage} {way} read"] = train(engine, case, 4, begin=4)
            engine.destroy()
    return facts


def access() -> dict[str, Any]:
    """Read and change gradients and state between backward and step."""
    facts: dict[str, Any] = {}
    for stage in (3, 2):
        for way, block in [("stock", None), ("ours", RANDOM)]:
            case = Case(stage=stage, accumulation=2)
            engine = build(case, block)

            def look(step: int, engine: Any = engine) -> Any:
                if not engine.is_gradient_accumulation_boundary():
                    return None
                weight = engine.module.last.weight  # stock cannot set one with padding
                if step == 3:
                    gradient = safe_get_full_grad(weight)
                    safe_set_full_grad(weight, gradient * 0.5)
                if step == 5:
                    value = safe_get_full_fp32_param(weight)
                    safe_set_full_fp32_param(weight, value * 0.75)
                return gradient_digest(engine) if step % 2 else None

            found = train(engine, case, 8, look=look)
            facts[f"{stage} {way}"] = [*found, gradient_digest(engine)]
            engine.destroy()
    return facts


def fail_once(lane_name: str) -> None:
    """Let the next operation of a lane fail, in this process."""
    submit = Lane._submit

    def wrapped(self: Lane, label: str, action: Any, *tensors: Any, nbytes: int = 0) -> Any:
        if self.name.endswith(f"/{lane_name}") and "wait for" not in label:
            Lane._submit = submit  # type: ignore[method-assign]

            def action(_operation: Any) -> None:
                raise RuntimeError("injected")

        return submit(self, label, action, *tensors, nbytes=nbytes)

    Lane._submit = wrapped  # type: ignore[method-assign]


def trouble() -> dict[str, Any]:
    """One rank alone does, or suffers, something; state is moved and read behind our back."""
    facts: dict[str, Any] = {}
    last_rank = dist.get_rank() == dist.get_world_size() - 1
    block = {**AUTO, "fraction": 0.5}

    def one_rank_reads(step: int, engine: Any) -> None:
        if step == 2 and last_rank:
            safe_get_local_grad(engine.module.second.weight)

    def one_rank_fails(step: int, engine: Any) -> None:
        if step == 2 and last_rank and hasattr(engine, "lowtide"):
            fail_once("prefetch")

    def states_move(step: int, engine: Any) -> None:
        if step == 3:
            engine.optimizer.zero_grad()
        if step == 6:  # and the update comes before they are back
            engine.optimizer.offload_states(include=[OffloadStateTypeEnum.lp_grads])

    on_device = []

    def one_gradient_overflows(step: int, engine: Any) -> None:
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        buffers = engine.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        buffer = buffers[trained[step % len(trained)].ds_id]
        if step % 2 and last_rank:
            buffer[0] = float("inf")
            on_device.append(hasattr(engine, "lowtide") and is_kept(engine, buffer))

    for name, look in [
        ("reads", one_rank_reads), ("fails", one_rank_fails), ("moves", states_move),
        ("overflows", one_gradient_overflows),
    ]:  # fmt: skip
        case = Case(
            freezes=name != "moves",  # stock cannot move states beside frozen ones
            dtype="fp16" if name == "overflows" else "bf16",
            extra={"fp16": {"enabled": True, "initial_scale_power": 12}}
            if name == "overflows"
            else {},
        )
        for way in ("stock", "ours"):
            ours = RANDOM if name == "overflows" else block
            engine = build(case, None if way == "stock" else ours)
            found = []
            for step in range(10):
                found += train(
                    engine, case, 1, begin=step, look=lambda s, e=engine, f=look: f(s, e)
                )
                if name == "moves" and step == 3:
                    engine.offload_states()
                    engine.reload_states()
                if name == "moves" and step == 6:
                    engine.optimizer.reload_states()
                if step == 5:
                    moments = engine.optimizer.state.values()
                    found.append([each["exp_avg_sq"].double().sum().item() for each in moments])
            facts[f"{name} {way}"] = found
            if way == "ours":
                facts[f"{name} lanes"] = sorted(
                    {each["lane"] for each in engine.lowtide.offload.trace()}
                )
            engine.destroy()
    facts["overflows on device"] = sum(on_device)
    return facts


def is_kept(engine: Any, buffer: torch.Tensor) -> bool:
    """Whether a gradient accumulates on the device."""
    kept = [each for g in engine.optimizer._lowtide_offload._gradients for each in g.kept()]
    return buffer.data_ptr() in {each.data_ptr() for each in kept}


def switches() -> dict[str, Any]:
    """What a user may set, and what is refused."""
    facts: dict[str, Any] = {}
    case = Case(steps=6)
    for name, block in [
        ("stock", None),
        ("off", {"enabled": False}),
        ("cpu", {"device": "cpu"}),
        ("fraction 0", {**AUTO, "fraction": 0.0, "residents": False}),
        ("fraction 1", {**AUTO, "fraction": 1.0, "residents": False}),
        ("no memory", {**AUTO, "device_memory_bytes": 600}),
    ]:
        engine = build(case, block)
        facts[name] = train(engine, case, 6)
        facts[f"{name} class"] = type(engine.optimizer).__mro__[0].__dict__.get("__module__")
        facts[f"{name} is stock class"] = "_lowtide_offload" not in engine.optimizer.__dict__
        if block is not None and block.get("enabled", True):
            plan = engine.lowtide.offload.plan()
            facts[f"{name} plan"] = [len(plan.host_order), len(plan.staged), len(plan.residents)]
            facts[f"{name} telemetry"] = engine.lowtide.telemetry.snapshot()["gauges"]
        engine.destroy()
        facts[f"{name} after"] = type(engine.optimizer).__name__
    # Taken out in the middle, stock goes on with the same bits.
    engine = build(case, RANDOM)
    first = train(engine, case, 3)
    engine.lowtide.close()
    facts["taken out"] = first + train(engine, case, 3, begin=3)
    facts["taken out is stock"] = "_lowtide_offload" not in engine.optimizer.__dict__
    engine.destroy()
    return facts


def main() -> None:
    deepspeed.init_distributed("gloo")
    folder, mode, *rest = sys.argv[1:]
    if mode == "matrix":
        leave_result(matrix({"short": SHORT, "full": FULL}[rest[0]], int(rest[1])))
    elif mode == "resume":
        leave_result(resume(Path(folder)))
    elif mode == "checkpoint":
        leave_result(with_checkpoint(Path(folder)))
    elif mode == "trouble":
        leave_result(trouble())
    elif mode == "access":
        leave_result(access())
    else:
        leave_result(switches())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
