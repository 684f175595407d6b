"""DeepSpeed: the engine behind ``save_checkpoint`` and ``load_checkpoint``.

DeepSpeed 0.19.8 has no registry for checkpoint engines. Its own factory is called by name from
`deepspeed.runtime.engine`, so for the moment in which our engine is built, that name is ours. The
engine calls itself decoupled: DeepSpeed then neither commits nor writes ``latest`` on the training
thread. It gives no commit info, so that nothing waits for storage at a step either: the wait for
the copies is a listener of BEFORE_UPDATE, which pipeline parallelism passes through as well.
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import logging
import math
import os
import shutil
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.checkpoint.adapters.overwriting import StockUpdates
from lowtide.checkpoint.store.folders import scripts_folder
from lowtide.core.errors import CheckpointError, HostError
from lowtide.core.restart import read_record
from lowtide.core.state import StateAuthority

if TYPE_CHECKING:
    from lowtide.checkpoint.plugin import CheckpointPlugin

logger = logging.getLogger("lowtide")

_FACTORY = "create_checkpoint_engine"
_KEYWORDS = {"config_params", "groups", "zero_stage", "has_moe_layers", "optimize_dp_state"}
# Methods of the engine that move or rewrite the state outside of an update.
_REWRITERS = ("offload_states", "reload_states", "load_module_state_dict", "load_checkpoint")
_SCRIPTS = "_copy_recovery_script"  # puts zero_to_fp32.py beside the checkpoints, on rank 0
_SCRIPTS_S = 1.0  # nobody reads them before the checkpoint is complete
# Optimizers that begin to update while the backward pass still runs, in processes of their own.
_EARLY = ("ZenFlow", "SuperOffload")


class DeepSpeedAdapter:
    """Puts the plugin behind one DeepSpeed engine."""

    def __init__(self, plugin: CheckpointPlugin, authority: StateAuthority) -> None:
        self._plugin = plugin
        self._authority = authority
        self._stock_factory: Callable[..., Any] | None = None
        self._engine: Callable[[], Any] = lambda: None
        self._updates: StockUpdates | None = None

    def before_engine(self) -> None:
        """Let DeepSpeed build our checkpoint engine into the engine that it builds next.

        Raises:
            HostError: DeepSpeed's inner interface has moved.
        """
        from deepspeed.runtime import engine as module

        stock = getattr(module, _FACTORY, None)
        if not callable(stock):
            raise HostError(
                f"deepspeed.runtime.engine.{_FACTORY} is gone, so the checkpoint plugin cannot "
                f"take its place; use a tested DeepSpeed (see docs/hosts.md)"
            )

        def create(**keywords: Any) -> Any:
            if not set(keywords) <= _KEYWORDS:
                raise HostError(
                    f"deepspeed.runtime.engine.{_FACTORY} was called with {sorted(keywords)}, "
                    f"known are {sorted(_KEYWORDS)}; use a tested DeepSpeed (see docs/hosts.md)"
                )
            return _make_engine(self._plugin)

        self._stock_factory = stock
        setattr(module, _FACTORY, create)

    def after_engine(self, engine: Any) -> None:
        """Give DeepSpeed its factory back; guard the methods that rewrite the state."""
        self._restore()
        self._engine = weakref.ref(engine)
        plugin = self._plugin
        optimizer = type(engine.optimizer).__name__
        if any(early in optimizer for early in _EARLY):
            plugin.never_lazy(f"{optimizer} updates the state during the backward pass too")
        self._updates = StockUpdates(engine.optimizer, self._authority)
        if hasattr(engine, _SCRIPTS):
            engine.__dict__[_SCRIPTS] = _forgiving(plugin, getattr(engine, _SCRIPTS))
        for name in _REWRITERS:
            stock = getattr(engine, name, None)
            if stock is not None:
                engine.__dict__[name] = _released(plugin, stock)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Save as the script would."""
        engine = self._engine()
        if engine is not None:
            engine.save_checkpoint(str(folder), client_state=client_state)

    def load(self, checkpoint: Path, options: Mapping[str, Any]) -> Any:
        """Load a checkpoint of another number of ranks or another ZeRO stage, or return None."""
        from lowtide.checkpoint.adapters import reshard

        engine = self._engine()
        if engine is None or _is_model_parallel(engine):
            return None
        own = _own_rank(checkpoint)
        is_module_only = options.get("load_module_only", False)
        if options.get("custom_load_fn") or not reshard.needs_resharding(
            engine, checkpoint, own=own, load_module_only=is_module_only
        ):
            return None
        if own is not None:
            raise CheckpointError(
                f"{checkpoint}: was saved with another ZeRO stage or another order of parameters "
                f"(or only the model is asked for, under ZeRO 3), and this node has only the files "
                f'of its own ranks; take the levels of "scope" '
                f'"node" out of lowtide.checkpoint.tiers for this start, so that the last level '
                f"is loaded"
            )
        self._plugin.forget_read()  # it reads parts of many files
        client_state = reshard.load_resharded(
            engine,
            checkpoint,
            load_optimizer_states=options.get("load_optimizer_states", True),
            load_lr_scheduler_states=options.get("load_lr_scheduler_states", True),
            load_module_only=is_module_only,
            strict=options.get("load_module_strict", True),
        )
        return str(checkpoint / "resharded"), client_state

    def wanted(self, checkpoint: Path) -> Collection[str]:
        """The model's file and, with ZeRO, this rank's part of the optimizer."""
        engine = self._engine()
        methods = ["_get_ckpt_name"]
        if engine is not None and engine.zero_optimization():
            methods.append("_get_zero_ckpt_name")
        names: list[str] = []
        # Without the names everything is checked all the same, and then read once more.
        with contextlib.suppress(Exception):
            for method in methods:
                path = getattr(engine, method)(str(checkpoint.parent), checkpoint.name)
                names.append(Path(path).name)
        return names

    def parts(self) -> int | None:
        """With ZeRO every rank has a part of its own."""
        engine = self._engine()
        if engine is None or not engine.zero_optimization():
            return None
        import torch.distributed as dist

        return dist.get_world_size() if dist.is_initialized() else 1

    def close(self) -> None:
        """Undo everything."""
        self._restore()
        updates, self._updates = self._updates, None
        if updates is not None:
            updates.close()
        engine = self._engine()
        if engine is not None:
            for name in (*_REWRITERS, _SCRIPTS):
                engine.__dict__.pop(name, None)

    def _restore(self) -> None:
        stock, self._stock_factory = self._stock_factory, None
        if stock is not None:
            from deepspeed.runtime import engine as module

            setattr(module, _FACTORY, stock)


def _own_rank(checkpoint: Path) -> int | None:
    """Return this rank where a node's `checkpoint` has no other node's ZeRO files, else None."""
    import torch.distributed as dist

    record = read_record(checkpoint)
    if record is None or record.get("nodes", 1) == 1 or not dist.is_initialized():
        return None
    # Another number of ranks has had all files brought to every node.
    return dist.get_rank() if record["world_size"] == dist.get_world_size() else None


def _is_model_parallel(engine: Any) -> bool:
    """Tell whether ranks hold different parts of the model for other reasons than ZeRO."""
    is_split = engine.mp_world_size > 1 or engine.has_moe_layers
    return bool(is_split or engine.pipeline_parallelism)


def _released(plugin: CheckpointPlugin, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def released(*args: Any, **kwargs: Any) -> Any:
        plugin.release()
        return stock(*args, **kwargs)

    return released


def _beside_a_save(
    plugin: CheckpointPlugin,
    place: Path,
    work: Callable[[], object],
    *,
    what: str,
    most_s: float = math.inf,
) -> None:
    """Do on rank 0 alone what a save does there, while the others wait for it in a barrier.

    So neither an error nor a file system that hangs may keep it. Whether the checkpoint itself can
    be written, all ranks find out and say together.
    """
    if not plugin.is_saving:
        work()
        return
    try:
        plugin.errand(place.absolute(), work, most_s=most_s)
    except OSError as error:
        logger.warning("checkpoint: %s cannot be written (%s)", what, error)


def _make_folder(path: Path, *, exist_ok: bool) -> None:
    if not (exist_ok and path.is_dir()):  # to make what is there would hang where writing does
        path.mkdir(parents=True, exist_ok=exist_ok)


def _forgiving(plugin: CheckpointPlugin, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def forgiving(save_path: Any) -> None:
        what = "zero_to_fp32.py, a copy of DeepSpeed's own,"
        work = functools.partial(_write_whole, stock, Path(save_path))
        _beside_a_save(plugin, Path(save_path), work, what=what, most_s=_SCRIPTS_S)

    return forgiving


def _write_whole(stock: Callable[[str], object], folder: Path) -> None:
    """Have `stock` write its files into `folder`, each of them whole or not at all."""
    scratch = scripts_folder(folder)
    scratch.mkdir()
    try:
        stock(str(scratch))
        for path in scratch.iterdir():
            target = folder / path.name
            if not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                path.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make_engine(plugin: CheckpointPlugin) -> Any:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class LazyCheckpointEngine(CheckpointEngine):
        """What DeepSpeed calls; everything else is the plugin's."""

        def __init__(self) -> None:
            super().__init__()
            self.name = "lowtide"

        def create(self, info: Any) -> None:
            """Begin a checkpoint, as far as DeepSpeed is concerned."""
            plugin.set_save_latest(bool(info.save_latest))

        def makedirs(self, path: Any, exist_ok: bool = False) -> None:
            """Make a folder, but not the checkpoint's own: that appears when it is complete."""
            if plugin.is_inside(Path(path)):
                return
            make = functools.partial(_make_folder, Path(path), exist_ok=exist_ok)
            _beside_a_save(plugin, Path(path), make, what="the folder of the checkpoints")

        def save(self, state_dict: Any, path: Any) -> None:
            """Take a state; its bytes are copied later."""
            if not plugin.add(state_dict, Path(path)):
                plugin.save_file(state_dict, Path(path))

        def load(self, path: Any, map_location: Any = None) -> Any:
            """Read a file. What was to be verified has been verified before."""
            return plugin.load_file(Path(path), map_location)

        def commit(self, info: Any) -> bool:  # noqa: ARG002
            """Agree: files outside of checkpoints are there already."""
            return True

        def is_decoupled(self) -> bool:
            """Keep DeepSpeed from committing on the training thread."""
            return True

        def preserves_storage_sharing(self) -> bool:
            """Slices are saved as slices, so DeepSpeed need not clone them first."""
            return False

        def cleanup(self) -> None:
            """Nothing: the session ends the plugin before the engine is destroyed."""

    return LazyCheckpointEngine()
