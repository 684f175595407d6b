"""DeepSpeed host, second part: saving, loading, and ending a run that was asked to stop."""

from __future__ import annotations

import functools
import inspect
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


def end_step(engine: Any) -> None:
    """End the step, and the run too if all ranks have agreed to; every rank calls it."""
    session: Session = engine.lowtide
    is_last = session.end_step(model=engine.module, optimizer=engine.optimizer)
    if is_last and session.stop is not None and session.stop.config.then == "exit":
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
        client_keys = [*map(str, state)]
        moment = session.fire(
            Event.BEFORE_SAVE, model=self.module, optimizer=self.optimizer,
            **where, client_keys=client_keys, is_certified=True,
        )  # fmt: skip
        is_certified = moment.data["is_certified"]
        if is_certified and self.global_rank == 0:  # before the barrier before the first file
            forget_record(folder)
        with session.telemetry.span("save"):
            result = base.save_checkpoint(self, save_dir, tag, state, *args, **kwargs)
        if session.stop is not None:
            session.stop.client_keys = client_keys
        if is_certified:
            self.__dict__[UNCERTIFIED] = (folder, self.global_steps, client_keys)
            is_last = session.stop is not None and session.stop.requested
            if is_last or not self.checkpoint_engine.is_decoupled():
                certify(self)
        session.fire(Event.AFTER_SAVE, model=self.module, **where)
        return result

    @functools.wraps(base.load_checkpoint)
    def load_checkpoint(
        self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        session: Session = self.lowtide
        tag = None if tag is None else str(tag)  # as it is saved
        data: dict[str, Any] = {"path": str(load_dir), "tag": tag}
        if not self.load_universal_checkpoint():  # that has a marker file of its own
            given = inspect.signature(base.load_checkpoint).bind(
                self, load_dir, tag, *args, **kwargs
            )
            given.apply_defaults()
            options = {
                name: value for name, value in given.arguments.items() if name not in _OF_LOAD
            }
            moment = session.fire(
                Event.BEFORE_LOAD, model=self.module, optimizer=self.optimizer,
                **data, engine=self, options=options,
            )  # fmt: skip
            data = moment.data
            is_decided = data["tag"] is not None or "is_empty" in data
            if not is_decided and session.stop is not None:
                choice = _newest_complete(self, session.stop, load_dir)
                data |= {"tag": choice.tag, "is_empty": choice.tag is None and bool(choice.skipped)}
            if data.get("is_empty"):
                return None, {}
        load_dir, tag = data["path"], data["tag"]
        if "result" in data:
            result = data["result"]
        else:
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


_OF_LOAD = ("self", "load_dir", "tag")

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
        session.stop.saved(step, str(folder))
