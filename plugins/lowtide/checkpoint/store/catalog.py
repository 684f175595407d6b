"""What lies in a folder of checkpoints, found out without reading the checkpoints themselves."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.store.folders import LATEST_FILE, OWNER_FILE
from lowtide.checkpoint.store.manifest import is_manifest_name
from lowtide.checkpoint.store.processes import is_running
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import RECORD_FILE, TRASH, read_record

logger = logging.getLogger("lowtide")

State: TypeAlias = Literal[
    "complete", "unverified", "incomplete", "in progress", "abandoned", "trash"
]
_DEEPEST, _MOST_FOLDERS = 4, 2000  # levels, and folders that are looked into, below the one given
MAX_AGE_S = 3600.0  # nothing was written for so long: whoever began it is gone

_PART = re.compile(r"\.(?P<tag>.+)\.(?P<attempt>[0-9a-f]{16})\.part")
_TRASH = re.compile(r"\.(?P<tag>.+)\.[0-9a-f]{8}\.trash")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint, or what is left of one.

    Attributes:
        tag: Its name, with slashes where it lies below; for one in the making what it is to have.
        path: Its folder, whatever that is called.
        state: "complete": the record is whole and every file has its size. "unverified": without
            a record, as stock DeepSpeed writes it. "incomplete": files or the record are missing or
            wrong. "in progress" and "abandoned": not finished; somebody is, or nobody is any more,
            writing it. "trash": being removed.
        step: Optimizer steps in it, where known.
        time_s: Unix time at which it was finished, or else last written to.
        size_bytes: Bytes of all its files.
        files: Number of its files.
        world_size: Number of ranks that wrote it, where known.
        is_latest: Whether the file ``latest`` names it, in the folder given or in its own.
        is_compact: Whether it is a small copy, to be expanded before it is loaded.
    """

    tag: str
    path: Path
    state: State
    step: int | None
    time_s: float
    size_bytes: int
    files: int
    world_size: int | None
    is_latest: bool
    is_compact: bool = False

    @property
    def name(self) -> str:
        """The last part of its tag."""
        return PurePath(self.tag).name

    @property
    def is_published(self) -> bool:
        """Whether its folder bears its name."""
        return self.path.name == self.name

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return {**asdict(self), "path": str(self.path)}


@dataclass
class _Contents:
    """Sizes by name below a checkpoint, and when one of its files was last written to."""

    sizes_bytes: dict[str, int] = field(default_factory=dict)
    newest_s: float = 0.0

    @classmethod
    def of(cls, folder: Path) -> _Contents:
        found = cls()
        found._add(folder, "")
        return found

    def _add(self, folder: Path, prefix: str) -> None:
        try:
            self.newest_s = max(self.newest_s, folder.stat().st_mtime)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        self._add(Path(entry.path), f"{prefix}{entry.name}/")
                        continue
                    found = entry.stat()
                    self.sizes_bytes[prefix + entry.name] = found.st_size
                    self.newest_s = max(self.newest_s, found.st_mtime)
        except FileNotFoundError:
            return  # it is being removed just now

    def agrees_with(self, record: dict[str, Any]) -> bool:
        """Tell whether every file that `record` names is there in its size."""
        named = {**record["files"], **record.get("manifests", {})}
        return all(self.sizes_bytes.get(n) == w["size_bytes"] for n, w in named.items())


def list_checkpoints(
    folder: Path | str, *, max_age_s: float = MAX_AGE_S, below: bool = False
) -> list[Entry]:
    """Return the checkpoints in `folder`, the newest (by step) first.

    Reads records, names and sizes, so it is quick and sees no damage within files: `verify` does.

    Args:
        folder: What ``save_checkpoint`` was given.
        max_age_s: After how long without a write an unfinished checkpoint of another machine
            counts as abandoned.
        below: Look into its sub-folders too, for tags with slashes: four levels deep, into 2000
            folders at most (else a warning), never through a symbolic link.

    Raises:
        CheckpointError: there is no such folder, or it cannot be read.
    """
    folder = Path(folder)
    entries = list_place(folder, PurePath(), max_age_s=max_age_s)
    if below:
        found = list(islice(_places_below(folder, PurePath()), _MOST_FOLDERS + 1))
        if len(found) > _MOST_FOLDERS:
            logger.warning(
                "%s: more than %d folders below it; not all are seen", folder, _MOST_FOLDERS
            )
        for place in found[:_MOST_FOLDERS]:
            with contextlib.suppress(CheckpointError):  # it has just gone, or is somebody else's
                entries += list_place(folder, place, max_age_s=max_age_s)
    return sorted(entries, key=age_key, reverse=True)


def list_place(folder: Path, place: PurePath, *, max_age_s: float = MAX_AGE_S) -> list[Entry]:
    """Return the checkpoints of `folder` whose tags lie in the sub-folder `place`.

    Raises:
        CheckpointError: it is no sub-folder (a link, or outside), or cannot be read.
    """
    within = folder / place
    if not is_within(folder, place):
        raise CheckpointError(f"{within}: is not a folder below {folder}; links are not followed")
    latest = [read_latest(within), None]
    if place != PurePath():
        latest[1] = _name_in(place, read_latest(folder))
    try:
        paths = [path for path in within.iterdir() if path.is_dir()]
    except OSError as error:
        raise CheckpointError(
            f"{within}: cannot be listed ({error.strerror}); pass the folder that save_checkpoint "
            "was given"
        ) from error
    found = (_look_at(path, place=place, latest=latest, max_age_s=max_age_s) for path in paths)
    entries = [entry for entry in found if entry is not None]
    return sorted(entries, key=age_key, reverse=True)


def _name_in(place: PurePath, tag: str | None) -> str | None:
    """Return the last part of `tag`, if it lies in `place`."""
    return None if tag is None or PurePath(tag).parent != place else PurePath(tag).name


def is_within(folder: Path, place: PurePath) -> bool:
    """Tell whether `place` is a sub-folder of `folder`: not outside, nor behind a link."""
    if place.is_absolute() or ".." in place.parts:
        return False
    steps = [folder / PurePath(*place.parts[: i + 1]) for i in range(len(place.parts))]
    return not any(step.is_symlink() for step in steps)


def _places_below(folder: Path, place: PurePath) -> Iterator[PurePath]:
    """Give the sub-folders that may hold checkpoints, those nearer to `folder` first."""
    waiting = [place]
    for _ in range(_DEEPEST):
        waiting, above = [], waiting
        for each in above:
            try:
                with os.scandir(folder / each) as entries:
                    names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
            except OSError:
                continue
            for name in names:
                if not name.startswith(".") and not _looks_like_one(folder / each / name):
                    waiting.append(each / name)
                    yield each / name


def age_key(entry: Entry) -> tuple[int, float, str]:
    """Return what orders checkpoints by age, the newest last."""
    return (-1 if entry.step is None else entry.step, entry.time_s, entry.path.name)


def read_latest(folder: Path) -> str | None:
    """Return the tag in the file ``latest`` of `folder`, or None where there is none readable."""
    try:
        return (folder / LATEST_FILE).read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None


def is_checkpoint(path: Path) -> bool:
    """Tell whether `path` is the folder of a checkpoint, finished or not."""
    return path.is_dir() and _look_at(path) is not None


def _look_at(
    path: Path,
    *,
    place: PurePath = PurePath(),  # noqa: B008 - it is immutable
    latest: Sequence[str | None] = (),
    max_age_s: float = MAX_AGE_S,
) -> Entry | None:
    hidden = _PART.fullmatch(path.name) or _TRASH.fullmatch(path.name)
    if hidden is None and not _looks_like_one(path):
        return None
    contents = _Contents.of(path)
    record = None if path.name.endswith(TRASH) else read_record(path)
    tag = hidden["tag"] if hidden else path.name
    digits = re.search(r"(\d+)$", tag)
    return Entry(
        tag=(place / tag).as_posix(),
        path=path,
        state=_state_of(path, contents, record, max_age_s=max_age_s),
        step=record["step"] if record else int(digits[1]) if digits else None,
        time_s=float(record["time_s"]) if record else contents.newest_s,
        size_bytes=sum(contents.sizes_bytes.values()),
        files=len(contents.sizes_bytes),
        world_size=record["world_size"] if record else None,
        is_latest=path.name in latest,
        is_compact=any(name.endswith(SUFFIX) for name in contents.sizes_bytes),
    )


def _looks_like_one(path: Path) -> bool:
    # By the names at the top only: beside checkpoints there may lie all the logs of a group.
    if path.name.startswith("."):
        return False
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(n == RECORD_FILE or n.endswith("_states.pt") or is_manifest_name(n) for n in names)


def _state_of(
    path: Path, contents: _Contents, record: dict[str, Any] | None, *, max_age_s: float
) -> State:
    if path.name.endswith(TRASH):
        return "trash"
    if record is not None and contents.agrees_with(record):
        return "complete"
    if _PART.fullmatch(path.name):
        is_gone = is_abandoned(path, newest_s=contents.newest_s, max_age_s=max_age_s)
        return "abandoned" if is_gone else "in progress"
    names = contents.sizes_bytes
    is_ours = RECORD_FILE in names or any(map(is_manifest_name, names))
    return "incomplete" if is_ours else "unverified"


def is_abandoned(part: Path, *, newest_s: float, max_age_s: float = MAX_AGE_S) -> bool:
    """Tell whether nobody writes the unfinished checkpoint `part` any more.

    On the machine that wrote it by its process; from elsewhere by the age of its newest file.

    Args:
        part: Its folder.
        newest_s: Unix time at which something in it was last written to.
        max_age_s: How old that may be.
    """
    owner = _read_owner(part)
    if owner is not None and owner["host"] == socket.gethostname():
        return not is_running(owner["pid"], since_s=owner["time_s"])
    return time.time() - newest_s > max_age_s


def has_live_owner(part: Path) -> bool:
    """Tell whether a process of this machine is known to be writing `part`."""
    owner = _read_owner(part)
    if owner is None or owner["host"] != socket.gethostname():
        return False
    return is_running(owner["pid"], since_s=owner["time_s"])


def _read_owner(part: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads((part / OWNER_FILE).read_text(encoding="utf-8"))
        is_whole = isinstance(owner["host"], str) and type(owner["pid"]) is int
        return {**owner, "time_s": float(owner["time_s"])} if is_whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
