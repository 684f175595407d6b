"""Folders of checkpoints: in the making, published in one step, and what ``latest`` names."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import secrets
import shutil
import socket
import time
from pathlib import Path, PurePath

from lowtide.core.errors import CheckpointError
from lowtide.core.restart import RECORD_FILE, TRASH, sync_folder

OWNER_FILE = "owner.json"
LATEST_FILE = "latest"
_HEX = "[0-9a-f]"
_SCRIPTS = ".scripts."
_SCRIPTS_OLD_S = 60.0
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def check_tag(tag: str) -> None:
    """Refuse what cannot be the name of a checkpoint, before any rank has begun to write it.

    Raises:
        CheckpointError: it names no folder, or a hidden one, which no reader would look at.
    """
    name = PurePath(tag).name
    if not name or name.startswith("."):
        raise CheckpointError(
            f'save_checkpoint: the tag is "{tag}"; it names the folder of the checkpoint, which '
            f"must have a name that does not begin with a dot, such as global_step10"
        )


def part_folder(final: Path, attempt: str) -> Path:
    """Return where the checkpoint `final` is written before it is complete.

    Beside it, so that one rename publishes it; hidden, so that tools that list tags skip it.
    """
    return final.parent / f".{final.name}.{attempt}.part"


def make_part_folder(part: Path, *, is_owner: bool) -> None:
    """Create `part`. Every rank does, because another node may not see rank 0's at once.

    Args:
        part: What `part_folder` returned.
        is_owner: Whether it belongs to this process, so that it can be removed when that is gone.
            Until the owner comes it belongs to whoever came first: that rank may die alone.
    """
    part.mkdir(parents=True, exist_ok=True)
    path = part / OWNER_FILE
    if not is_owner and path.exists():
        return
    scratch = path.with_name(f".{OWNER_FILE}.{secrets.token_hex(4)}")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "time_s": time.time()}
    try:
        scratch.write_text(json.dumps(owner), encoding="utf-8")
        if is_owner:
            scratch.replace(path)
        else:
            with contextlib.suppress(OSError):  # another one was faster, or there are no links
                os.link(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def publish(part: Path, final: Path) -> None:
    """Give a complete checkpoint its name. One that had the name before is removed.

    At every moment one of the two bears a whole record: under `final`, or (only where the file
    system cannot exchange two names) for an instant under the name of `part`. What others have put
    into a folder `final` that is no checkpoint of ours (DeepSpeed its NVMe files, a script its
    tokenizer) stays in it.

    Raises:
        OSError: the folder cannot be renamed.
    """
    (part / OWNER_FILE).unlink(missing_ok=True)
    sync_folder(part)
    old: Path | None = None
    if final.is_dir() and not has_record(final):
        for entry in final.iterdir():
            if not (part / entry.name).exists():
                entry.rename(part / entry.name)
    if final.exists():
        old = part if _exchange(part, final) else trash_folder(final)
        if old is not part:
            final.rename(old)
            try:
                part.rename(final)
            except OSError:
                old.rename(final)
                raise
    else:
        part.rename(final)
    sync_folder(final.parent)
    if old is not None:
        remove(old, final)


def write_latest(folder: Path, tag: str) -> None:
    """Make ``latest`` in `folder` name `tag`, atomically: other ranks may be reading it."""
    scratch = folder / f".{LATEST_FILE}.{secrets.token_hex(4)}"
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(tag)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(folder / LATEST_FILE)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def scripts_folder(folder: Path) -> Path:
    """Return a name in `folder` for one in which scripts are put before they come there."""
    return folder / f"{_SCRIPTS}{secrets.token_hex(4)}"


def remove_scratch(folder: Path, *, token: str) -> None:
    """Remove what runs left in `folder` that were killed in one of the above.

    Args:
        folder: The folder that holds checkpoints.
        token: What this run's own attempts begin with.
    """
    for path in folder.glob(f".{LATEST_FILE}.{_HEX * 8}"):
        path.unlink(missing_ok=True)
    for part in folder.glob(f".*.{_HEX * 16}.part"):
        is_own = part.suffixes[-2].startswith(f".{token}")
        if not is_own and not (part / OWNER_FILE).exists():
            for path in part.glob(f".{OWNER_FILE}.*"):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty: its age will tell
                part.rmdir()
    for path in folder.glob(f"{_SCRIPTS}{_HEX * 8}"):
        with contextlib.suppress(FileNotFoundError):  # this run's own has just gone
            if time.time() - path.stat().st_mtime > _SCRIPTS_OLD_S:
                shutil.rmtree(path, ignore_errors=True)


def trash_folder(final: Path) -> Path:
    """Return a name under which what is at `final` can be removed bit by bit."""
    return final.parent / f".{final.name}.{secrets.token_hex(4)}{TRASH}"


def remove(folder: Path, final: Path) -> None:
    """Remove `folder`, a checkpoint that was called `final`: first its name, then its files.

    What cannot be removed stays; a later start tries again.
    """
    if not folder.name.endswith(TRASH):
        trash = trash_folder(final)
        with contextlib.suppress(OSError):
            folder.rename(trash)
            sync_folder(trash.parent)  # else, after a power cut, half of it may have its name back
        folder = trash
    shutil.rmtree(folder, ignore_errors=True)


def remove_trash(folder: Path) -> None:
    """Remove what was being removed from `folder` when a run was killed."""
    for path in folder.glob(f".*.{_HEX * 8}{TRASH}"):
        shutil.rmtree(path, ignore_errors=True)


def has_record(folder: Path) -> bool:
    """Tell whether `folder` holds the file that certifies it."""
    return (folder / RECORD_FILE).is_file()


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if platform.system() != "Linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library from before 2018
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))
