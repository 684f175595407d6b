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
from pathlib import Path

from lowtide.core.restart import RECORD_FILE, TRASH, sync_folder

OWNER_FILE = "owner.json"
LATEST_FILE = "latest"
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_FDCWD = -100


def part_folder(final: Path, attempt: str) -> Path:
    """Return where the checkpoint `final` is written before it is complete.

    Beside it, so that one rename publishes it; hidden, so that tools that list tags skip it.
    """
    return final.parent / f".{final.name}.{attempt}.part"


def make_part_folder(part: Path, *, is_owner: bool) -> None:
    """Create `part`. Every rank does, because another node may not see rank 0's at once.

    Args:
        part: What `part_folder` returned.
        is_owner: Also say which process it belongs to, so that it can be removed when that is gone.
    """
    part.mkdir(parents=True, exist_ok=True)
    if is_owner:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "time_s": time.time()}
        (part / OWNER_FILE).write_text(json.dumps(owner), encoding="utf-8")


def publish(part: Path, final: Path) -> None:
    """Give a complete checkpoint its name. One that had the name before is removed.

    At every moment one of the two bears a whole record: under `final`, or (only where the file
    system cannot exchange two names) for an instant under the name of `part`.

    Raises:
        OSError: the folder cannot be renamed.
    """
    (part / OWNER_FILE).unlink(missing_ok=True)
    sync_folder(part)
    old: Path | None = None
    if final.exists():
        old = part if _exchange(part, final) else trash_folder(final)
        if old is not part:
            final.rename(old)
            part.rename(final)
    else:
        part.rename(final)
    sync_folder(final.parent)
    if old is not None:
        remove(old, final)


def write_latest(folder: Path, tag: str) -> None:
    """Make ``latest`` in `folder` name `tag`, atomically: other ranks may be reading it."""
    scratch = folder / f".{LATEST_FILE}.{secrets.token_hex(4)}"
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(folder / LATEST_FILE)
    sync_folder(folder)


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
        folder = trash
    shutil.rmtree(folder, ignore_errors=True)


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
