"""DeepSpeed host, second part: saving, loading, and ending a run that was asked to stop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.core.lifecycle import Event, Session
from lowtide.core.restart import (
    Choice,
    StopControl,
    choose,
    forget_record,
    read_record,
    write_record,
)

logger = logging.getLogger("lowtide")

UNCERTIFIED = "_lowtide_uncertified"  # on the engine: what `certify` still has to confirm


def stop_if_asked(engine: Any) -> None:
    """End the run here if all ranks have agreed to; every rank calls it after every step."""
    session: Session = engine.lowtide
    if session.stop is None or not session.poll_stop(
        model=engine.module, optimizer=engine.optimizer
    ):
        return
    if session.stop.config.then == "exit":
        _save_for_stop(engine, session.stop)
        session.close(status="stopped")
        raise SystemExit(0)


def _save_for_stop(engine: Any, stop: StopControl) -> None:
    def lacks_state() -> bool:
        # Saved without it, it could not be loaded again by the script that expects it there.
        return stop.client_state is None and bool(stop.client_keys)

    if stop.share(lacks_state):  # rank 0's view: all save, or none does
        if engine.global_rank == 0:
            logger.warning(
                "lowtide.stop: no checkpoint is saved before the end, because this script's own "
                "carry client_state (%s) that only it knows; set engine.lowtide.stop.client_state "
                'to a function that returns it, or "then" to "tell"',
                ", ".join(stop.client_keys),
            )
        return
    state = stop.client_state() if stop.client_state is not None else {}
    engine.save_checkpoint(stop.config.save_dir, client_state=state)


def checkpoint_methods(base: Any) -> dict[str, Any]:
    """Return the overridden saving and loading of the engine class `base`."""

    # Wrapped: Hugging Face's Trainer reads the signature to learn what it may pass.
    @functools.wraps(base.save_checkpoint)
    def save_checkpoint(
        self: Any, save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        session: Session = self.lowtide
        tag = f"global_step{self.global_steps}" if tag is None else tag
        state = {} if client_state is None else client_state
        folder, where = Path(save_dir) / str(tag), {"path": str(save_dir), "tag": str(tag)}
        session.fire(Event.BEFORE_SAVE, model=self.module, **where)
        if self.global_rank == 0:  # before the barrier behind which the first file is written
            forget_record(folder)
        with session.telemetry.span("save"):
            result = base.save_checkpoint(self, save_dir, tag, state, *args, **kwargs)
        self.__dict__[UNCERTIFIED] = (folder, self.global_steps, [*map(str, state)])
        is_decoupled = self.checkpoint_engine.is_decoupled()
        is_last = session.stop is not None and session.stop.requested
        if not is_decoupled or is_last:
            certify(self)
        session.fire(Event.AFTER_SAVE, model=self.module, **where)
        return result

    @functools.wraps(base.load_checkpoint)
    def load_checkpoint(
        self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        session: Session = self.lowtide
        is_universal = self.load_universal_checkpoint()  # has a marker file of its own
        if tag is None and session.stop is not None and not is_universal:
            choice = _newest_complete(self, session.stop, load_dir)
            if choice.tag is None and choice.skipped:
                return None, {}
            tag = choice.tag
        with session.telemetry.span("load"):
            result = base.load_checkpoint(self, load_dir, tag, *args, **kwargs)
        if result[0] is not None:
            session.step = self.global_steps
            session.telemetry.start_from(session.step)
            if session.stop is not None:
                session.stop.client_keys = _client_keys(Path(result[0]).parent, result[1])
            session.fire(Event.LOADED, model=self.module, path=str(load_dir), tag=tag)
        return result

    return {"save_checkpoint": save_checkpoint, "load_checkpoint": load_checkpoint}


# What DeepSpeed 0.19.8 itself puts beside the script's state, and hands out with it.
_OWN_KEYS = frozenset(
    (
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
        *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
        *("sparse_tensor_module_names", "skipped_steps", "global_steps", "global_samples"),
        *("dp_world_size", "mp_world_size", "ds_config", "ds_version", "universal_checkpoint_info"),
    )
)


def _client_keys(checkpoint: Path, loaded: Mapping[str, Any] | None) -> list[str]:
    record = read_record(checkpoint)
    if record is not None and "client_keys" in record:
        return [*record["client_keys"]]
    return [str(key) for key in loaded or {} if key not in _OWN_KEYS]


def _newest_complete(engine: Any, stop: StopControl, load_dir: Any) -> Choice:
    """Return rank 0's choice, the same on all ranks, and say what it skips."""
    world_size = engine.lowtide.world_size if engine.zero_optimization() else None
    choice: Choice = stop.share(lambda: choose(Path(load_dir), world_size=world_size))
    if engine.global_rank == 0:
        for line in choice.skipped:
            logger.warning("%s: %s", load_dir, line)
        if choice.tag is None and choice.skipped:
            logger.warning("%s: no checkpoint is complete, so training starts at step 0", load_dir)
    return choice


def certify(engine: Any) -> None:
    """Write the record of the newest checkpoint. Collective; all ranks have written their parts."""
    folder, step, client_keys = engine.__dict__.pop(UNCERTIFIED)
    session: Session = engine.lowtide
    # An ordinary engine has just passed DeepSpeed's closing barrier. A decoupled one writes on,
    # and this, with a barrier of its own, waits for it (nothing to do where step() did so before).
    if engine.checkpoint_engine.is_decoupled():
        engine._commit_decoupled_checkpoint()
    if engine.global_rank == 0:
        try:
            write_record(
                folder, step=step, world_size=session.world_size,
                config=session.config.as_dict(), client_keys=client_keys,
            )  # fmt: skip
        except OSError as error:
            logger.warning("%s: its completion record cannot be stored: %s", folder, error)
    if session.stop is not None:
        session.stop.client_keys = client_keys
        session.stop.saved(step, str(folder))
