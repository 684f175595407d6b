"""Which checkpoint to resume from, and which to throw away.

The checkpoints are DeepSpeed's own. Two things make more care needed than its `latest` file gives:
rank 0 writes that file when its own part is on disk, without waiting for the other ranks; and
every file is written in place. So after a `kill -9` even the newest checkpoint may lack a part.
Each part is a zip file with checksums, which is enough to tell.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import dataclass, field
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


def find_damage(checkpoint: Path, world_size: int) -> str | None:
    """Say what is wrong with a checkpoint, or None when every part of it can be read."""
    optimizer_parts = list(checkpoint.glob("*optim_states.pt"))
    model_parts = list(checkpoint.glob("*model_states.pt"))
    if len(optimizer_parts) != world_size or not model_parts:
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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where to resume.

    Attributes:
        step: the step of the checkpoint to load, or None to start from the beginning.
        skipped: one line about each newer checkpoint that cannot be used.
    """

    step: int | None
    skipped: list[str] = field(default_factory=list)


def choose(folder: Path, world_size: int) -> Choice:
    """Find the newest checkpoint whose parts are all complete."""
    skipped = []
    for step in steps_on_disk(folder):
        damage = find_damage(folder / tag_of(step), world_size)
        if damage is None:
            return Choice(step=step, skipped=skipped)
        skipped.append(f"checkpoint {tag_of(step)} is not complete: {damage}; trying an older one")
    return Choice(step=None, skipped=skipped)


def remove_newer(folder: Path, step: int) -> None:
    """Remove what a killed run left half-written after the checkpoint that is resumed from."""
    for other in steps_on_disk(folder):
        if other > step:
            shutil.rmtree(folder / tag_of(other))


def remove_old(folder: Path, newest: int) -> None:
    """Keep the last ``KEPT`` checkpoints up to the newest, which is known to be complete."""
    for step in [other for other in steps_on_disk(folder) if other <= newest][KEPT:]:
        shutil.rmtree(folder / tag_of(step))
