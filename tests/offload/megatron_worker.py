"""Run on 2 ranks by test_megatron_offload.py: Megatron's own CPU offload, stock and planned."""

from __future__ import annotations

import argparse
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
from lowtide.core.state import Location
from lowtide.hosts import megatron
from lowtide.offload.adapters.megatron import Hybrid
from lowtide.offload.one_update import OneUpdate
from lowtide.offload.storage.files import ScratchFile
from tests.helpers.pretend_gpu import pretend_gpu
from tests.helpers.ranks import leave_result
from tests.hosts.megatron_worker import example

STEPS = 30
VOCABULARY, HIDDEN = 257, 20  # no multiples of 16: most parameters have a tail
DEVICE = {"device": "emulated", "device_memory_bytes": 1 << 22, "subgroup_params": 1024}
RANDOM = {**DEVICE, "plan": "random:7"}
STORED = "fp16 with skipped steps"  # the case that is run with state in files too
FAST = {**DEVICE, "emulated": {"host_params_per_s": 1e6}}  # state stays on the device


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
        self.residents: list[int] = []  # subgroups whose newest copy is on the device, by step

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
                self.residents.append(self.away())

    def away(self) -> int:
        """Return how many subgroups have their newest copy on the device."""
        authority = self.loop.session.state
        places = [authority.where(key).location for key in sorted(authority.keys())]
        return places.count(Location.DEVICE)

    def state(self) -> dict[str, str]:
        """Return a digest of all that the hybrid optimizer keeps."""
        state, hybrid = self.hybrid.state, self.hybrid
        entries = [state[p] for group in hybrid.param_groups for p in group["params"]]
        masters = [hybrid.param_to_inner_param[p] for g in hybrid.param_groups for p in g["params"]]
        named = {k: digest(e[k] for e in entries) for k in ("step", "exp_avg", "exp_avg_sq")}
        keys = sorted({",".join(entry) for entry in entries})
        return {**named, "masters": digest(masters), "keys": str(keys)}

    def save(self, folder: Path, name: str) -> Path:
        """Save as Megatron does: the parameters' state in a file of its own, by one rank."""
        path = folder / name
        self.optimizer.save_parameter_state(f"{path}.pt")
        common = {"model": self.chunk.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(common, f"{path}-{dist.get_rank()}.pt")
        return path

    def load(self, path: Path, steps: int) -> Run:
        """Load what `save` wrote after `steps` steps; the data go on from there as well."""
        common = torch.load(f"{path}-{dist.get_rank()}.pt", weights_only=False)
        self.optimizer.load_state_dict(common["optimizer"])
        self.optimizer.load_parameter_state(f"{path}.pt")
        # As Megatron's loaders of distributed checkpoints do at their end; this one forgets to.
        self.hybrid._sync_hdo_state_to_sub_optimizers()
        # Last: the optimizer makes its state by a step with random gradients.
        self.chunk.load_state_dict(common["model"])
        self.data = example.batches()
        for _ in range(steps * example.MICRO_BATCHES):
            next(self.data)
        self.steps, self.log = steps, []
        return self

    def end(self) -> list[Any]:
        """Close, and return the log and a digest of all state."""
        if self.loop is not None:
            self.loop.close()
        return [self.log, self.state()]


def build(case: Case, **changes: Any) -> tuple[Any, Any]:
    """Return a model chunk and Megatron's optimizer for it."""
    settings = TransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        batch_p2p_sync=False, bf16=case.dtype == torch.bfloat16, fp16=case.dtype == torch.float16,
        params_dtype=case.dtype,
    )  # fmt: skip
    model: Any = GPTModel(
        config=settings, transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY, max_sequence_length=example.SEQUENCE,
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


def stored(folder: Path) -> dict[str, Any]:
    """Return a block that keeps a part of the state in files; random plans move pieces, too."""
    for name in ("a", "b"):
        (folder / name).mkdir(exist_ok=True)
    rates = {"read_bytes_per_s": 1e9, "write_bytes_per_s": 1e9}  # measuring takes a second
    paths = [{"path": str(folder / name), **rates} for name in ("a", "b")]
    # Of the 10,000 parameters of a rank; three buffers of 1024 among them.
    return {**RANDOM, "storage": {"paths": paths, "host_memory_bytes": 12 * 7000, "buffers": 3}}


def case_facts(case: Case, blocks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Stock against planned: losses, norms and weights of every step, all state at the end."""
    stock = Run(case)
    stock.train(STEPS)
    facts: dict[str, Any] = {"stock": stock.end()}
    numels = [leaf.numel() for o in stock.hybrid.cpu_optimizers for leaf in leaves(o)]
    facts["tails"] = sum(numel % 16 > 0 for numel in numels)
    for name, block in blocks.items():
        run = Run(case, block)
        run.train(STEPS)
        facts[f"{name} away"] = [max(run.residents), run.residents[-1]]
        facts[f"{name} lanes"] = sorted(run.lanes)
        facts[f"{name} summary"] = run.plugin.summary()
        facts[f"{name} updates"] = run.plugin.summary()["updates"]
        facts[name] = run.end()
    return facts


def leaves(optimizer: Any) -> list[Tensor]:
    return [leaf for group in optimizer.param_groups for leaf in group["params"]]


def resume_facts(folder: Path) -> dict[str, Any]:
    """Saved by one and continued by the other; loaded into a run that goes on."""
    case = CASES["bf16"]
    blocks = {"stock": None, "planned": RANDOM, "stored": stored(folder)}
    facts: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for name, block in blocks.items():
        run = Run(case, block)
        run.train(10)
        paths[name] = run.save(folder, name)
        facts[f"{name} away after saving"] = run.away() if block else 0
        run.train(3)
        run.load(paths[name], 10).train(6)
        if block:
            facts[f"{name} updates after loading"] = run.plugin.summary()["updates"] - 13
        facts[f"{name}, loaded into itself"] = run.end()
    for writer, path in paths.items():
        for reader, block in blocks.items():
            if {writer, reader} == {"planned", "stored"}:
                continue
            run = Run(case, block).load(path, 10)
            run.train(6)
            facts[f"{writer} to {reader}"] = run.end()
    return facts


def reader_facts() -> dict[str, Any]:
    """What every way to the state on the host finds, and what is left after closing."""
    stock = Run(CASES["bf16"])
    run = Run(CASES["bf16"])
    before = trace(run)
    run.loop = megatron.attach(run.chunk, run.optimizer, config={"lowtide": {"offload": FAST}})
    during = trace(run)
    updater, pending = run.plugin._updater, []
    update = updater.update

    def noted(scale: float) -> None:  # gradients that are still on their way
        pending.append(len(run.hybrid._cpu_optimizer_map_data_event))
        update(scale)

    updater.update = noted
    for each in (stock, run):
        each.train(4)
    facts: dict[str, Any] = {"away": [run.away()], "pending": pending}
    hybrid = run.hybrid
    ways: dict[str, Callable[[Any], Any]] = {
        "state": lambda h: h.state,
        "state_dict": lambda h: h.state_dict(),
        "update_fp32_param_by_new_param": lambda h: h.update_fp32_param_by_new_param(),
    }
    for name, read in ways.items():
        for each in (stock, run):
            each.train(1)
        facts["away"].append(run.away())
        for each in (stock, run):
            read(each.hybrid)
        masters = [digest(h.param_to_inner_param.values()) for h in (stock.hybrid, hybrid)]
        facts[name] = [run.away(), masters[0] == masters[1]]
    facts["changed"] = before != during
    run.loop.close()
    facts["restored"] = before == trace(run)
    for each in (stock, run):
        each.loop = None
        each.train(2)
    facts["goes on"] = [stock.end(), run.end()]
    return facts


def failing_alone(folder: Path) -> list[str]:
    """The last rank cannot be planned, has no file, no memory: what all ranks say."""
    said = []

    def failing(*_arguments: Any) -> None:
        raise RuntimeError("not enough memory")

    for owner, name in ((Hybrid, "__init__"), (ScratchFile, "_check"), (OneUpdate, "on_host")):
        real, run = getattr(owner, name), Run(CASES["bf16"])
        try:
            if dist.get_rank() == dist.get_world_size() - 1:
                setattr(owner, name, failing)
            config = {"lowtide": {"offload": stored(folder)}}
            run.loop = megatron.attach(run.chunk, run.optimizer, config=config)
            run.train(1)
        except (LowtideError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        setattr(owner, name, real)
        if run.loop is not None:
            run.loop.close()
    return said


def trace(run: Run) -> list[Any]:
    """Return what an adapter could leave behind."""
    hybrid = run.hybrid
    return [type(hybrid), sorted(vars(hybrid)), [sorted(vars(o)) for o in hybrid.cpu_optimizers]]


def refusal_facts() -> dict[str, str]:
    """The text of every refusal."""

    def attempt(spoil: Callable[[Run], Any] = lambda _run: None, **changes: Any) -> str:
        run = Run(CASES["fp32, every rank all"])
        if changes:
            run.chunk, run.optimizer = build(run.case, **changes)
            run.inner = run.optimizer.chained_optimizers[0]
        try:
            spoil(run)
            run.loop = megatron.attach(
                run.chunk, run.optimizer, config={"lowtide": {"offload": DEVICE}}
            )
            run.train(1)
        except LowtideError as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def group(**settings: Any) -> Callable[[Run], None]:
        return lambda run: run.hybrid.cpu_optimizers[3].param_groups[0].update(settings)

    def swap(run: Run) -> None:
        run.hybrid.cpu_optimizers[0].__class__ = torch.optim.Adam

    def replace(run: Run) -> None:
        params = run.hybrid.param_groups[0]["params"]
        params[0] = params[0].detach().clone()

    def forget(run: Run) -> None:
        optimizer = run.hybrid.cpu_optimizers[0]
        run.hybrid._set_sub_optimizer_grads = lambda: None
        leaves(optimizer)[0].grad = None

    def bare(run: Run) -> None:
        run.optimizer = torch.optim.AdamW(run.chunk.parameters())

    return {
        "bare": attempt(bare),
        "off": attempt(optimizer_cpu_offload=False),
        "fraction": attempt(optimizer_offload_fraction=0.0),
        "sgd": attempt(optimizer="sgd"),
        "beta1": attempt(adam_beta1=0.5),
        "fused": attempt(group(fused=False)),
        "amsgrad": attempt(group(amsgrad=True)),
        "maximize": attempt(group(maximize=True)),
        "adam": attempt(swap),
        "replaced": attempt(replace),
        "two": attempt(lambda run: run.optimizer.chained_optimizers.append(run.inner)),
        "fsdp": attempt(
            lambda run: setattr(run.inner, "ddp_config", argparse.Namespace(use_megatron_fsdp=True))
        ),
        "moved": attempt(lambda run: setattr(run.hybrid, "_init_sub_optimizers", None)),
        "no gradient": attempt(forget),
        "good": attempt(),
    }


def main() -> None:
    dist.init_process_group("gloo")
    facts: dict[str, Any] = {}
    with pretend_gpu(example.without_gpu):
        parallel_state.initialize_model_parallel(1, 1)
        folder = Path(sys.argv[1])
        groups = set(dist.distributed_c10d._world.pg_map)
        for name, case in CASES.items():
            blocks = {"random": RANDOM, "auto": DEVICE}
            if name == STORED:
                blocks["stored"] = stored(folder)
            facts[name] = case_facts(case, blocks)
        facts = {"cases": facts, "resume": resume_facts(folder)}
        facts["failing alone"] = failing_alone(folder)
        facts["groups"] = len(set(dist.distributed_c10d._world.pg_map) - groups)
        facts["readers"] = reader_facts()
        facts["refusals"] = refusal_facts()
    leave_result(facts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
