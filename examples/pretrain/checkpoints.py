"""Names of the checkpoints; and, where the checkpoint plugin is off, which to throw away.

With the plugin a checkpoint that bears its name is whole, and the plugin removes old ones. Without
it the checkpoints are DeepSpeed's own, and after a `kill -9` even the newest one may lack a part:
`lowtide.core.restart.choose` decides which of them a start goes on from.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

KEPT = 2
_TAG = re.compile(r"step-(\d+)")


def tag_of(step: int) -> str:
    """Name the checkpoint taken after a number of steps."""
    return f"step-{step:06d}"


def steps_on_disk(folder: Path) -> list[int]:
    """List the steps of all checkpoints in a folder, complete or not, newest first."""
    if not folder.is_dir():
        return []
    matches = [_TAG.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def remove_newer(folder: Path, step: int) -> None:
    """Remove what a killed run left half-written after the checkpoint that is resumed from."""
    for other in steps_on_disk(folder):
        if other > step:
            shutil.rmtree(folder / tag_of(other))


def remove_old(folder: Path, newest: int) -> None:
    """Keep the last ``KEPT`` checkpoints up to the newest, which is known to be complete."""
    for step in [other for other in steps_on_disk(folder) if other <= newest][KEPT:]:
        shutil.rmtree(folder / tag_of(step))
