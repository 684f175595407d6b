"""DeepSpeed's operators that torch compiles at first use: where they lie, locks, building ahead.

torch guards each such build with a file ``<folder>/<operator>/lock``, which the builder creates,
keeps open, and deletes at the end; everyone else waits until it is gone. A builder that was killed
leaves the file, and then every later start waits for ever. `find_locks` tells the two apart.

A lock is stale when no process has it open. That is certain for processes of this machine that
this user may look into (Linux, ``/proc/<pid>/fd``). Where a builder could be out of sight (a
network file system, another user, no ``/proc``) a lock counts as stale only after half an hour in
which nothing in its folder changed. Not seen: a builder in another container that shares a folder.

``python -m lowtide.hosts.deepspeed_ops build`` builds what DeepSpeed needs on a CPU, once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lowtide.core.errors import HostError, StaleLockError, listed, near

# Operator folder -> name of its builder in deepspeed.accelerator.
BUILDERS = {"cpu_adam": "CPUAdamBuilder", "deepspeed_shm_comm": "ShareMemCommBuilder"}

_YOUNG_S = 5.0  # a builder may just be between creating its lock and being seen
_OUT_OF_SIGHT_QUIET_S = 1800.0
_BUILD_TIMEOUT_S = 1200.0
_HEARTBEAT_S = 20.0
_LOCK_NAME = "lock"
_RECORD_NAME = "lowtide_build.json"
_NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs.*|lustre|gpfs|ceph|cifs|smb.*|beegfs.*|glusterfs|pvfs2|orangefs|afs|fuse\..*|fuse"
)
_NOT_USED = "not used by DeepSpeed's accelerator"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lock:
    """A lock file of an operator build.

    Attributes:
        path: The file.
        age_s: Seconds since it was made.
        is_stale: Whether its builder is gone, so that it will never be removed.
        reason: How that is known.
    """

    path: Path
    age_s: float
    is_stale: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What became of one operator.

    Attributes:
        name: The operator.
        status: "ready" (was built before), "built", "unused" (not needed here) or "failed".
        duration_s: Seconds that it took.
        detail: One line for people; for a failure, the compiler's last lines.
    """

    name: str
    status: str
    duration_s: float
    detail: str


def extensions_dir() -> Path:
    """Return the folder in which torch keeps one folder per compiled operator."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    # Mirrors torch.utils.cpp_extension._get_build_directory, which also creates the folder.
    hip, cuda = torch.version.hip, torch.version.cuda
    kind = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{kind}"


def find_locks(root: Path) -> list[Lock]:
    """Return the operator builds under `root` that are locked, with a verdict on each.

    Args:
        root: `extensions_dir()`, or any folder with one folder per operator.
    """
    return [lock for path in sorted(root.glob(f"*/{_LOCK_NAME}")) if (lock := _judge(path))]


def remove_stale_locks(root: Path) -> list[Path]:
    """Delete the locks under `root` whose builder is gone; return their paths.

    A half-made operator needs no more care: the next build makes it anew.
    """
    stale = [lock.path for lock in find_locks(root) if lock.is_stale]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def check_locks(root: Path, wanted: Collection[str] | None = None) -> str | None:
    """Refuse to start where a stale lock would make torch wait for ever.

    Args:
        root: `extensions_dir()`.
        wanted: The operators that will be built or loaded; None is all that are there.

    Returns:
        What to say of stale locks of other operators, or None where there are none.

    Raises:
        StaleLockError: It names each file and says how to remove it.
    """
    stale = [lock for lock in find_locks(root) if lock.is_stale]
    command = "lowtide doctor --fix"
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        command = f"TORCH_EXTENSIONS_DIR={root} {command}"
    counting = [lock for lock in stale if wanted is None or lock.path.parent.name in wanted]
    found = _told(counting or stale)
    text = f"a killed build of a DeepSpeed operator left its lock behind: {found}."
    if counting:
        raise StaleLockError(
            f"{text} DeepSpeed would wait for it for ever. Allowed is no lock, or one whose "
            f"builder runs. Run: {command}"
        )
    if not stale:
        return None
    return f"{text} This job does not use it; one that does would wait for ever. Run: {command}"


def _told(locks: Sequence[Lock]) -> str:
    return "; ".join(f"{lock.path} ({lock.age_s:.0f} s old: {lock.reason})" for lock in locks)


def prebuild(
    names: Sequence[str] = tuple(BUILDERS), progress: Callable[[str], None] | None = None
) -> list[BuildResult]:
    """Build DeepSpeed operators now instead of at a job's first start.

    Args:
        names: Operators, of ``BUILDERS``.
        progress: Takes one line of text at a time, for people.

    Returns:
        One result per name, in order; failures are results too.

    Raises:
        HostError: A name is unknown or DeepSpeed is not installed.
        StaleLockError: A killed build left its lock.
    """
    tell = progress or (lambda _text: None)
    for name in names:
        if name not in BUILDERS:
            raise HostError(
                f"prebuild: got operator {name!r}, allowed are {listed(BUILDERS)}."
                f"{near(name, BUILDERS)}"
            )
    root = extensions_dir()
    fingerprint = _fingerprint()
    check_locks(root, names)
    return [_build(name, root=root, fingerprint=fingerprint, tell=tell) for name in names]


def _judge(path: Path) -> Lock | None:
    """Return the verdict on one lock file, or None when it is gone by now."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    age_s = max(0.0, time.time() - found.st_mtime)
    holder = _holder(found)
    if holder is not None:
        return Lock(path=path, age_s=age_s, is_stale=False, reason=f"held by {holder}")
    if not path.exists():  # its builder finished while we looked
        return None
    if age_s < _YOUNG_S:
        return Lock(path=path, age_s=age_s, is_stale=False, reason="made just now")
    blind = _why_blind(path, found.st_uid)
    if blind is None:
        reason = "no process on this machine has it open"
        return Lock(path=path, age_s=age_s, is_stale=True, reason=reason)
    quiet_s = time.time() - max(_mtimes(path.parent), default=found.st_mtime)
    reason = f"{blind}; nothing beside it changed for {quiet_s:.0f} s"
    return Lock(path=path, age_s=age_s, is_stale=quiet_s > _OUT_OF_SIGHT_QUIET_S, reason=reason)


def _holder(lock: os.stat_result) -> str | None:
    """Return the process that has the file open, as text, or None."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = list((process / "fd").iterdir())
        except OSError:  # ended, or another user's
            continue
        for link in links:
            try:
                # By name first: asking for the status of any open file may block.
                if Path(os.readlink(link)).name != _LOCK_NAME:
                    continue
                there = link.stat()
                if (there.st_dev, there.st_ino) == (lock.st_dev, lock.st_ino):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    return f"process {process.name} ({command.strip()[:80]})"
            except (OSError, UnicodeDecodeError):
                continue
    return None


def _why_blind(path: Path, owner: int) -> str | None:
    """Return why a living builder could be out of sight, or None."""
    if not Path("/proc/self/fd").exists():
        return "this system does not show which files processes have open"
    kind = _file_system(path)
    if _NETWORK_FILE_SYSTEMS.fullmatch(kind):
        return f"it lies on a {kind} file system, where another machine may build"
    if os.geteuid() not in (0, owner):
        return f"it belongs to user {owner}, whose processes are not visible"
    return None


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, as /proc/mounts names it."""
    best, kind = 0, "unknown"
    for line in (
        Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    ):
        fields = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
        if path.resolve().is_relative_to(mount) and len(mount) >= best:
            best, kind = len(mount), fields[2]
    return kind


def _mtimes(folder: Path) -> Iterator[float]:
    for path in folder.iterdir():
        try:
            yield path.stat().st_mtime
        except OSError:
            continue


def _build(name: str, *, root: Path, fingerprint: str, tell: Callable[[str], None]) -> BuildResult:
    """Build one operator in a process of its own, unless its record says that nothing changed."""
    begin_s = time.perf_counter()
    record = root / name / _RECORD_NAME
    if (known := _read_record(record, fingerprint)) is not None:
        return BuildResult(name=name, status=known, duration_s=0.0, detail="nothing changed")
    tell(f"DeepSpeed operator {name}: building, once; this takes some minutes")
    returncode, output = _run_builder(name, root=root, tell=tell)
    duration_s = time.perf_counter() - begin_s
    if returncode != 0:
        tail = "\n".join(output.strip().splitlines()[-30:])
        tell(f"DeepSpeed operator {name}: failed after {duration_s:.0f} s")
        return BuildResult(name=name, status="failed", duration_s=duration_s, detail=tail)
    status = "unused" if _NOT_USED in output else "built"
    _write_record(record, fingerprint, status)
    detail = _NOT_USED if status == "unused" else f"in {root / name}"
    tell(f"DeepSpeed operator {name}: {status} in {duration_s:.0f} s")
    return BuildResult(name=name, status=status, duration_s=duration_s, detail=detail)


def _run_builder(name: str, *, root: Path, tell: Callable[[str], None]) -> tuple[int, str]:
    """Run the child that builds `name`; return its exit status and what it printed."""
    # torch looks for ninja on PATH; in a virtual environment it lies beside the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "TORCH_EXTENSIONS_DIR": str(root)}
    # A process group of its own, so that the compilers end with it.
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, BUILDERS[name], _NOT_USED],
        env=environment,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    begin_s = time.monotonic()
    try:
        while True:
            try:
                output, _ = child.communicate(timeout=_HEARTBEAT_S)
                return child.returncode, output
            except subprocess.TimeoutExpired:
                passed_s = time.monotonic() - begin_s
                tell(f"DeepSpeed operator {name}: still building, {passed_s:.0f} s")
                if passed_s > _BUILD_TIMEOUT_S:
                    return 1, f"stopped after {passed_s:.0f} s without a result"
    finally:
        if child.poll() is None:  # timeout or Ctrl-C: leave neither compilers nor a lock behind
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
            lock = root / name / _LOCK_NAME
            if lock.exists() and _holder(lock.stat()) is None:
                lock.unlink(missing_ok=True)


# -c and not -m: the child needs nothing of this package.
_CHILD = """
import sys
from deepspeed.accelerator import get_accelerator
accelerator = get_accelerator()
builder = accelerator.create_op_builder(sys.argv[1])
if builder is None or type(builder).__name__ != sys.argv[1]:
    print(sys.argv[2], accelerator.device_name())
else:
    builder.load(verbose=False)
"""


def _fingerprint() -> str:
    """Return what a built operator depends on: versions, interpreter, processor, GPU or not."""
    try:
        versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    except importlib.metadata.PackageNotFoundError as error:
        raise HostError(
            f"prebuild: {error.name} is not installed, so there is nothing to build; "
            "run: pip install deepspeed (torch first)"
        ) from error
    flags = ""
    info = Path("/proc/cpuinfo")  # the operators are compiled for this very processor
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    facts = [*versions, sys.version, platform.machine(), flags]
    facts += [os.environ.get("DS_ACCELERATOR", ""), str(Path("/dev/nvidiactl").exists())]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _library_state(folder: Path) -> list[object]:
    libraries = sorted(folder.glob("*.so"))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in libraries]


def _read_record(record: Path, fingerprint: str) -> str | None:
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        is_same = known["fingerprint"] == fingerprint
        is_same = is_same and known["libraries"] == _library_state(record.parent)
        status = str(known["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not is_same:
        return None
    return "ready" if status == "built" else status


def _write_record(record: Path, fingerprint: str, status: str) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    known = {"fingerprint": fingerprint, "status": status}
    text = json.dumps({**known, "libraries": _library_state(record.parent)})
    record.write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run the command line ``build [name ...] [--json]``; return the exit status.

    Returns:
        0 when every operator is ready, 1 when one failed or a stale lock is in the way, 2 for
        wrong usage.
    """
    from rich.console import Console

    err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    words = [word for word in arguments if word != "--json"]
    if not words or words[0] != "build" or any(word.startswith("-") for word in words):
        err.print("usage: python -m lowtide.hosts.deepspeed_ops build [NAME ...] [--json]")
        return 2
    try:
        results = prebuild(words[1:] or tuple(BUILDERS), err.print)
    except (HostError, StaleLockError) as error:
        err.print(str(error))
        return 1
    if "--json" in arguments:
        rows = [asdict(result) for result in results]
        Console(soft_wrap=True).print_json(json.dumps(rows))
    failed = [result for result in results if result.status == "failed"]
    for result in failed:
        err.print(f"DeepSpeed operator {result.name} could not be built:\n{result.detail}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
