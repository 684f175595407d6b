"""What is written down: how a run ended, and which checkpoints are complete."""

from __future__ import annotations

import json
import os
import re
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lowtide
from lowtide.core.errors import CheckpointError

STOP_FILE = "stop.json"
RECORD_FILE = "lowtide.json"
FORMAT = 1


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


def forget_record(checkpoint: Path) -> None:
    """Take back a record, by rank 0, before any rank overwrites a part of `checkpoint`."""
    (checkpoint / RECORD_FILE).unlink(missing_ok=True)


def write_record(
    checkpoint: Path,
    *,
    step: int,
    world_size: int,
    config: Mapping[str, Any],
    client_keys: Sequence[str] = (),
) -> None:
    """Certify that every rank has written its part of `checkpoint`. Called by rank 0 after that.

    Args:
        checkpoint: The checkpoint's folder.
        step: Optimizer steps in it.
        world_size: Number of ranks that wrote it.
        config: The resolved block, stored with it: what every ``"auto"`` was in this run.
        client_keys: Names of the state that the script put into it.

    Raises:
        OSError: it cannot be written.
    """
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name.removesuffix(".part") != RECORD_FILE:
            is_zip = path.suffix == ".pt" and zipfile.is_zipfile(path)
            name = str(path.relative_to(checkpoint))
            files[name] = {"size_bytes": _size_bytes(path), "is_zip": is_zip}
    record = {"format": FORMAT, "lowtide": lowtide.__version__, "step": step}
    record |= {"world_size": world_size, "time_s": time.time(), "client_keys": [*client_keys]}
    write_durable(checkpoint / RECORD_FILE, {**record, "files": files, "config": config})


def _size_bytes(path: Path) -> int:
    # Opened, not only looked at: on NFS the attributes of another node's file may be old ones.
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size


def choose(folder: Path, *, world_size: int | None = None) -> Choice:
    """Find the newest checkpoint in `folder` that is complete.

    A checkpoint without a record (stock DeepSpeed wrote it, or a killed run began it) counts when
    every part of it can be read from end to end and, if `world_size` is given, each rank has one.

    Args:
        folder: What ``save_checkpoint`` was given.
        world_size: Number of ranks that are going to load it, where each has a part of its own
            (ZeRO). A recorded checkpoint of another number of ranks is complete all the same:
            whether it can be loaded is the host's to say.
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
    record = read_record(checkpoint)
    if record is None:
        return _find_damage_unrecorded(checkpoint, world_size)
    for name, written in record["files"].items():
        path = checkpoint / name
        try:
            found = _size_bytes(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != written["size_bytes"]:
            return f"{name} has {found} bytes, {written['size_bytes']} were written"
        if written["is_zip"] and not zipfile.is_zipfile(path):
            return f"{name} is no longer a torch file"
    return None


def _find_damage_unrecorded(checkpoint: Path, world_size: int | None) -> str | None:
    optimizer_parts = list(checkpoint.glob("*optim_states.pt"))
    model_parts = list(checkpoint.glob("*model_states.pt"))
    if not model_parts:
        return "it has no completion record and no model part"
    if world_size is not None and len(optimizer_parts) < world_size:
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
            record = read_record(path)
            digits = re.search(r"(\d+)$", path.name)
            if record is not None:
                found.append((int(record["step"]), float(record["time_s"]), path))
            elif digits and any(path.glob("*_states.pt")):
                found.append((int(digits[1]), path.stat().st_mtime, path))
    for step, _, path in sorted(found, reverse=True):
        yield step, path


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the record beside a checkpoint, or None where there is none that is whole."""
    try:
        record = json.loads((checkpoint / RECORD_FILE).read_text(encoding="utf-8"))
        is_whole = isinstance(record["files"], dict) and isinstance(record["step"], int)
        return record if is_whole and "world_size" in record and "time_s" in record else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
