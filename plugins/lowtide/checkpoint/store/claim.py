"""Who saves in a folder of checkpoints: a small file there, renewed as long as the job lives.

Locks of the kernel are not known everywhere on network file systems, and outlive nobody else's
death there in a known time. So a claim is a file that is linked into place whole, which every file
system with hard links does for one of two at once, and its time is renewed every few seconds. A
claim that is silent is nobody's, and neither is one whose process has ended on this machine, or
whose Slurm job has been started again. Whoever was thought dead and was not finds another's claim
in place of its own before it gives the next checkpoint its name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lowtide.checkpoint.store.processes import is_running, start_ticks

CLAIM_FILE = ".lowtide.claim"
BEAT_S = 10.0  # between two renewals
SILENT_S = 60.0  # not renewed for so long, by the file system's own clock: dead
WATCH_S = 35.0  # else, not renewed while it was watched for so long: dead
_LOOK_S = 1.0
_TRIES, _TRY_S = 200, 0.02
_LOCK = f"{CLAIM_FILE}.lock"  # held for a moment by who replaces the claim of one who is dead
_OLD_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a claim; what is not known is empty.

    Attributes:
        id: Of the claim.
        run: Of the run: all ranks of one have the same.
        host: Name of the machine.
        boot: Which start of which machine it is.
        namespace: In which numbers of processes are given.
        pid: The process.
        started_ticks: When that was started, in clock ticks since `boot`.
        job: Number of the Slurm job.
        restart: Which start of the job.
        time_s: Unix time of the claim.
    """

    id: str = ""
    run: str = ""
    host: str = ""
    boot: str = ""
    namespace: str = ""
    pid: int = 0
    started_ticks: int | None = None
    job: str = ""
    restart: str = ""
    time_s: float = 0.0

    @classmethod
    def of_this_process(cls, run: str) -> Holder:
        """Return this process as the holder of a new claim."""
        boot, namespace = "", ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(
            id=secrets.token_hex(8),
            run=run,
            host=socket.gethostname(),
            boot=boot,
            namespace=namespace,
            pid=os.getpid(),
            started_ticks=start_ticks(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
            time_s=time.time(),
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Return who holds the claim `path`, or None where there is none.

        Raises:
            OSError: it cannot be read.
        """
        try:
            found = json.loads(path.read_bytes())
            known = {name: found[name] for name in cls.__dataclass_fields__}
            kinds = {name: type(getattr(cls, name)) for name in known if name != "started_ticks"}
            is_whole = all(isinstance(known[name], kind) for name, kind in kinds.items())
            ticks = known["started_ticks"]
            return cls(**known) if is_whole and (ticks is None or type(ticks) is int) else cls()
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return cls()  # it is being written, or damaged: its time says whether it counts

    def is_alive(self) -> bool | None:
        """Tell whether its process is, or None where that cannot be known from here."""
        own = Holder.of_this_process("")
        if self.job and self.job == own.job and self.restart != own.restart:
            return False  # Slurm starts a job again when the start before is over
        place = (self.host, self.boot, self.namespace)
        if "" in place or place != (own.host, own.boot, own.namespace):
            return None
        ticks = start_ticks(self.pid)
        is_other = None not in (ticks, self.started_ticks) and ticks != self.started_ticks
        return not is_other and is_running(self.pid, since_s=math.inf)

    def __str__(self) -> str:
        if not self.id:
            return "unknown"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time_s))
        job = f", Slurm job {self.job}" if self.job else ""
        return f"host {self.host}, process {self.pid}{job}, since {since}"


def occupy(path: Path, own: Holder, *, dead: Holder | None = None) -> Holder | None:
    """Put `own` claim at `path`, unless another's is there that may be alive.

    Args:
        path: The claim's file, in a folder that is there.
        own: Who wants it.
        dead: One who was found dead by being watched.

    Returns:
        Who has it, or None: it is `own`.

    Raises:
        OSError: it cannot be read or written.
    """
    scratch = path.with_name(f"{CLAIM_FILE}.{secrets.token_hex(4)}")
    try:
        scratch.write_text(json.dumps(asdict(own)), encoding="utf-8")
        now_s = scratch.stat().st_mtime
        for _ in range(_TRIES):
            if _give_name(scratch, path):
                return None
            other = Holder.read(path)
            if other is None:
                continue
            if other.id == own.id or other.run == own.run:  # a lost answer; or two of one run
                return None
            if other != dead and _may_live(path, other, now_s):
                return other
            if _replace(scratch, path, other, now_s):
                return None
            time.sleep(_TRY_S)
        raise OSError(errno.EBUSY, "is claimed by many at once", str(path))
    finally:
        scratch.unlink(missing_ok=True)


def watch(path: Path, other: Holder) -> bool:
    """Watch another's claim; tell whether it is renewed, or somebody else's now, in `WATCH_S`.

    Raises:
        OSError: it cannot be read.
    """
    end_s = time.monotonic() + WATCH_S
    first_ns = _time_ns(path)
    while time.monotonic() < end_s:
        time.sleep(_LOOK_S)
        holder = Holder.read(path)
        if holder is None:
            return False
        if holder != other or _time_ns(path) != first_ns:
            return True
    return False


def find_other(path: Path) -> Holder | None:
    """Return who seems to hold `path` now, by a quick look; this process does not count."""
    with contextlib.suppress(OSError):
        holder = Holder.read(path)
        if holder is not None and _may_live(path, holder, time.time()):
            is_own = bool(holder.is_alive()) and holder.pid == os.getpid()
            return None if is_own else holder
    return None


def remove_old_scratch(folder: Path) -> None:
    """Remove what was left by processes that were killed while they claimed `folder`."""
    for path in folder.glob(f"{CLAIM_FILE}.*"):
        with contextlib.suppress(OSError):
            if _is_left(path, time.time(), old_s=_OLD_S):
                path.unlink()


class Claim:
    """A claim of this process. It is renewed by a thread of its own until it is released."""

    def __init__(self, path: Path, own: Holder) -> None:
        self.path = path
        self._own = own
        self._is_over = threading.Event()
        name = "lowtide-checkpoint-claim"
        self._thread = threading.Thread(target=self._renew, name=name, daemon=True)
        self._thread.start()

    def check(self) -> Holder | None:
        """Return who has taken it over, or None: it is this process's, if need be again.

        Raises:
            OSError: that cannot be known.
        """
        holder = Holder.read(self.path)
        if holder is not None and self._is_own(holder):
            return None
        return occupy(self.path, self._own)

    def release(self) -> None:
        """Give it up, and remove its file."""
        self._is_over.set()
        with contextlib.suppress(OSError):
            holder = Holder.read(self.path)
            if holder is not None and holder.id == self._own.id:
                self.path.unlink(missing_ok=True)

    def _is_own(self, holder: Holder) -> bool:
        return holder.id == self._own.id or holder.run == self._own.run

    def _renew(self) -> None:
        while not self._is_over.wait(BEAT_S):
            # By name and without making a file: the script may be removing the folder just now.
            with contextlib.suppress(OSError):
                holder = Holder.read(self.path)
                if holder is not None and holder.id == self._own.id:
                    os.utime(self.path)


class Shared:
    """The claims of this process: several engines in one are one job."""

    def __init__(self) -> None:
        self._claims: dict[tuple[int, str], tuple[Claim, list[object]]] = {}
        self._lock = threading.Lock()  # of the two tables, never held while files are touched
        self._folder_locks: dict[tuple[int, str], threading.Lock] = {}

    def take(
        self, folder: Path, own: Holder, user: object, *, dead: Holder | None = None
    ) -> tuple[Holder | None, Claim | None]:
        """Claim `folder` for `user`; return the other one who has it, or the claim.

        Raises:
            OSError: the claim's file cannot be read or written.
        """
        key = (os.getpid(), os.path.realpath(folder))  # a fork is a process of its own
        with self._folder(key):
            claim, users = self._claims.get(key, (None, []))
            if claim is None:
                other = occupy(folder / CLAIM_FILE, own, dead=dead)
                claim = None if other is not None else Claim(folder / CLAIM_FILE, own)
            else:
                other = claim.check()
            if other is not None or claim is None:
                return other, None
            self._claims[key] = (claim, [*users, user])
            return None, claim

    def give_back(self, claim: Claim, user: object) -> None:
        """Note that `user` needs it no more; without users it is released."""
        with self._lock:
            found = [key for key, (each, _) in self._claims.items() if each is claim]
        for key in found:
            with self._folder(key):
                each, users = self._claims.get(key, (None, []))
                left = [one for one in users if one is not user]
                if each is not claim:
                    continue
                self._claims[key] = (claim, left)
                if not left:
                    del self._claims[key]
                    claim.release()

    def _folder(self, key: tuple[int, str]) -> threading.Lock:
        """Return the lock of one folder: another one that hangs must not hold this one up."""
        with self._lock:
            return self._folder_locks.setdefault(key, threading.Lock())


shared = Shared()


def _may_live(path: Path, holder: Holder, now_s: float) -> bool:
    is_alive = holder.is_alive()
    if is_alive is None:
        with contextlib.suppress(FileNotFoundError):
            return now_s - _time_ns(path) / 1e9 <= SILENT_S
    return bool(is_alive)


def _is_left(path: Path, now_s: float, *, old_s: float) -> bool:
    """Tell whether whoever made a passing file has died in the very moment."""
    holder = Holder.read(path)
    is_dead = holder is not None and holder.is_alive() is False
    return is_dead or now_s - _time_ns(path) / 1e9 > old_s


def _time_ns(path: Path) -> int:
    # Of the open file: NFS may answer a stat of the name with what it knew a minute ago.
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _give_name(scratch: Path, path: Path) -> bool:
    """Let one of several who try it have the name `path`; tell whether it is this one."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links here
        try:
            with open(path, "xb") as file:
                file.write(scratch.read_bytes())
        except FileExistsError:
            return False
    return True


def _replace(scratch: Path, path: Path, dead: Holder, now_s: float) -> bool:
    """Put `scratch` in the place of the claim of `dead`; False where another one is doing so."""
    lock = path.with_name(_LOCK)
    if not _give_name(scratch, lock):
        with contextlib.suppress(FileNotFoundError):
            if _is_left(lock, now_s, old_s=SILENT_S):
                lock.unlink()
        return False
    try:
        if Holder.read(path) != dead:
            return False
        scratch.replace(path)
        return True
    finally:
        lock.unlink(missing_ok=True)
