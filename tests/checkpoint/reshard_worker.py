"""Run by test_reshard.py and test_state.py: save in many layouts, load in others, leave facts."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from lowtide.checkpoint.adapters.reshard import load_resharded, needs_resharding
from lowtide.checkpoint.state import load_state, open_state
from lowtide.core.errors import CheckpointError
from tests.helpers.ranks import leave_result

KINDS = ("fp32", "exp_avg", "exp_avg_sq")


class Net(torch.nn.Module):
    """Tied weights, a frozen one, a buffer, and sizes that 2, 3 and 4 do not divide."""

    def __init__(self, width: int = 13) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 7)
        self.first = torch.nn.Linear(7, width)
        self.frozen = torch.nn.Linear(width, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.last = torch.nn.Linear(5, 7, bias=False)
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
            self.seen += 0.25
        hidden = self.first(self.embed(x)) * self.gain
        hidden = self.last(self.norm(self.frozen(torch.tanh(hidden))))
        return F.cross_entropy(self.head(hidden).float(), y)


def config(
    stage: int, precision: str, *, is_offloaded: bool = False, scale: int = 9, **extra: Any
) -> Any:
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 20}
    if stage == 3:
        zero["sub_group_size"] = 100
    if is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu"}
    zero.update(extra.pop("zero", {}))
    found = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1000000,
        **extra,
    }
    if precision == "fp16":
        found["fp16"] = {"enabled": True, "initial_scale_power": scale}
    elif precision == "bf16":
        found["bf16"] = {"enabled": True}
    elif precision == "bf16_fp32":  # ZeRO 1 has an optimizer class of its own for it
        found["bf16"] = {"enabled": True}
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found


def names_of(model: torch.nn.Module, groups: int) -> list[list[str]]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if groups == 1:
        return [list(trained)]
    return [
        [n for n, p in trained.items() if (p.dim() > 1) == is_wide] for is_wide in (True, False)
    ]


def build(ds_config: Any, *, seed: int, groups: int = 2, width: int = 13) -> Any:
    torch.manual_seed(seed)
    model = Net(width)
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters: Any = trained
    if groups == 2:
        parameters = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "lr": 3e-3},
        ]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=ds_config)[0]


def train(engine: Any, steps: int, *, seed: int) -> list[float]:
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    losses = []
    for _ in range(steps):
        x = torch.randint(0, 11, (4,), generator=generator)
        loss = engine(x, torch.randint(0, 11, (4,), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full(engine: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Every optimizer state of every trained parameter, through DeepSpeed's own accessors."""
    found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in KINDS}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 0:
            key, states = master(engine, parameter)
            values = {"fp32": key, **{kind: states[kind] for kind in KINDS[1:]}}
        else:
            values = {"fp32": safe_get_full_fp32_param(parameter)}
            for kind in KINDS[1:]:
                values[kind] = safe_get_full_optimizer_state(parameter, kind)
        for kind in KINDS:
            found[kind][name] = values[kind].detach().clone().reshape(-1)
    return found


def master(engine: Any, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, Any]:
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups"):
        return parameter, optimizer.state[parameter]
    for group, keys in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for candidate, key in zip(group, keys, strict=True):
            if candidate is parameter:
                return key, optimizer.optimizer.state[key]
    raise KeyError(parameter)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        named = [*engine.module.named_parameters(), *engine.module.named_buffers()]
        return {name: value.detach().clone() for name, value in named if name != "scratch"}


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names whose bits differ, or that only one side has."""
    found = [str(name) for name in left.keys() ^ right.keys()]
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        same = a.dtype == b.dtype and a.numel() == b.numel()
        if not (same and torch.equal(a.reshape(-1), b.reshape(-1))):
            found.append(str(name))
    return sorted(found)


def to_universal(folder: Path) -> None:
    """Stock conversion of folder/tag to folder/universal."""
    if torch.distributed.get_rank() == 0:
        arguments = argparse.Namespace(
            input_folder=str(folder / "tag"), output_folder=str(folder / "universal"),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
            inject_missing_state=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    torch.distributed.barrier()


def save(folder: Path, ds_config: Any, *, groups: int = 2, with_universal: bool = True) -> None:
    """Train three steps and save, stock; convert to stock's universal format."""
    engine = build(ds_config, seed=0, groups=groups)
    train(engine, 3, seed=1)
    state = {"epoch": 7, "sampler": torch.arange(3)}
    with contextlib.redirect_stdout(io.StringIO()):
        engine.save_checkpoint(str(folder), tag="tag", client_state=state)
    truth = {"weights": weights(engine)}
    if torch.distributed.get_rank() == 0:
        torch.save(truth, folder / "truth.pt")
    engine.destroy()
    torch.distributed.barrier()
    if with_universal:
        to_universal(folder)


def stock_universal(folder: Path, ds_config: Any) -> Any:
    engine = build({**ds_config, "checkpoint": {"load_universal": True}}, seed=0)
    engine.load_checkpoint(str(folder), tag="universal")
    if engine.zero_optimization_stage() == 3:
        # Two faults of stock 0.19.8 are mended, or it would be no measure: every group gets the
        # hyperparameters of the first, and all sub-groups count their steps in one tensor.
        saved_groups = open_state(folder / "tag").groups or []
        for group, saved in zip(engine.optimizer.param_groups, saved_groups, strict=True):
            group.update(saved)
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
    return engine


def load(
    folder: Path, ds_config: Any, *, has_rival: bool, again: Path, warm: int = 0, groups: int = 2
) -> dict[str, Any]:
    """Load resharded, hold it to stock's universal load, train on, save again."""
    truth = torch.load(folder / "truth.pt")["weights"]
    engine = build(ds_config, seed=5, groups=groups)
    train(engine, warm, seed=3)
    facts: dict[str, Any] = {"needs": needs_resharding(engine, folder / "tag")}
    state = load_resharded(engine, folder / "tag")
    ours = full(engine)
    names = names_of(engine.module, groups)
    consolidated = {kind: load_state(folder / "tag", kind=kind, names=names) for kind in KINDS}
    facts["client"] = [state["epoch"], state["sampler"].tolist(), "module" in state]
    facts["counters"] = [engine.global_steps, engine.global_samples, engine.skipped_steps]
    facts["lr"] = [group["lr"] for group in engine.optimizer.param_groups]
    facts["decay"] = [group["weight_decay"] for group in engine.optimizer.param_groups]
    facts["scheduler"] = engine.lr_scheduler.last_batch_iteration
    facts["scale"] = getattr(engine.optimizer, "loss_scale", 1.0)
    live = weights(engine)
    facts["weights"] = differing(live, {name: truth[name].to(live[name].dtype) for name in live})
    trained = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    facts["states"] = [
        f"{kind} {name}"
        for kind in KINDS
        for name in differing(ours[kind], {name: consolidated[kind][name] for name in trained})
    ]
    if has_rival:
        facts["universal_files"] = [
            f"{kind} {name}"
            for kind in KINDS
            for name in trained
            if differing({"": ours[kind][name]}, {"": universal_file(folder, name, kind)})
        ]
    engine.save_checkpoint(str(again), tag="tag", client_state={})
    torch.distributed.barrier()
    kept = {kind: load_state(again / "tag", kind=kind, names=names) for kind in KINDS}
    facts["saved_again"] = [
        f"{kind} {name}" for kind in KINDS for name in differing(kept[kind], consolidated[kind])
    ]
    facts["losses"] = train(engine, 3, seed=2)
    after = full(engine)
    engine.destroy()
    if has_rival:
        rival = stock_universal(folder, ds_config)
        theirs = full(rival)
        facts["rival"] = [
            f"{kind} {name}" for kind in KINDS for name in differing(ours[kind], theirs[kind])
        ]
        facts["rival_losses"] = train(rival, 3, seed=2)
        theirs = full(rival)
        facts["rival_after"] = [
            f"{kind} {name}" for kind in KINDS for name in differing(after[kind], theirs[kind])
        ]
        rival.destroy()
    return facts


def universal_file(folder: Path, name: str, kind: str) -> torch.Tensor:
    found = torch.load(folder / "universal" / "zero" / name / f"{kind}.pt", weights_only=False)
    return (found["param"] if isinstance(found, dict) else found).reshape(-1)


def save_all(root: Path) -> dict[str, Any]:
    size = torch.distributed.get_world_size()
    for stage in (1, 2, 3):
        for precision in ("fp32", "bf16"):
            save(root / f"w{size}_z{stage}_{precision}", config(stage, precision))
    return {}


MATRIX: dict[int, list[tuple[str, int, str, bool, bool]]] = {
    # ranks: (source, stage, precision, is offloaded, stock can do it too)
    1: [("w3_z2_bf16", 1, "bf16", False, True), ("w3_z3_fp32", 3, "fp32", False, True)],
    2: [
        ("w3_z1_bf16", 2, "bf16", True, True),
        ("w3_z3_bf16", 3, "bf16", True, True),
        ("w3_z2_fp32", 3, "fp32", False, False),
        ("w2_z2_bf16", 1, "bf16", False, True),
        ("w2_z1_fp32", 2, "fp32", False, True),
    ],
    3: [
        ("w2_z1_fp32", 2, "fp32", False, True),
        ("w2_z3_bf16", 2, "bf16", True, False),
        ("w2_z3_bf16", 3, "bf16", False, True),
    ],
    4: [
        ("w3_z2_bf16", 2, "bf16", False, True),
        ("w3_z3_fp32", 3, "fp32", True, True),
        ("w2_z1_bf16", 3, "bf16", False, False),
        ("w2_z2_fp32", 1, "bf16", False, True),
    ],
}


def load_all(root: Path) -> dict[str, Any]:
    size = torch.distributed.get_world_size()
    facts = {}
    for source, stage, precision, is_offloaded, has_rival in MATRIX[size]:
        key = f"{source} to w{size}_z{stage}_{precision}{'_cpu' if is_offloaded else ''}"
        facts[key] = load(
            root / source,
            config(stage, precision, is_offloaded=is_offloaded),
            has_rival=has_rival,
            again=root / f"again_{key.replace(' ', '_')}",
        )
    return facts


CPU_ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
HOST = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
SPECIAL = {"round_robin_gradients": True, "parameter_alignment": True}
VARIANTS: list[tuple[str, Any, int, Any, dict[str, Any]]] = [
    # name, what saves, its groups, what loads, how
    ("own_class", config(1, "bf16_fp32"), 2, config(2, "bf16"), {}),
    ("to_own_class", config(2, "bf16"), 2, config(1, "bf16_fp32"), {}),
    ("order", config(2, "bf16", zero=SPECIAL), 2, config(2, "bf16"), {}),
    ("to_order", config(2, "fp32"), 2, config(1, "fp32", zero=SPECIAL), {}),
    ("elastic", config(1, "bf16", zero={"elastic_checkpoint": True}), 2, config(2, "bf16"), {}),
    ("from_plain", config(0, "fp32"), 2, config(2, "fp32"), {}),
    ("from_plain_bf16", config(0, "bf16"), 1, config(3, "bf16"), {"groups": 1}),
    ("to_plain", config(2, "fp32"), 2, config(0, "fp32"), {}),
    ("to_plain_bf16", config(3, "bf16"), 2, config(0, "bf16"), {}),
    ("scaled", config(2, "fp16"), 2, config(3, "fp16", scale=5), {}),
    ("warm", config(3, "bf16"), 2, config(2, "bf16"), {"warm": 2}),
    ("to_warm", config(1, "bf16"), 2, config(3, "bf16"), {"warm": 2}),
    ("to_cpu_adam", config(2, "bf16"), 2, config(3, "bf16", is_offloaded=True, **CPU_ADAM), {}),
    ("cpu_adam", config(2, "bf16", is_offloaded=True, **CPU_ADAM), 2, config(1, "bf16"), {}),
    ("to_host", config(2, "bf16"), 2, config(3, "bf16", zero=HOST), {}),
    ("old_format", config(2, "bf16", checkpoint={"checkpoint_serialization": False}), 2,
     config(3, "bf16"), {}),
]  # fmt: skip


def variants(root: Path) -> dict[str, Any]:
    facts = {}
    for name, saves, groups, loads, how in VARIANTS:
        save(root / name, saves, groups=groups, with_universal=False)
        again = root / f"again_{name}"
        facts[name] = load(root / name, loads, has_rival=False, again=again, **how)
    return facts


def refused(engine: Any, checkpoint: Path, **options: Any) -> str:
    try:
        load_resharded(engine, checkpoint, **options)
    except CheckpointError as error:
        return str(error)
    return "no error"


def partial(root: Path) -> dict[str, Any]:
    """Loads that take a part, and loads that are refused; all from three ranks of ZeRO 3."""
    source, facts = root / "w3_z3_bf16" / "tag", {}
    rank = torch.distributed.get_rank()
    engine = build(config(3, "bf16"), seed=0)
    train(engine, 0, seed=1)
    engine.save_checkpoint(str(root / "untrained"), tag="tag")
    torch.distributed.barrier()
    facts["same_layout_needs"] = needs_resharding(engine, root / "untrained")
    loaded = load_resharded(engine, source, load_lr_scheduler_states=False)
    facts["no_scheduler"] = [engine.lr_scheduler.last_batch_iteration, "lr_scheduler" in loaded]
    load_resharded(engine, root / "untrained")
    facts["untrained"] = [len(engine.optimizer.optimizer.state), engine.global_steps]
    engine.destroy()

    engine = build(config(2, "bf16"), seed=5)
    for key in ("load_optimizer_states", "load_module_only"):
        load_resharded(engine, source, **{key: key == "load_module_only"})
        kept = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
        kept = {name: value for name, value in kept.items() if value is not None}
        truth = load_state(source)
        facts[key] = [
            differing(kept, {name: truth[name] for name in kept}), engine.global_steps,
            len(engine.optimizer.optimizer.state), engine.lr_scheduler.last_batch_iteration,
        ]  # fmt: skip
        engine.global_steps = 0
    engine.pipeline_parallelism = True
    facts["pipeline"] = refused(engine, source)
    engine.pipeline_parallelism = False
    facts["no_folder"] = refused(engine, root / "nowhere")

    damaged = root / "damaged"
    if rank == 0:
        shutil.copytree(source, damaged)
        with open(damaged / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", "r+b") as file:
            file.truncate(2000)
    torch.distributed.barrier()
    # Rank 0 of two needs what ranks 0 and 1 of three saved, and so does not meet the damage.
    sharded = build(config(3, "bf16"), seed=5)
    facts["damaged"] = refused(sharded, damaged)
    sharded.destroy()
    engine.destroy()
    for key, options in [("width", {"width": 15}), ("groups", {"groups": 1})]:
        engine = build(config(2, "bf16"), seed=5, **options)
        facts[key] = refused(engine, source)
        if key == "groups":
            facts["groups_module_only"] = refused(engine, source, load_module_only=True)
        engine.destroy()
    engine = build(config(2, "bf16"), seed=5)
    engine.module.register_buffer("extra", torch.ones(2))
    facts["buffer"] = refused(engine, source)
    facts["buffer_not_strict"] = refused(engine, source, strict=False)
    facts["buffer_kept"] = engine.module.extra.tolist()
    engine.destroy()
    return facts


def contents(root: Path) -> dict[str, Any]:
    """What test_state.py reads: more kinds of checkpoints, and what stock makes of them."""
    for stage, precision, groups in [(0, "fp32", 2), (0, "bf16", 1), (2, "fp16", 2)]:
        folder = root / f"z{stage}_{precision}"
        save(folder, config(stage, precision), groups=groups, with_universal=False)
    save(root / "order", config(2, "bf16", zero=SPECIAL), with_universal=False)
    engine = build(config(3, "bf16"), seed=0)
    train(engine, 1, seed=1)
    engine.save_checkpoint(str(root / "unfrozen"), tag="tag", exclude_frozen_parameters=True)
    engine.destroy()
    llama(root / "llama")
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for latest in sorted(root.glob("*/latest")):
            folder = latest.parent
            if (folder / "latest").exists() and not folder.name.startswith("z0"):
                with contextlib.redirect_stdout(io.StringIO()):
                    found = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="tag")
                torch.save(dict(found), folder / "stock.pt")
    torch.distributed.barrier()
    return {}


def llama(folder: Path) -> None:
    """A tiny Llama, as Hugging Face makes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model_config = LlamaConfig(
        vocab_size=11, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(model_config)
    engine = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(3, "bf16")
    )[0]
    for _ in range(2):
        x = torch.randint(0, 11, (4, 6))
        engine.backward(engine(input_ids=x, labels=x).loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag="tag")
    if torch.distributed.get_rank() == 0:
        model_config.save_pretrained(folder)
    engine.destroy()


COMMANDS = {
    "save": save_all, "load": load_all, "variants": variants, "partial": partial,
    "contents": contents,
}  # fmt: skip


def main() -> None:
    root = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    facts: dict[str, Any] = {}
    for command in sys.argv[2:]:
        facts.update(COMMANDS[command](root))
    leave_result(facts)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
