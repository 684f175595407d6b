"""Glue between the lifecycle of a run and the saver."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowtide.checkpoint.adapters.base import Adapter
from lowtide.checkpoint.board import open_board
from lowtide.checkpoint.compact.expanding import Expander
from lowtide.checkpoint.config import CheckpointConfig
from lowtide.checkpoint.files.image import load_file
from lowtide.checkpoint.interval import Interval
from lowtide.checkpoint.ledger import Ledger, end_of_process
from lowtide.checkpoint.routing import PATIENT_S
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Stage
from lowtide.checkpoint.scrub import Scrub
from lowtide.checkpoint.sizing import choose_buffers
from lowtide.checkpoint.stable import StableMemory
from lowtide.checkpoint.staging import Stager
from lowtide.checkpoint.store.finding import Finder
from lowtide.checkpoint.store.folders import check_tag
from lowtide.checkpoint.writer.base import facts_text
from lowtide.core.device.homes import Homes
from lowtide.core.errors import CheckpointError
from lowtide.core.lifecycle import Event, Moment, Plugin, Session

logger = logging.getLogger("lowtide")

_FIRST = -100  # before plugins that begin to change the state


class CheckpointPlugin(Plugin):
    """Lazy, asynchronous, multi-level checkpoints. ``engine.lowtide.checkpoint`` for scripts.

    Attributes:
        client_state: Called for the ``client_state`` of the checkpoints that Lowtide saves by
            itself (``"every_n_steps"``).
        last_error: Why the newest failure failed, or None.
    """

    name = "checkpoint"
    Config = CheckpointConfig
    config: CheckpointConfig

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__(config)
        self.client_state: Callable[[], dict[str, Any]] = dict
        self._session: Session | None = None
        self._saver: Saver | None = None
        self._finder: Finder | None = None
        self._adapter: Adapter | None = None
        self._model: Any = None
        self._optimizer: Any = None
        self._save_latest = True
        self._stable = StableMemory()
        self._raises = 0
        self._interval: Interval | None = None
        self._ledger: Ledger | None = None
        self._scrub: Scrub | None = None
        self._expander: Expander | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._step_begin_s: float | None = None

    # -- for scripts ------------------------------------------------------------------------

    def wait(self, level: str = "committed", timeout_s: float | None = None) -> bool:
        """Wait until every checkpoint has come to `level`, or has failed.

        Args:
            level: "captured" (the model may change), "durable" (this rank's files are synced),
                "committed" (all ranks' are, and it is complete on its first level) or "drained"
                (on all its levels).
            timeout_s: How long to wait at most; None is as long as it takes.

        Returns:
            Whether the newest one has come that far.

        Raises:
            CheckpointError: no such level; or, with ``"on_error": "raise"``, one has failed.
        """
        levels = [stage.value for stage in Stage if stage is not Stage.FAILED]
        if level not in levels:
            raise CheckpointError(f'level "{level}": unknown, allowed are {", ".join(levels)}')
        is_there = self._the_saver().wait(Stage(level), timeout_s)
        self._the_ledger().settle()
        if self.config.on_error == "raise":
            self._raise(self._the_ledger().unraised)
        return is_there

    def status(self) -> list[dict[str, Any]]:
        """Return what is known about the checkpoints of this run, oldest first, as plain JSON."""
        return [] if self._saver is None else [s.describe() for s in self._saver.history]

    @property
    def last_error(self) -> CheckpointError | None:
        """Why the newest failure failed, or None."""
        return None if self._saver is None else self._saver.last_error

    def save(
        self, folder: str | os.PathLike[str], files: Mapping[str, Any], *, tag: str | None = None
    ) -> None:
        """Save states of your own as one checkpoint; for loops without DeepSpeed. Collective.

        Args:
            folder: The folder that holds checkpoints.
            files: This rank's states, by file name; names must differ between ranks.
            tag: Its name; ``step<N>`` by default.
        """
        saver, session = self._the_saver(), self._the_session()
        tag = f"step{session.step}" if tag is None else tag
        self._begin(Path(folder), tag, [])
        for name, state in files.items():
            saver.add(state, name, is_stable=self._stable.covers)
        self._end()

    # -- for adapters -----------------------------------------------------------------------

    def add(self, state: Any, path: Path) -> bool:
        """Add a file to the checkpoint that has begun; False when it is not one of its files."""
        saver = self._the_saver()
        saving = saver.current
        if saving is None or not path.is_relative_to(self._asked):
            return False
        saver.add(state, path.relative_to(self._asked).as_posix(), is_stable=self._stable.covers)
        return True

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint has begun."""
        return self._saver is not None and self._saver.current is not None

    def errand(self, place: Path, work: Callable[[], object], *, most_s: float = math.inf) -> None:
        """Do work beside the checkpoint that has begun; see `Errands.run`."""
        timeout_s = min(most_s, self.config.max_wait_s)
        self._the_saver().errands.run(place, work, timeout_s=timeout_s)

    def is_inside(self, path: Path) -> bool:
        """Tell whether `path` belongs to the checkpoint that has begun."""
        return self.is_saving and path.is_relative_to(self._asked)

    def save_file(self, state: Any, path: Path) -> None:
        """Write one file that belongs to no checkpoint; it is there on return."""
        self._the_saver().save_file(state, path)

    def load_file(self, path: Path, map_location: Any) -> Any:
        """Load a file; from memory where its bytes have been checked there."""
        return load_file(path, self._finder.take(path) if self._finder else None, map_location)

    def forget_read(self) -> None:
        """Let go of what was read to be loaded and will not be."""
        if self._finder is not None:
            self._finder.forget()

    def set_save_latest(self, is_wanted: bool) -> None:
        """Say whether the checkpoint that has begun moves ``latest``."""
        self._save_latest = is_wanted

    def never_lazy(self, why: str) -> None:
        """Copy everything at once from now on, because something else changes it too."""
        self._stable.is_trusted = False
        if self._the_session().rank == 0:
            logger.warning("checkpoint: nothing is copied lazily, because %s", why)

    def release(self) -> None:
        """Copy what is still to be copied, because the state is about to change."""
        if self._saver is not None:
            self._saver.wait_captured()

    # -- lifecycle ----------------------------------------------------------------------------

    def attach(self, session: Session) -> None:
        """Subscribe; nothing is allocated before the optimizer exists."""
        self._session = session
        if session.host == "deepspeed":
            from lowtide.checkpoint.adapters.deepspeed import DeepSpeedAdapter

            self._adapter = DeepSpeedAdapter(self, session.state)
        listeners = {
            Event.MODEL_BUILT: self._before_engine,
            Event.OPTIMIZER_BUILT: self._after_engine,
            Event.BEFORE_UPDATE: self._before_update,
            Event.AFTER_UPDATE: self._after_update,
            Event.AFTER_STEP: self._after_step,
            Event.BEFORE_SAVE: self._before_save,
            Event.AFTER_SAVE: self._after_save,
            Event.BEFORE_LOAD: self._before_load,
            Event.LOADED: self._loaded,
            Event.CLOSED: self._closed,
        }
        for event, listener in listeners.items():
            session.hooks.on(event, listener, plugin=self.name, order=_FIRST)

    def detach(self) -> None:
        """End all threads and give the host its own functions back."""
        adapter, self._adapter = self._adapter, None
        if adapter is not None:
            adapter.close()
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._scrub is not None:
            self._scrub.close()
        if self._saver is not None:
            self._saver.close(timeout_s=1.0)

    def summary(self) -> dict[str, Any]:
        """Return counts, bytes, the time that training waited, and how files are written."""
        if self._saver is None or self._ledger is None:
            return {}
        summary = {**self._ledger.summary(), "writer": self._saver.writer.facts()}
        if intervals_s := self._saver.router.intervals_s():
            summary["level_intervals_s"] = intervals_s
        if self._scrub is not None:
            summary |= {"scrubbed": self._scrub.checked, "damaged": dict(self._scrub.damaged)}
        if self.last_error is not None:
            summary["last_error"] = str(self.last_error)
        return summary

    def _before_engine(self, _moment: Moment) -> None:
        if self._adapter is not None:
            self._adapter.before_engine()

    def _after_engine(self, moment: Moment) -> None:
        session = self._the_session()
        self._model, self._optimizer = moment.model, moment.optimizer
        if self._adapter is not None:
            self._adapter.after_engine(moment.data.get("engine"))
        self._stable.look_at(self._model, self._optimizer)
        board = open_board()
        sizes = choose_buffers(self.config, self._stable.expected_bytes(), session.config.decide)
        stager = Stager(Homes(telemetry=session.telemetry), pinned_bytes=sizes.pinned_bytes)
        self._saver = Saver(self.config, board, buffer_bytes=sizes.host_bytes, stager=stager)
        self._saver.claims.warn(self._saver.router.levels)
        session.state.add_reader(self._saver.pending)
        wanted = None if self._adapter is None else self._adapter.wanted
        self._finder = Finder(board, self.config.verify, self._saver.peers, wanted)
        self._interval = self._saver.router.interval()
        self._ledger = Ledger(session.telemetry, session.stop)
        if self.config.scrub_every_s is not None:
            self._scrub = Scrub(
                self._saver.used_folders, every_s=self.config.scrub_every_s,
                rank=board.rank, world_size=board.world_size,
            )  # fmt: skip
        # For a script that just ends. Made after the session's own, so it runs before that.
        self._finalizer = weakref.finalize(
            *(self, end_of_process, self._saver, self._ledger, self._scrub),
            self.config.close_timeout_s,
        )
        if session.rank == 0:
            logger.info("checkpoint: %s", facts_text(self._saver.writer.facts()))

    def _before_save(self, moment: Moment) -> None:
        tag = moment.data["tag"]
        if self._adapter is None or tag is None:  # the host, or its script, writes by itself
            return
        moment.data["is_certified"] = False
        self._begin(Path(moment.data["path"]), tag, moment.data.get("client_keys", []))

    def _begin(self, folder: Path, tag: str, client_keys: list[str]) -> None:
        check_tag(tag)
        session = self._the_session()
        self._save_begin_s = time.perf_counter()
        self._asked = folder / tag
        if self.config.on_error == "raise":
            self._raise_on_all()
        if session.state.keys():  # somebody may hold a newer copy elsewhere
            session.state.ensure_host()
        self._stable.look_at(self._model, self._optimizer)
        details = {"config": session.config.as_dict(), "client_keys": client_keys}
        self._the_saver().begin(folder, tag, step=session.step, details=details)

    def _after_save(self, _moment: Moment) -> None:
        if self._adapter is not None and self._the_saver().current is not None:
            self._end()

    def _end(self) -> None:
        saver, session = self._the_saver(), self._the_session()
        saving = saver.end(save_latest=self._save_latest)
        self._save_latest = True
        took_s = time.perf_counter() - self._save_begin_s
        saving.blocked_s += took_s
        if self._step_begin_s is not None:
            self._step_begin_s += took_s  # it counts as blocked, not as a longer step
        ledger = self._the_ledger()
        ledger.open(saving)
        if session.stop is not None and session.stop.requested:
            # The run is about to end, and perhaps to be killed.
            saver.wait(Stage.COMMITTED, self.config.commit_timeout_s)
            ledger.settle()

    def _before_update(self, _moment: Moment) -> None:
        ledger = self._the_ledger()
        if not ledger.is_waiting:
            return
        saver, session = self._the_saver(), self._the_session()
        begin_s = time.perf_counter()
        if saver.pending.is_reading and saver.pending.begin_update(session.state.promised()) > 0.0:
            session.telemetry.add_span("capture wait", "host", begin_s, time.perf_counter())
        ledger.settle()

    def _after_update(self, moment: Moment) -> None:
        self._the_saver().pending.end_update(is_applied=moment.data["applied"])

    def _after_step(self, moment: Moment) -> None:
        if self._the_ledger().is_waiting:
            self._the_ledger().settle()
        interval, now_s = self._interval, time.perf_counter()
        if self._step_begin_s is not None:
            self._the_saver().router.costs.add_step(now_s - self._step_begin_s)
        self._step_begin_s = now_s
        if interval is not None and interval.is_due(moment.step):
            folder, state = Path(self.config.tiers[-1].path), self.client_state()
            if self._adapter is not None:
                self._adapter.save(folder, state)
            else:
                self.save(folder, {f"rank{self._the_session().rank}.pt": self._own_state(state)})
            self._step_begin_s = time.perf_counter()
            costs = [s.blocked_s for s in self._the_saver().history if s.has_ended]
            interval.plan_next(moment.step, costs)

    def _own_state(self, client_state: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._the_session().step,
            "extra": client_state,
        }

    def _before_load(self, moment: Moment) -> None:
        saver, finder, session = self._the_saver(), self._finder, self._the_session()
        if finder is None or self._adapter is None:
            return
        saver.wait(Stage.COMMITTED)  # one of them may be what is to be loaded
        self._the_ledger().settle()
        asked = Path(moment.data["path"]).absolute()
        folders = saver.router.places(asked)
        parts = self._adapter.parts()
        with session.telemetry.span("verify"):
            found = finder.find(folders, moment.data["tag"], parts=parts)
        if session.rank == 0:
            for line in found.skipped:
                logger.warning("%s", line)
        if found.folder is None or found.name is None:
            if session.rank == 0:
                what = "whole" if found.skipped else "there"
                logger.warning("%s: no checkpoint is %s, so nothing is loaded", asked, what)
            moment.data["is_empty"] = moment.data["tag"] is None
            return
        checkpoint = self._the_expander().expanded(found.folder / found.name)
        moment.data["path"], moment.data["tag"] = str(checkpoint.parent), checkpoint.name
        result = self._adapter.load(checkpoint, moment.data.get("options", {}))
        if result is not None:
            moment.data["result"] = result

    def _loaded(self, _moment: Moment) -> None:
        self.forget_read()
        if self._expander is not None:
            self._expander.forget()

    def _the_expander(self) -> Expander:
        self._expander = self._expander or Expander(self._the_saver().board)
        return self._expander

    def _closed(self, _moment: Moment) -> None:
        if self._saver is None:
            return
        if self._saver.is_busy() and self._the_session().rank == 0:
            logger.info("checkpoint: finishing what is on its way")
        self._saver.close(self.config.close_timeout_s)
        self._the_ledger().settle()

    def _raise_on_all(self) -> None:
        """Raise on every rank what rank 0 knows has failed; called where all ranks come by."""
        ledger = self._the_ledger()
        ledger.settle()
        self._raises += 1
        known = ledger.unraised
        failures = self._the_saver().board.share(
            f"raise/{self._raises}", lambda: known, timeout_s=PATIENT_S
        )
        self._raise(failures)

    def _raise(self, failures: Mapping[str, str]) -> None:
        """Raise what has failed, given as the reasons by attempt; once on each rank."""
        if failures:
            self._the_ledger().take_unraised(failures)
            raise CheckpointError("\n".join(failures.values()))

    def _the_ledger(self) -> Ledger:
        if self._ledger is None:
            raise CheckpointError("checkpoint: there is no engine yet")
        return self._ledger

    def _the_saver(self) -> Saver:
        if self._saver is None:
            raise CheckpointError(
                "checkpoint: there is no engine yet, or it is closed; save between "
                "lowtide.initialize and engine.destroy"
            )
        return self._saver

    def _the_session(self) -> Session:
        if self._session is None:
            raise CheckpointError("checkpoint: the plugin is not attached to a run")
        return self._session
