"""Load a checkpoint into an engine with another number of ranks or another ZeRO stage.

Each rank reads what it needs of the files of the ranks that saved, and nothing else: no conversion
and no second copy on disk. The result is what DeepSpeed's ``ds_to_universal`` and
``load_universal`` give, bit for bit, where those work: both sides of stage 1 and 2, or both of
stage 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint.adapters.fill import copied, fill, persistent_buffers
from lowtide.checkpoint.adapters.live_state import LiveState, is_model_parallel, live_state
from lowtide.checkpoint.state.rank_files import RankFiles, tag_folder
from lowtide.checkpoint.state.view import CheckpointState, open_state
from lowtide.checkpoint.state.zero_layout import shapes_of
from lowtide.core.errors import CheckpointError, listed

logger = logging.getLogger("lowtide")

# What DeepSpeed's own load_checkpoint keeps out of the client state it returns.
_NOT_CLIENT = {
    "module": True, "skipped_steps": True, "global_steps": True, "dp_world_size": True,
    "mp_world_size": True, "data_sampler": True, "random_ltd": True,
    "frozen_param_fragments": True,
}  # fmt: skip


def needs_resharding(
    engine: Any, checkpoint: Path, *, own: int | None = None, load_module_only: bool = False
) -> bool:
    """Return whether stock DeepSpeed could not load `checkpoint` into `engine` as it is.

    That is so when the ZeRO stage, the number of ranks that ZeRO divides over, or the place of a
    parameter differs (its order, its group, its alignment). Reads the files of rank 0 only, and
    says the same on all ranks. An engine with pipeline, tensor or expert parallelism is left to
    DeepSpeed: the answer is no.

    Args:
        engine: A DeepSpeed engine.
        checkpoint: The folder of one tag, or a folder with the file ``latest``.
        own: This rank, where the folder may hold no other rank's files; they are then looked at.
        load_module_only: Only the model is asked for, which below ZeRO 3 is whole in one file.

    Raises:
        CheckpointError: there is no checkpoint, or it is one that Lowtide cannot read.
    """
    if is_model_parallel(engine):
        return False
    files = RankFiles(tag_folder(Path(checkpoint)), own=own)
    stage = int(engine.zero_optimization_stage()) if engine.zero_optimization() else 0
    if load_module_only:  # stock loads no weights at all from ZeRO 3's files in this case
        return 3 in (files.stage, stage)
    if files.stage != stage:
        return True
    if stage == 0:
        return False
    if files.world_size != engine.seq_dp_world_size or files.is_bf16 != engine.bfloat16_enabled():
        return True
    first = files.optimizer(own or 0)
    if ("zero_stage" in first) == hasattr(engine.optimizer, "bf16_groups"):
        return True
    paddings = first.get("param_alignment_paddings")
    if paddings is not None and paddings != getattr(
        engine.optimizer, "round_robin_bit16_padding", paddings
    ):
        return True
    saved = shapes_of(files.model()["param_shapes"])
    live = shapes_of(engine._get_zero_param_shapes())
    return [list(group.items()) for group in saved] != [list(group.items()) for group in live]


def load_resharded(
    engine: Any,
    checkpoint: Path,
    *,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    strict: bool = True,
) -> dict[str, Any]:
    """Load a checkpoint of any ZeRO stage and number of ranks into `engine`. Collective.

    Restores the float32 masters and from them the model's weights, frozen parameters, buffers,
    optimizer states and hyperparameters, loss scaler, learning rate scheduler and counters.
    Without optimizer states the masters are still the stored ones, in full precision.

    Args:
        engine: A data-parallel DeepSpeed engine, as `deepspeed.initialize` returned it.
        checkpoint: The folder of one tag, or a folder with the file ``latest``.
        load_optimizer_states: Restore optimizer states, hyperparameters and the loss scaler.
        load_lr_scheduler_states: Restore the learning rate scheduler.
        load_module_only: Restore the model and nothing else.
        strict: Refuse a checkpoint that has parameters or buffers the model has not, or lacks a
            buffer or frozen parameter. A trained parameter must always be there.

    Returns:
        The client state, with the same keys as `load_checkpoint` returns it, but without the
        frozen parameters.

    Raises:
        CheckpointError: on all ranks, when one of them cannot load. Raised before anything has
            changed, unless a file turns out to be damaged while it is read; the engine must then
            not be used.
    """
    loads_optimizer = load_optimizer_states and not load_module_only
    found: dict[str, Any] = {}

    def prepare() -> None:
        live = live_state(engine)
        groups = _group_names(engine) if live.base is engine.optimizer else _members(live)
        state = open_state(checkpoint, names=groups)
        _check(state, live, loads_optimizer=loads_optimizer, strict=strict, module=engine.module)
        found.update(live=live, state=state)

    _together(engine, checkpoint, prepare)
    live, state = found["live"], found["state"]
    if engine._optimizer_has_ckpt_event_prologue():
        engine.optimizer.checkpoint_event_prologue()  # ZeRO 3 lets go of gathered parameters
    _together(engine, checkpoint, lambda: fill(state, live, engine.module, loads_optimizer))
    live.relink(loads_optimizer and len(state.kinds) > 1)
    live.refresh()
    if engine._optimizer_has_ckpt_event_epilogue():
        engine.optimizer.checkpoint_event_epilogue()
    if loads_optimizer:
        _restore_scaler(engine.optimizer, state.optimizer)
    if not load_module_only:
        _restore_counters(engine, state.model, with_scheduler=load_lr_scheduler_states)
    _tell(engine, state)
    return _client_state(
        state.model, scheduler=load_lr_scheduler_states, optimizer=load_optimizer_states
    )


def _tell(engine: Any, state: CheckpointState) -> None:
    if engine.global_rank == 0:
        logger.info(
            "%s: loaded what %d ranks of ZeRO %d saved into %d of ZeRO %d",
            state.folder, state.world_size, state.stage, engine.seq_dp_world_size,
            engine.zero_optimization_stage(),
        )  # fmt: skip


def _together(engine: Any, checkpoint: Path, work: Callable[[], None]) -> None:
    """Do `work`; raise on every rank when it failed on one, as no rank may wait for it later."""
    import torch.distributed as dist

    problem: CheckpointError | None = None
    try:
        work()
    except CheckpointError as error:
        problem = error
    except Exception as error:  # noqa: BLE001 - an unforeseen one must not leave the others waiting either
        problem = CheckpointError(
            f"{checkpoint}: cannot be loaded ({type(error).__name__}: {error}); load it with the "
            "number of ranks and the ZeRO stage that saved it"
        )
        problem.__cause__ = error
    has_failed = torch.tensor([problem is not None], dtype=torch.int32, device=engine.device)
    dist.all_reduce(has_failed, op=dist.ReduceOp.MAX)
    if not has_failed.item():
        return
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if problem is None else str(problem))
    if problem is not None:
        raise problem
    rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
    raise CheckpointError(f"rank {rank} cannot load it: {text}")


def _members(live: LiveState) -> list[list[str]]:
    count = 1 + max((slot.group for slot in live.slots), default=-1)
    names: list[list[str]] = [[] for _ in range(count)]
    for slot in live.slots:
        names[slot.group] += slot.members
    return names


def _group_names(engine: Any) -> list[list[str]]:
    """Return the groups of a stage 0 optimizer with all they have, frozen parameters too."""
    names = engine.param_names
    return [[names[p] for p in group["params"]] for group in engine.optimizer.param_groups]


def _check(
    state: CheckpointState,
    live: LiveState,
    *,
    loads_optimizer: bool,
    strict: bool,
    module: torch.nn.Module,
) -> None:
    """Refuse, before anything changes, what does not fit."""
    problems = []
    for name, shape in {**live.trained, **live.frozen_shapes}.items():
        try:
            saved = state.parameters[state.canonical(name)]
        except CheckpointError:
            if name in live.trained or strict:
                problems.append(f'it has no "{name}"')
            continue
        if saved.shape != shape:
            problems.append(f'"{name}" is {tuple(saved.shape)} there and {tuple(shape)} here')
        elif name in live.trained and saved.group is None and loads_optimizer:
            problems.append(f'"{name}" was frozen there and is trained here')
    if strict:
        problems += _unknown(state, live, module)
    if loads_optimizer and state.groups is not None:
        problems += _other_groups(state, live)
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{state.folder}: does not fit this model and optimizer: {'; '.join(problems[:8])}"
            f"{more}; build both as they were when it was saved, or load the model only"
        )


def _unknown(state: CheckpointState, live: LiveState, module: torch.nn.Module) -> list[str]:
    here = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    kept = {*live.trained, *live.frozen_shapes, *here}
    there = {*state.parameters} - kept
    found = [f"it has {listed(there, 5)}, which the model has not"] if there else []
    buffers = set(persistent_buffers(module))
    if buffers != {*state.buffers}:
        different = buffers ^ {*state.buffers}
        found.append(f"only one of the two has the buffers {listed(different, 5)}")
    return found


def _other_groups(state: CheckpointState, live: LiveState) -> list[str]:
    saved = state.groups or []
    groups = live.base.param_groups
    if len(saved) != len(groups):
        return [f"its optimizer has {len(saved)} parameter groups, this one {len(groups)}"]
    problems = []
    for index, group in enumerate(saved):
        # What torch and DeepSpeed call the hyperparameters that only one family of them has.
        here = {key for key in ("betas", "momentum", "rho", "alpha") if key in groups[index]}
        there = {key for key in ("betas", "momentum", "rho", "alpha") if key in group}
        if here != there:
            problems.append(
                f"group {index} was stepped by an optimizer with {listed(there)}, this one has "
                f"{listed(here)}"
            )
        for name in live.group_members(index):
            if name not in state.parameters and name not in state.shared:
                continue
            saved_group = state.parameters[state.canonical(name)].group
            if saved_group is not None and saved_group != index:
                problems.append(f'"{name}" is in group {saved_group} there and {index} here')
    return problems


def _restore_scaler(optimizer: Any, saved: Mapping[str, Any]) -> None:
    live = getattr(optimizer, "loss_scaler", None)
    stored = saved.get("loss_scaler")
    # A scaler of another kind belongs to another precision: that of this engine stays.
    if live is not None and stored is not None and type(stored) is type(live):
        optimizer.loss_scaler = stored
        for key in ("dynamic_loss_scale", "overflow"):
            if key in saved:
                setattr(optimizer, key, saved[key])
    if "clip_grad" in saved and hasattr(optimizer, "clip_grad"):
        optimizer.clip_grad = saved["clip_grad"]


def _restore_counters(engine: Any, model: Mapping[str, Any], *, with_scheduler: bool) -> None:
    if with_scheduler and engine.lr_scheduler is not None and model.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(copied(model["lr_scheduler"]))
    if engine.random_ltd_enabled() and model.get("random_ltd") is not None:
        engine.random_ltd_scheduler.load_state_dict(copied(model["random_ltd"]))
    sampler, loader = model.get("data_sampler"), engine.training_dataloader
    if sampler is not None and loader is not None and engine.curriculum_learning_enabled():
        loader.data_sampler.load_state_dict(copied(sampler))
    engine.global_steps = model["global_steps"]
    default = engine.global_steps * engine.train_batch_size()
    engine.global_samples = model.get("global_samples", default)
    engine.skipped_steps = model["skipped_steps"]
    engine.loaded_checkpoint_mp_world_size = model["mp_world_size"]
    engine.loaded_checkpoint_dp_world_size = model["dp_world_size"]


def _client_state(model: Mapping[str, Any], *, scheduler: bool, optimizer: bool) -> dict[str, Any]:
    hidden = {**_NOT_CLIENT, "lr_scheduler": scheduler, "optimizer": optimizer}
    return {key: copied(value) for key, value in model.items() if not hidden.get(key)}
