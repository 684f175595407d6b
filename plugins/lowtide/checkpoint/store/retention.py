"""Removing old checkpoints and what killed runs left, so that any moment is a good one to die.

A checkpoint is renamed to trash, the rename is synced, and only then its files go: what bears a
checkpoint's name always has all of its files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lowtide.checkpoint.compact.copies import bases_of
from lowtide.checkpoint.store.catalog import (
    MAX_AGE_S,
    Entry,
    age_key,
    has_live_owner,
    list_checkpoints,
    list_place,
)
from lowtide.checkpoint.store.folders import trash_folder
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import read_record, sync_folder


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What `prune` did, or would do.

    Attributes:
        removed: Checkpoints that are gone, the newest first.
        kept: Complete checkpoints that stay, the newest first.
        removed_bytes: Bytes that came free, old trash included.
    """

    removed: list[Entry]
    kept: list[Entry]
    removed_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return {
            "removed": [entry.as_dict() for entry in self.removed],
            "kept": [entry.as_dict() for entry in self.kept],
            "removed_bytes": self.removed_bytes,
        }


def prune(
    folder: Path | str,
    *,
    keep: int,
    keep_every: int | None = None,
    dry_run: bool = False,
    protect: Iterable[str] = (),
    place: PurePath | None = None,
) -> Pruned:
    """Remove old complete checkpoints, and trash that a killed run left.

    Never removed: the newest complete one, the one that ``latest`` names, one without a whole
    record (stock DeepSpeed's, or damaged), one in the making, one that a kept compact checkpoint
    refers to, and a symbolic link. Tags with slashes are thinned out in each sub-folder by itself;
    what others have saved there, with ``save_checkpoint`` to that sub-folder, stays.

    Args:
        folder: What ``save_checkpoint`` was given.
        keep: How many of the newest complete checkpoints stay, at least 1.
        keep_every: Those whose step is a multiple of it stay too.
        dry_run: Only say what would be removed.
        protect: Tags that stay too.
        place: The one sub-folder to thin out, or itself (""); by default all of them.

    Raises:
        CheckpointError: there is no such folder, an argument is wrong, or something cannot be
            removed; then what was to be removed is whole or is trash.
    """
    if keep < 1:
        raise CheckpointError(f"keep: got {keep}, allowed is 1 or more: the newest one stays")
    if keep_every is not None and keep_every < 1:
        raise CheckpointError(f"keep_every: got {keep_every}, allowed is 1 or more, or none")
    folder = Path(folder)
    entries = list_checkpoints(folder, below=True) if place is None else list_place(folder, place)
    protected = set(protect)

    def stays(position: int, entry: Entry) -> bool:
        is_milestone = keep_every is not None and (entry.step or 0) % keep_every == 0
        is_named = entry.is_latest or entry.tag in protected
        return position < keep or is_milestone or is_named or entry.path.is_symlink()

    kept, removed, trash = [], [], []
    for some in _by_folder(entries):
        complete = [e for e in some if e.state == "complete" and e.is_published and _is_own(e)]
        new = [entry for position, entry in enumerate(complete) if stays(position, entry)]
        # Also of those that have all but their name: the next start will give it to them. And of
        # those that are not ours to remove.
        others = [e for e in some if e.state == "complete" and e not in complete]
        needed = _bases([*new, *others])
        kept += [entry for entry in complete if entry in new or entry.name in needed]
        removed += [entry for entry in complete if entry not in new and entry.name not in needed]
        if some[0].path.parent == folder or complete:
            trash += [entry for entry in some if entry.state == "trash"]
    if not dry_run:
        for entry in reversed(removed):  # the oldest first
            _remove(entry)
        for entry in trash:
            with _errors_named(entry.path):
                _delete(entry.path)
    freed_bytes = sum(entry.size_bytes for entry in [*removed, *trash])
    return Pruned(
        removed=sorted(removed, key=age_key, reverse=True),
        kept=sorted(kept, key=age_key, reverse=True),
        removed_bytes=freed_bytes,
    )


def _by_folder(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Return entries by the folder that they lie in, in the order given."""
    groups: dict[Path, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.path.parent, []).append(entry)
    return list(groups.values())


def _is_own(entry: Entry) -> bool:
    """Tell whether it was saved to the folder that is looked at, and not to one below it."""
    if entry.tag == entry.name:
        return True
    record = read_record(entry.path)
    return record is not None and record.get("tag") == entry.tag


def _bases(entries: Iterable[Entry]) -> set[str]:
    """Return the tags that compact checkpoints refer to, directly and through each other."""
    found: set[str] = set()
    waiting = [entry.path for entry in entries]
    while waiting:
        path = waiting.pop()
        for tag, _ in bases_of(path):
            if tag not in found:
                found.add(tag)
                waiting.append(path.with_name(tag))
    return found


def remove_abandoned(folder: Path | str, *, max_age_s: float = MAX_AGE_S) -> list[Path]:
    """Remove unfinished checkpoints that nobody writes any more.

    One with a whole record is not unfinished: `finish_published` gives it its name.

    Args:
        folder: What ``save_checkpoint`` was given.
        max_age_s: After how long without a write one that another machine began, or that does not
            say who began it, counts as abandoned.

    Returns:
        The folders that were removed.

    Raises:
        CheckpointError: there is no such folder, or something cannot be removed.
    """
    entries = list_checkpoints(folder, max_age_s=max_age_s)
    gone = [entry for entry in entries if entry.state == "abandoned"]
    for entry in gone:
        _remove(entry)
    return [entry.path for entry in gone]


def finish_published(folder: Path | str) -> list[str]:
    """Give complete checkpoints their names whose run died before it could.

    One takes the place of an older complete one of its name. Where a newer one has the name, it
    was replaced by that and is removed. Otherwise, while its own process lives, and where a compact
    checkpoint refers to what has the name, it stays as it is: `core.restart.choose` finds it all
    the same.

    Returns:
        The tags that were given.

    Raises:
        CheckpointError: there is no such folder, or something cannot be renamed or removed.
    """
    folder = Path(folder)
    entries = [entry for entry in list_checkpoints(folder) if entry.state == "complete"]
    waiting = [entry for entry in entries if not entry.is_published]
    named = {entry.tag: entry for entry in entries if entry.is_published}
    finished = []
    for entry in waiting:  # the newest first: an older one of the same name finds it there
        if has_live_owner(entry.path):
            continue
        holder = named.get(entry.tag)
        if holder is not None and _is_older(entry, holder):
            _remove(entry)
        elif holder is not None and not _is_older(holder, entry):
            continue
        elif holder is not None and _is_needed(holder, [*named.values(), *waiting]):
            continue  # a compact checkpoint would lose what it refers to
        elif holder is None and os.path.lexists(folder / entry.tag):
            continue  # stock DeepSpeed's or damaged: not ours to remove
        else:
            named[entry.tag] = _publish(entry, holder)
            finished.append(entry.tag)
    return finished


def _is_needed(holder: Entry, entries: Iterable[Entry]) -> bool:
    """Tell whether a compact checkpoint refers to `holder`, and not to another one of its tag."""
    record = read_record(holder.path)
    identity = (holder.tag, None if record is None else record.get("attempt"))
    for entry in entries:
        with contextlib.suppress(CheckpointError):  # damaged: it cannot be loaded in any case
            if entry is not holder and identity in bases_of(entry.path):
                return True
    return False


def _is_older(entry: Entry, other: Entry) -> bool:
    """Tell whether `entry` has fewer steps, or as many and was written first.

    A run that went back to an earlier checkpoint writes fewer steps at a later time: neither is
    then older than the other.
    """
    return age_key(entry)[:2] < age_key(other)[:2] and entry.time_s <= other.time_s


def _publish(entry: Entry, holder: Entry | None) -> Entry:
    target = entry.path.with_name(entry.tag)
    with _errors_named(entry.path):
        if holder is not None:
            old = trash_folder(target)
            os.rename(target, old)
        os.rename(entry.path, target)
        sync_folder(target.parent)
    if holder is not None:
        with _errors_named(old):
            _delete(old)
    return Entry(**{**vars(entry), "path": target})


def _remove(entry: Entry) -> None:
    trash = trash_folder(entry.path.with_name(entry.name))
    with _errors_named(entry.path):
        try:
            os.rename(entry.path, trash)
        except FileNotFoundError:
            return  # another process was faster
        sync_folder(trash.parent)
        _delete(trash)


def _delete(folder: Path) -> None:
    """Remove all of a trash folder. Two processes may do so at once."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(parent, name))
        for name in folders:
            path = os.path.join(parent, name)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path) if os.path.islink(path) else os.rmdir(path)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be renamed or removed ({error.strerror}: {error.filename}); give "
            "this process the right to write there, and try again"
        ) from error
