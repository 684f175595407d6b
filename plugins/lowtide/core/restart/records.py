"""What is written down: how a run ended, and which checkpoints are complete."""

from __future__ import annotations

import errno
import json
import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import lowtide
from lowtide.core.errors import CheckpointError

STOP_FILE = "stop.json"
RECORD_FILE = "lowtide.json"
FORMAT = 1
CHECKSUM = "checksum"
TRASH = ".trash"  # how the name of a checkpoint that is being removed ends

# What a record had before records were checksummed. One without a checksum that has more than
# these has lost it, for example to a flipped bit in the very word.
_OLD_KEYS = {"format", "lowtide", "step", "world_size", "time_s", "client_keys", "files", "config"}


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


def json_checksum(value: Mapping[str, Any]) -> int:
    """Return the CRC-32 of `value` without its "checksum", as sorted JSON without blanks."""
    # Through JSON and back first: what is read has lists for tuples and text for every key.
    read = json.loads(json.dumps({k: v for k, v in value.items() if k != CHECKSUM}))
    text = json.dumps(read, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode("utf-8"))


def has_right_checksum(value: Mapping[str, Any]) -> bool:
    """Return whether `value`, as read from JSON, has a "checksum" and it fits."""
    # By type too: to Python, 1 == 1.0 == True.
    return type(value.get(CHECKSUM)) is int and value[CHECKSUM] == json_checksum(value)


def write_durable(path: Path, value: Mapping[str, Any], *, has_checksum: bool = False) -> bytes:
    """Replace the JSON file `path` atomically, synced to disk with its folder.

    Args:
        path: The file.
        value: What to write.
        has_checksum: Whether a "checksum" of the rest is added.

    Returns:
        The bytes in the file.

    Raises:
        OSError: it cannot be written.
    """
    if has_checksum:
        value = {**value, CHECKSUM: json_checksum(value)}
    raw = (json.dumps(value, indent=2) + "\n").encode("utf-8")
    replace_synced(path, raw)
    return raw


def replace_synced(path: Path, data: bytes | bytearray) -> None:
    """Replace a small file by `data` atomically, synced to disk with its folder."""
    scratch = path.with_name(f"{path.name}.part")
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to disk: what was created, renamed or removed there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync names by themselves
            raise
    finally:
        os.close(descriptor)


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
    files: Mapping[str, int] | None = None,
    attempt: str | None = None,
    tag: str | None = None,
    manifests: Mapping[str, Mapping[str, int]] | None = None,
    node: tuple[int, int] | None = None,
) -> None:
    """Certify that every rank has written its part of `checkpoint`. Called by rank 0 after that.

    Args:
        checkpoint: The checkpoint's folder.
        step: Optimizer steps in it.
        world_size: Number of ranks that wrote it.
        config: The resolved block, stored with it: what every ``"auto"`` was in this run.
        client_keys: Names of the state that the script put into it.
        files: Size in bytes of each file, by its name below `checkpoint`, from a writer that knows
            them and whose ``.pt`` files are all zip files. Otherwise the folder is looked through.
        attempt: Which try to write this checkpoint it was.
        tag: The name that it is to have, whatever its folder is called meanwhile.
        manifests: "size_bytes" and "crc32" of each file with checksums, by its name.
        node: (number, total) where `checkpoint` holds what one of several nodes wrote.

    Raises:
        OSError: it cannot be written.
    """
    record = {"format": FORMAT, "lowtide": lowtide.__version__, "step": step}
    record |= {"world_size": world_size, "time_s": time.time(), "client_keys": [*client_keys]}
    known: dict[str, Any] = {"attempt": attempt, "tag": tag, "manifests": manifests}
    known |= {} if node is None else {"node": node[0], "nodes": node[1]}
    record |= {name: value for name, value in known.items() if value is not None}
    found = _look_through(checkpoint) if files is None else _as_told(files)
    record |= {"files": found, "config": config}
    write_durable(checkpoint / RECORD_FILE, record, has_checksum=True)


def _as_told(files: Mapping[str, int]) -> dict[str, Any]:
    return {
        name: {"size_bytes": size_bytes, "is_zip": name.endswith(".pt")}
        for name, size_bytes in sorted(files.items())
    }


def _look_through(checkpoint: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name.removesuffix(".part") != RECORD_FILE:
            is_zip = path.suffix == ".pt" and zipfile.is_zipfile(path)
            name = str(path.relative_to(checkpoint))
            files[name] = {"size_bytes": _size_bytes(path), "is_zip": is_zip}
    return files


def _size_bytes(path: Path) -> int:
    # Opened, not only looked at: on NFS the attributes of another node's file may be old ones.
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size


class FindDamage(Protocol):
    """A check of one checkpoint, called like `find_damage`."""

    def __call__(self, checkpoint: Path, /, *, world_size: int | None = None) -> str | None:
        """Say why `checkpoint` cannot be loaded, or return None when it can."""


def choose(
    folder: Path, *, world_size: int | None = None, find_damage: FindDamage | None = None
) -> Choice:
    """Find the newest checkpoint in `folder` that is complete.

    A checkpoint without a record (stock DeepSpeed wrote it, or a killed run began it) counts when
    every part of it can be read from end to end and, if `world_size` is given, each rank has one.
    A folder whose name begins with "." counts only with a record: the run that wrote it died when
    all was there and only the name was not.

    Args:
        folder: What ``save_checkpoint`` was given.
        world_size: Number of ranks that are going to load it, where each has a part of its own
            (ZeRO). A recorded checkpoint of another number of ranks is complete all the same:
            whether it can be loaded is the host's to say.
        find_damage: A deeper check in place of this module's `find_damage`, which compares sizes
            where there is a record.
    """
    skipped: list[str] = []
    check = _find_damage if find_damage is None else find_damage
    for step, path in _candidates(folder):
        damage = check(path, world_size=world_size)
        if damage is None:
            return Choice(tag=path.name, step=step, skipped=skipped)
        skipped.append(f"checkpoint {path.name} is not used: {damage}")
    return Choice(skipped=skipped)


def find_damage(checkpoint: Path, *, world_size: int | None = None) -> str | None:
    """Say why a checkpoint cannot be loaded, or None when it can."""
    record = read_record(checkpoint)
    if record is None:
        return _find_damage_unrecorded(checkpoint, world_size)
    if record.get("nodes", 1) > 1:
        return (
            f"it is on the disks of {record['nodes']} nodes, of which this is node "
            f"{record['node']}'s; load it with its level in lowtide.checkpoint.tiers"
        )
    manifests = record.get("manifests", {})
    for name, written in [*record["files"].items(), *manifests.items()]:
        path = checkpoint / name
        try:
            found = _size_bytes(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != written["size_bytes"]:
            return f"{name} has {found} bytes, {written['size_bytes']} were written"
        if written.get("is_zip") and not zipfile.is_zipfile(path):
            return f"{name} is no longer a torch file"
    return None


_find_damage: FindDamage = find_damage  # `choose` has an argument of that name


def _find_damage_unrecorded(checkpoint: Path, world_size: int | None) -> str | None:
    missing = find_missing_parts(checkpoint, world_size=world_size)
    if missing is not None:
        return missing
    for part in sorted(checkpoint.glob("*_states.pt")):
        damage = find_zip_damage(part)
        if damage is not None:
            return f"{part.name} {damage}"
    return None


def find_missing_parts(checkpoint: Path, *, world_size: int | None = None) -> str | None:
    """Say which parts a checkpoint without a record lacks by its files' names, or return None."""
    if not any(checkpoint.glob("*model_states.pt")):
        return "it has no completion record and no model part"
    parts = len(list(checkpoint.glob("*optim_states.pt")))
    if world_size is not None and parts < world_size:
        return f"{parts} of {world_size} optimizer parts are there"
    return None


def find_zip_damage(path: Path) -> str | None:
    """Read the zip file `path` from end to end; say what is wrong with it, or return None."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # noqa: BLE001 - a flipped bit makes zipfile raise almost anything
        return f"cannot be read ({type(error).__name__}: {error})"
    return None if broken is None else f"has a wrong checksum in {broken}"


def _candidates(folder: Path) -> Iterator[tuple[int, Path]]:
    found: list[tuple[int, float, Path]] = []
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.endswith(TRASH):
                continue
            record = read_record(path)
            # A hidden name without a record is a checkpoint in the making, or what is left of it.
            digits = None if path.name[0] == "." else re.search(r"(\d+)$", path.name)
            if record is not None:
                found.append((int(record["step"]), float(record["time_s"]), path))
            elif digits and any(path.glob("*_states.pt")):
                found.append((int(digits[1]), path.stat().st_mtime, path))
    for step, _, path in sorted(found, reverse=True):
        yield step, path


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the record beside a checkpoint, or None where there is none that is whole.

    Older versions wrote records without a checksum; such a record is taken as it is.
    """
    try:
        record = json.loads((checkpoint / RECORD_FILE).read_text(encoding="utf-8"))
        if not (record.keys() <= _OLD_KEYS or has_right_checksum(record)):
            return None
        is_whole = isinstance(record["files"], dict) and isinstance(record["step"], int)
        return record if is_whole and "world_size" in record and "time_s" in record else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
