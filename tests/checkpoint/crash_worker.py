"""One rank of a job that saves at every step, dies, and goes on; without DeepSpeed.

``python -m tests.checkpoint.crash_worker`` is a nursery: it reads one order (JSON) a line and forks
a rank for each. A start then takes moments and not the seconds in which torch is imported.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lowtide.checkpoint.saver as saver_module
from lowtide.checkpoint import drain
from lowtide.checkpoint.board import Board
from lowtide.checkpoint.config import CheckpointConfig
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Saving, Stage
from lowtide.checkpoint.store import folders
from lowtide.checkpoint.store.finding import Finder
from lowtide.core.errors import CheckpointError

CHUNK_BYTES = 64 * 1024
ELEMENTS = 60_000  # two tensors of 480 KB: a dozen chunks, twice as much as the buffer holds
KEEP = 2
IN_FLIGHT = 4  # checkpoints on their way at once
PEER_GONE = 3
LIFE_S = 120  # nobody outlives its test
MODEL = "mp_rank_00_model_states.pt"
_STEP = 1 << 32
_EVER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a rank is to do.

    Attributes:
        root: Holds the levels and the logs.
        log: Name of its log, one JSON object a line, synced.
        steps: How many to make; None until it is killed.
        levels: 1, or 2 for a fast and a slow folder.
        is_patient: Wait for every checkpoint before the next step.
        is_last_alone: Save the last step without waiting for the others any more.
        use_exchange: Let names be exchanged in one step.
        slow_bytes_per_s: Rate of this rank's writing to the first level.
        deaths: When to die: see `arm`.
        full_from, full_to: From the one to the other step rank 1 may write small files only.
        filler: In those steps rank 0 fills the disk with this file instead.
        commit_timeout_s: The setting of that name.
        close_s: How long the end may wait.
    """

    root: str
    log: str
    port: int
    rank: int = 0
    world_size: int = 2
    steps: int | None = None
    levels: int = 1
    is_patient: bool = False
    is_last_alone: bool = False
    use_exchange: bool = True
    slow_bytes_per_s: float | None = None
    deaths: list[dict[str, Any]] = field(default_factory=list)
    full_from: int | None = None
    full_to: int | None = None
    filler: str | None = None
    commit_timeout_s: float = 10.0
    close_s: float = 30.0

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def level_folders(root: Path, levels: int) -> list[Path]:
    """Return the folders of checkpoints, the fastest first."""
    return [root / name for name in ("fast", "slow")[:levels]]


def file_name(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def state_of(rank: int, step: int) -> dict[str, Any]:
    """Return a state each of whose numbers says which rank and step it is of."""
    base = torch.arange(ELEMENTS, dtype=torch.int64) * 64 + rank
    return {"weights": base + step * _STEP, "moments": base - step * _STEP, "where": [rank, step]}


def update(state: dict[str, Any]) -> None:
    """Make one step, in place, as an optimizer does."""
    state["weights"].add_(_STEP)
    state["moments"].sub_(_STEP)
    state["where"][1] += 1


def load_step(checkpoint: Path, rank: int) -> dict[str, Any]:
    """Load a rank's state; raise unless it is exactly that of one step and of this rank."""
    state: dict[str, Any] = torch.load(checkpoint / file_name(rank), weights_only=False)
    step = torch.load(checkpoint / MODEL, weights_only=False)["step"]
    expected = state_of(rank, step)
    if state["where"] != expected["where"]:
        raise AssertionError(f"{checkpoint}: {state['where']} is not {expected['where']}")
    for name in ("weights", "moments"):
        if not torch.equal(state[name], expected[name]):
            steps = sorted({int(n) for n in (state["weights"] // _STEP).unique()})
            raise AssertionError(f"{checkpoint}: {name} of step {step} has parts of {steps}")
    return state


def tag_of(step: int) -> str:
    """Every third checkpoint replaces another one of its name."""
    return "last" if step % 3 == 0 else f"step{step}"


# -- dying ----------------------------------------------------------------------------------------


def arm(
    at: str, *, when: str = "before", nth: int = 1, where: str = "", number: int = signal.SIGKILL
) -> None:
    """Die at the `nth` call of a function whose arguments contain the text `where`.

    Args:
        at: Its place, "module:name" or "module:Class.name"; patched where it is looked up.
        when: "before" or "after" it has done its work.
        nth: Which of those calls.
        where: The text.
        number: The signal; 0 only makes the calling thread hang.
    """
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for owner in owners:
        holder = getattr(holder, owner)
    stock = getattr(holder, name)
    lock = threading.Lock()
    calls = 0

    def armed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        is_one = where in f"{args} {options}"
        with lock:
            calls += is_one
            is_time = is_one and calls == nth
        if is_time and when == "before":
            die(number)
        result = stock(*args, **options)
        if is_time and when == "after":
            die(number)
        return result

    setattr(holder, name, armed)


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(LIFE_S)


# -- the job --------------------------------------------------------------------------------------


class Log:
    """What a rank has been promised; whatever is in it has really happened before."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def add(self, **facts: Any) -> None:
        os.write(self._descriptor, (json.dumps(facts) + "\n").encode())
        os.fsync(self._descriptor)


class Job:
    """The rank's side of a run."""

    def __init__(self, order: Order) -> None:
        self.order = order
        root = Path(order.root)
        self.folders = level_folders(root, order.levels)
        self.log = Log(root / "logs" / order.log)
        self.board = Board(rank=order.rank, world_size=order.world_size, store=_store(order))
        saver_module.CHUNK_BYTES = CHUNK_BYTES
        drain.CHUNK_BYTES = CHUNK_BYTES
        self.saver = Saver(self._config(), self.board, buffer_bytes=6 * CHUNK_BYTES)
        self._untold: list[tuple[Saving, int, set[str]]] = []

    def run(self) -> None:
        order, saver = self.order, self.saver
        state = self._load()
        self.meet("loaded")
        step = state["where"][1]
        last = None if order.steps is None else step + order.steps
        while step != last:
            saver.wait_captured()
            update(state)
            step += 1
            is_alone = order.is_last_alone and step == last
            if not is_alone:
                self.meet(f"step{step}")  # the gradients of a real run are added up here
            self._fill_disk(step)
            for _ in range(2 if step % 4 == 0 else 1):
                self._save(state, step)
                for stage in (Stage.COMMITTED, Stage.DRAINED):
                    if order.is_patient or is_alone:
                        saver.wait(stage, order.close_s)
                    self._tell()
        begin_s = time.monotonic()
        is_closed = saver.close(order.close_s)
        self._tell()
        self.log.add(closed=is_closed, close_s=time.monotonic() - begin_s)
        if not order.is_last_alone:
            self._leave()

    def meet(self, name: str) -> None:
        """Wait for the other ranks; end when they are gone, as the real thing does."""
        try:
            self._meet(self.board, f"meet/{name}")
        except CheckpointError:
            self.saver.close(self.order.close_s)  # as the plugin does at the end of a process
            sys.exit(PEER_GONE)

    def _meet(self, board: Board, name: str) -> None:
        if board.rank != 0:
            board.post(f"{name}/{board.rank}", True)
            board.share(name, bool, timeout_s=_EVER_S)
            return
        for rank in range(1, board.world_size):
            if board.wait(f"{name}/{rank}", timeout_s=_EVER_S) is None:
                raise CheckpointError(f"{name}: no word from rank {rank}")
        board.share(name, lambda: True)

    def _leave(self) -> None:
        """Let rank 0, which has the store, go last."""
        board = self.board
        if board.rank != 0:
            board.post(f"end/{board.rank}", True)
            return
        for rank in range(1, board.world_size):
            board.wait(f"end/{rank}", timeout_s=_EVER_S)

    def _config(self) -> CheckpointConfig:
        order = self.order
        tiers: list[dict[str, Any]] = [{"path": str(folder)} for folder in self.folders]
        tiers[0]["bytes_per_s"] = order.slow_bytes_per_s
        settings = {
            "tiers": tiers if order.levels > 1 or order.slow_bytes_per_s else [],
            "keep": KEEP,
            "commit_timeout_s": order.commit_timeout_s,
            "stall_timeout_s": order.commit_timeout_s,
        }
        return CheckpointConfig.model_validate_json(json.dumps(settings))

    def _load(self) -> dict[str, Any]:
        found = Finder(self.board, "full").find(self.folders, None, parts=self.order.world_size)
        if found.folder is None or found.name is None:
            state, name = state_of(self.board.rank, 0), None
        else:
            state = load_step(found.folder / found.name, self.board.rank)
            name = found.name
        self.log.add(loaded=state["where"][1], name=name, skipped=found.skipped)
        return state

    def _save(self, state: dict[str, Any], step: int) -> None:
        saver, rank = self.saver, self.board.rank
        while len(self._untold) >= IN_FLIGHT:  # steps are so short here that they would pile up
            self._untold[0][0].wait(Stage.DRAINED, _EVER_S)
            self._tell()
        details: dict[str, Any] = {"config": {}, "client_keys": []}
        saver.begin(self.folders[-1], tag_of(step), step=step, details=details)
        saver.add(state, file_name(rank), is_stable=lambda _tensor: True)
        if rank == 0:
            saver.add({"step": step}, MODEL, is_stable=lambda _tensor: True)
        self._untold.append((saver.end(), step, set()))

    def _tell(self) -> None:
        """Write down what has been promised since the last time."""
        for saving, step, told in self._untold:
            facts = {"tag": saving.tag, "attempt": saving.attempt}
            stages = {Stage.COMMITTED: ["committed"], Stage.DRAINED: ["committed", "drained"]}
            for stage in stages.get(saving.stage, []):
                if stage not in told and not (stage == "drained" and saving.superseded):
                    self.log.add(**{stage: step}, **facts)
                told.add(stage)
            if saving.has_ended and saving.error is not None:
                self.log.add(failed=step, error=str(saving.error), **facts)
        self._untold = [each for each in self._untold if not each[0].has_ended]

    def _fill_disk(self, step: int) -> None:
        order = self.order
        if order.full_from is None or step not in (order.full_from, order.full_to):
            return
        is_full = step == order.full_from
        if order.filler is None:
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            if self.board.rank == 1:  # the others hear of it
                limit = CHUNK_BYTES if is_full else most
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        elif self.board.rank == 0 and is_full:
            _fill(Path(order.filler))
        elif self.board.rank == 0:
            Path(order.filler).unlink()
        self.meet(f"disk{step}")


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size_bytes in (1 << 20, 1 << 16, 1 << 12):
            try:
                while file.write(b"x" * size_bytes) == size_bytes:
                    pass
            except OSError:
                continue


def _store(order: Order) -> Any:
    timeout = datetime.timedelta(seconds=_EVER_S)
    is_master = order.rank == 0
    store = dist.TCPStore(
        "127.0.0.1", order.port, is_master=is_master, wait_for_workers=False, timeout=timeout
    )
    return dist.PrefixStore("job", store)


def work(order: Order) -> None:
    """Be the rank that `order` describes."""
    signal.alarm(LIFE_S)
    if not order.use_exchange:
        folders._exchange = lambda _first, _second: False
    for death in order.deaths:
        arm(**death)
    Job(order).run()


# -- the nursery ----------------------------------------------------------------------------------


def serve() -> None:
    """Fork ranks and say how they ended, as asked on standard input."""
    answers: dict[str, Callable[[Any], Any]] = {"start": _start, "poll": _poll}
    for line in sys.stdin:
        ((verb, value),) = json.loads(line).items()
        answer = answers[verb](value)
        if verb == "start" and answer == 0:
            return  # this is the child, at the end of its life
        print(json.dumps(answer), flush=True)


def _start(value: Mapping[str, Any]) -> int:
    order = Order(**value["order"])
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the nursery
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(value["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    work(order)
    if not order.is_last_alone:
        os._exit(0)  # an interpreter with torch takes half a second to end
    return 0


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    serve()
