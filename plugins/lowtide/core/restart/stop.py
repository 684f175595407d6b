"""`StopControl`: whether a run is to stop, agreed by all of its ranks."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowtide.core.config import StopConfig
from lowtide.core.restart.records import STOP_FILE, StopRecord, write_stop
from lowtide.core.restart.signals import hub

logger = logging.getLogger("lowtide")

RUN_DIR_VARIABLE = "LOWTIDE_RUN_DIR"  # set by the launcher for all ranks
ATTEMPT_VARIABLE = "LOWTIDE_ATTEMPT"
_LAST_WAIT_S = 5.0

# What travels through the reduction; the largest wins. Reasons that end sooner stand higher.
_REASONS = ("", "requested", "time_limit", "interrupted", "preempted")
_REASON_OF_SIGNAL = {
    "USR1": "time_limit",  # what Slurm is told to send some minutes before the limit
    "USR2": "requested",
    "INT": "interrupted",
    "TERM": "preempted",  # preemption, a node that goes down, and scancel all send it
}


class StopControl:
    """Whether this run is to stop, agreed by all ranks. ``session.stop`` when the key is set.

    Args:
        config: The ``stop`` block.
        rank: This process's rank.

    Attributes:
        requested: True once all ranks have agreed; the same on every rank after the same step.
        reason: Why, as in `StopRecord`.
        client_state: Called for the ``client_state`` of the last checkpoint when Lowtide saves it.
        client_keys: Names of the script's own state in its newest checkpoint.
        run_dir: Folder of ``stop.json``, or None. The launcher's comes first: it reads it there.
    """

    def __init__(self, config: StopConfig, *, rank: int = 0) -> None:
        self.config = config
        self.requested = False
        self.reason = ""
        self.client_state: Callable[[], dict[str, Any]] | None = None
        self.client_keys: list[str] = []
        run_dir = os.environ.get(RUN_DIR_VARIABLE) or config.run_dir
        self.run_dir = Path(run_dir) if run_dir else None
        self._rank = rank
        self._wish = 0
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None  # (work, value) of the reduction under way
        self._owner_pid = os.getpid()
        self._last_save: tuple[int, str] | None = None
        self._is_written = False
        self._step = 0

    def listen(self) -> None:
        """Install the signal handlers, and remove the ``stop.json`` of an earlier start.

        Outside the main thread handlers are impossible: then it only says so.
        """
        if self.run_dir is not None and self._rank == 0:
            with contextlib.suppress(OSError):  # else it would be taken for ours if this run dies
                (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        numbers = [getattr(signal, f"SIG{name}") for name in self.config.signals]
        if not hub.listen(numbers, self._heard):
            logger.warning(
                "lowtide.stop: signals can only be taken in the main thread, this is %s; "
                "stop.request() works all the same",
                threading.current_thread().name,
            )

    def connect(self) -> None:
        """Make the group through which the ranks agree. Collective; once torch.distributed is up.

        It is a group of its own, in host memory: nothing waits for a GPU, and no collective of the
        training can be overtaken.
        """
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._rank = dist.get_rank()
            self._group = dist.new_group(backend="gloo")

    def share(self, make: Callable[[], Any]) -> Any:
        """Return rank 0's ``make()`` on every rank. Collective after `connect`."""
        if self._group is None:
            return make()
        import torch.distributed as dist

        values = [make() if self._rank == 0 else None]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def request(self, reason: str = "requested") -> None:
        """Ask for a stop after the next step; one rank is enough. Safe in a signal handler."""
        # The first counts: after Ctrl-C torchrun sends SIGTERM too, at the time limit Slurm does.
        self._wish = self._wish or _REASONS.index(reason)

    def poll(self, step: int) -> bool:
        """Agree with the other ranks; every rank calls it after every optimizer step.

        The answer to the wishes of one call is read at the next one that is due, so that nobody
        waits for a message. Returns True once, at the step after which all ranks stop.
        """
        self._step = step
        if self.requested or step % self.config.every_n_steps != 0:
            return False
        agreed = self._wish if self._group is None else self._agreed()
        if agreed:
            self.requested, self.reason = True, _REASONS[agreed]
        return self.requested

    def _agreed(self) -> int:
        import torch
        import torch.distributed as dist

        agreed = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            agreed = int(value)
        if not agreed:
            value = torch.tensor([self._wish], dtype=torch.int32)
            maximum = dist.ReduceOp.MAX
            work = dist.all_reduce(value, op=maximum, group=self._group, async_op=True)
            self._pending = (work, value)
        return agreed

    def saved(self, step: int, checkpoint: str) -> None:
        """Note a checkpoint that all ranks have finished; the first after a stop ends the run."""
        self._last_save = (step, checkpoint)
        if self.requested:
            self._write(step, checkpoint)

    def finish(self, step: int) -> None:
        """Give the signals back; write ``stop.json`` if a stop was agreed and nothing was saved."""
        if os.getpid() != self._owner_pid:
            return
        if self.requested and not self._is_written:
            self._write(step, self._last_save[1] if self._last_save else None)
        hub.leave(self._heard)
        self.disconnect()

    def end(self) -> None:
        """`finish` for a run that ends without a word (interpreter exit)."""
        self.finish(self._step)

    def disconnect(self) -> None:
        """Give up the ranks' group; its threads must be gone when the interpreter ends."""
        group, self._group = self._group, None
        pending, self._pending = self._pending, None
        if group is None or os.getpid() != self._owner_pid:
            return
        import torch.distributed as dist

        # A rank that died cannot answer, and the group may have gone with all others.
        with contextlib.suppress(RuntimeError):
            if pending is not None:
                pending[0].wait(datetime.timedelta(seconds=_LAST_WAIT_S))
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(group)

    def _write(self, step: int, checkpoint: str | None) -> None:
        self._is_written = True
        if self._rank != 0 or self.run_dir is None:
            return
        record = StopRecord(
            attempt=os.environ.get(ATTEMPT_VARIABLE, ""),
            reason=self.reason,
            step=step,
            checkpoint=checkpoint,
            wants_restart=self.reason != "interrupted",
            time_s=time.time(),
        )
        try:
            write_stop(self.run_dir, record)
        except OSError as error:
            logger.error("%s cannot be written: %s", self.run_dir / STOP_FILE, error)

    def _heard(self, number: int) -> None:
        self.request(_REASON_OF_SIGNAL[signal.Signals(number).name.removeprefix("SIG")])
