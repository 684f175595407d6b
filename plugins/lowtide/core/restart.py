"""Stop on request, all ranks at one step; find where to go on.

*Stop.* A signal (time limit, preemption, Ctrl-C) sets a flag and nothing more. Once per optimizer
step the flag is max-reduced over all ranks, so one signal on one rank stops every rank after the
same step. The newest state is saved, and then, last of all, rank 0 writes ``stop.json`` into the
run folder: whoever started the job decides by that file whether to start it again, never by an
exit code, which launchers replace by their own.

*Go on.* Beside every checkpoint that a host with a session writes stands a record, written after
all ranks have written their parts. `choose` returns the newest checkpoint whose record and files
agree. DeepSpeed's own ``latest`` is written by rank 0 when its own part is on disk; after a kill
it may name a checkpoint that other ranks never finished.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lowtide
from lowtide.core.config import StopConfig
from lowtide.core.errors import CheckpointError

logger = logging.getLogger("lowtide")

STOP_FILE = "stop.json"
RECORD_FILE = "lowtide.json"
RUN_DIR_VARIABLE = "LOWTIDE_RUN_DIR"  # set by the launcher for all ranks
ATTEMPT_VARIABLE = "LOWTIDE_ATTEMPT"
FORMAT = 1
_LAST_WAIT_S = 5.0

# What travels through the reduction; the largest wins. Reasons that end sooner stand higher.
_REASONS = ("", "requested", "time_limit", "interrupted", "preempted")
_REASON_OF_SIGNAL = {
    "USR1": "time_limit",  # what Slurm is told to send some minutes before the limit
    "USR2": "requested",
    "INT": "interrupted",
    "TERM": "preempted",  # preemption, a node that goes down, and scancel all send it
}


@dataclass(frozen=True, kw_only=True)
class StopRecord:
    """What ``stop.json`` holds.

    Attributes:
        attempt: Which start of the job wrote it (``$LOWTIDE_ATTEMPT``), empty outside a launcher.
        reason: "time_limit", "preempted", "interrupted" (Ctrl-C) or "requested".
        step: Optimizer steps finished.
        checkpoint: Path of the checkpoint folder to go on from, or None when none was saved.
        wants_restart: Whether the job is to be started again.
        time_s: Unix time.
    """

    attempt: str
    reason: str
    step: int
    checkpoint: str | None
    wants_restart: bool
    time_s: float


def write_stop(run_dir: Path, record: StopRecord) -> None:
    """Write ``stop.json`` so that a reader finds all of it or nothing."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_durable(run_dir / STOP_FILE, {"format": FORMAT, **asdict(record)})


def read_stop(run_dir: Path) -> StopRecord | None:
    """Return what ``stop.json`` in `run_dir` holds, or None when there is none.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    path = run_dir / STOP_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return StopRecord(**{name: found[name] for name in StopRecord.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); remove it to go on"
        ) from error


def write_durable(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the JSON file `path` atomically, synced to disk with its folder."""
    scratch = path.with_name(f"{path.name}.part")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class StopControl:
    """Whether this run is to stop, agreed by all ranks. ``session.stop`` when the key is set.

    Args:
        config: The ``stop`` block.
        rank: This process's rank.

    Attributes:
        requested: True once all ranks have agreed; the same on every rank after the same step.
        reason: Why, as in `StopRecord`.
        client_state: Called for the ``client_state`` of the last checkpoint when Lowtide saves it.
        save_dir: Where the run last saved or loaded a checkpoint.
        run_dir: Folder of ``stop.json``, or None.
    """

    def __init__(self, config: StopConfig, *, rank: int = 0) -> None:
        self.config = config
        self.requested = False
        self.reason = ""
        self.client_state: Callable[[], dict[str, Any]] | None = None
        self.save_dir = config.save_dir
        run_dir = config.run_dir or os.environ.get(RUN_DIR_VARIABLE)
        self.run_dir = Path(run_dir) if run_dir else None
        self._rank = rank
        self._wish = 0
        self._interrupts = 0
        self._group: Any = None
        self._pending: tuple[Any, Any] | None = None  # (work, value) of the reduction under way
        self._previous: dict[int, Any] = {}
        self._owner_pid = os.getpid()
        self._last_save: tuple[int, str] | None = None
        self._is_written = False

    def listen(self) -> None:
        """Install the signal handlers, and remove the ``stop.json`` of an earlier start.

        Outside the main thread handlers are impossible: then it only says so.
        """
        if self.run_dir is not None and self._rank == 0:
            with contextlib.suppress(OSError):  # else it would be taken for ours if this run dies
                (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "lowtide.stop: signals can only be taken in the main thread, this is %s; "
                "stop.request() works all the same",
                threading.current_thread().name,
            )
            return
        for name in self.config.signals:
            number = getattr(signal, f"SIG{name}")
            self._previous[number] = signal.signal(number, self._handle)

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
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous.clear()
        self.disconnect()

    def disconnect(self) -> None:
        """Give up the ranks' group; its threads must be gone when the interpreter ends."""
        group, self._group = self._group, None
        pending, self._pending = self._pending, None
        if group is None or os.getpid() != self._owner_pid:
            return
        import torch.distributed as dist

        # A rank that died cannot answer, and the group may have gone with all others.
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            if pending is not None:
                pending[0].wait(datetime.timedelta(seconds=_LAST_WAIT_S))
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if os.getpid() != self._owner_pid:  # a forked data loader: its own fate, as without us
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1 and callable(previous):
                previous(number, frame)  # the second Ctrl-C means now
        self.request(_REASON_OF_SIGNAL[signal.Signals(number).name.removeprefix("SIG")])


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where to go on.

    Attributes:
        tag: Name of the checkpoint folder, or None to start from the beginning.
        step: Optimizer steps in it; 0 without one.
        skipped: One line about each newer checkpoint that cannot be used.
    """

    tag: str | None = None
    step: int = 0
    skipped: list[str] = field(default_factory=list)


def write_record(
    checkpoint: Path, *, step: int, world_size: int, config: Mapping[str, Any]
) -> None:
    """Certify that every rank has written its part of `checkpoint`. Called by rank 0 after that.

    Args:
        checkpoint: The checkpoint's folder.
        step: Optimizer steps in it.
        world_size: Number of ranks that wrote it.
        config: The resolved block, stored with it: what every ``"auto"`` was in this run.

    Raises:
        OSError: it cannot be written.
    """
    files = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name.removesuffix(".part") != RECORD_FILE
    }
    record = {"format": FORMAT, "lowtide": lowtide.__version__, "step": step}
    record |= {"world_size": world_size, "time_s": time.time(), "files": files, "config": config}
    write_durable(checkpoint / RECORD_FILE, record)


def choose(folder: Path, *, world_size: int | None = None) -> Choice:
    """Find the newest checkpoint in `folder` that is complete.

    A checkpoint without a record (stock DeepSpeed wrote it, or a killed run began it) counts when
    every part of it can be read from end to end and, if `world_size` is given, each rank has one.

    Args:
        folder: What ``save_checkpoint`` was given.
        world_size: Number of ranks that are going to load it, where each has a part of its own
            (ZeRO); None accepts any.
    """
    skipped: list[str] = []
    for step, path in _candidates(folder):
        damage = find_damage(path, world_size=world_size)
        if damage is None:
            return Choice(tag=path.name, step=step, skipped=skipped)
        skipped.append(f"checkpoint {path.name} is not used: {damage}")
    return Choice(skipped=skipped)


def find_damage(checkpoint: Path, *, world_size: int | None = None) -> str | None:
    """Say why a checkpoint cannot be loaded, or None when it can."""
    record = _record(checkpoint)
    if record is None:
        return _find_damage_unrecorded(checkpoint, world_size)
    if world_size is not None and record["world_size"] != world_size:
        return f"{record['world_size']} ranks wrote it, {world_size} are to load it"
    for name, size in record["files"].items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{name} is no longer a torch file"
    return None


def _find_damage_unrecorded(checkpoint: Path, world_size: int | None) -> str | None:
    optimizer_parts = list(checkpoint.glob("*optim_states.pt"))
    model_parts = list(checkpoint.glob("*model_states.pt"))
    if not model_parts:
        return "it has no completion record and no model part"
    if world_size is not None and len(optimizer_parts) != world_size:
        return f"{len(optimizer_parts)} of {world_size} optimizer parts are there"
    for part in sorted(optimizer_parts + model_parts):
        try:
            with zipfile.ZipFile(part) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            return f"{part.name} cannot be read ({error})"
        if broken is not None:
            return f"{part.name} has a wrong checksum"
    return None


def _candidates(folder: Path) -> Iterator[tuple[int, Path]]:
    found: list[tuple[int, float, Path]] = []
    if folder.is_dir():
        for path in folder.iterdir():
            record = _record(path)
            digits = re.search(r"(\d+)$", path.name)
            if record is not None:
                found.append((int(record["step"]), float(record["time_s"]), path))
            elif digits and any(path.glob("*_states.pt")):
                found.append((int(digits[1]), path.stat().st_mtime, path))
    for step, _, path in sorted(found, reverse=True):
        yield step, path


def _record(checkpoint: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((checkpoint / RECORD_FILE).read_text(encoding="utf-8"))
        is_whole = isinstance(record["files"], dict) and isinstance(record["step"], int)
        return record if is_whole and "world_size" in record and "time_s" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
