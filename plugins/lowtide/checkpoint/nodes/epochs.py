"""Checkpoints on disks that only one node sees: what each node has of them, put together.

A node has the files of its own ranks under the checkpoint's name, with a record that says which
node of how many it is. With ``copies`` it also has the files of the ranks of the node before it,
in ``.copies/<tag>/<rank>``, each with its manifest and the record of the node they are from. Only
files of one attempt belong together, whatever they are called.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from lowtide.checkpoint.store.catalog import list_checkpoints
from lowtide.checkpoint.store.folders import remove
from lowtide.checkpoint.store.manifest import is_manifest_name, read_manifest
from lowtide.checkpoint.store.retention import finish_published
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import read_record

COPIES = ".copies"

# JSON, as it goes over the board. Holding: what one node has of one attempt; "ranks" and "copies"
# map a rank to the names of its files that others read too. Epoch: the same over all nodes;
# "holders" maps a rank to [node, is it a copy].
Holding = dict[str, Any]
Epoch = dict[str, Any]


def copy_folder(folder: Path, tag: str, rank: int) -> Path:
    """Return where a level's `folder` keeps copies of another node's rank."""
    return folder / COPIES / tag / str(rank)


def is_read_by_all(name: str) -> bool:
    """Tell whether DeepSpeed reads a file on other ranks than the one that wrote it."""
    # Models below ZeRO 3, layers of pipelines, experts. The rest carries its rank in its name.
    return name.endswith("_states.pt") and "zero_pp_rank_" not in name


def holdings(folder: Path) -> list[Holding]:
    """Return what this node has in its `folder`; first finish what a dead run left to be named."""
    with contextlib.suppress(OSError, CheckpointError):
        finish_published(folder)
    try:
        entries = [entry for entry in list_checkpoints(folder) if entry.is_published]
    except CheckpointError:
        return []  # an empty disk
    found: dict[tuple[str, str], Holding] = {}
    for entry in entries:
        holding = _add(found, entry.path, entry.tag)
        if holding is not None:
            holding |= {"is_latest": entry.is_latest, "is_in_place": True}
            holding["ranks"] = _whole_ranks(entry.path, holding["attempt"])
    for path in sorted((folder / COPIES).glob("*/*")):
        if path.name.isdecimal() and not path.parent.name.startswith("."):
            holding = _add(found, path, path.parent.name)
            if holding is not None:
                holding["copies"] |= _whole_ranks(path, holding["attempt"])
    return list(found.values())


def _add(found: dict[tuple[str, str], Holding], path: Path, tag: str) -> Holding | None:
    record = read_record(path)
    if record is None or not isinstance(record.get("attempt"), str):
        return None
    known = {name: record[name] for name in ("attempt", "step", "time_s", "world_size")}
    empty = {"is_latest": False, "is_in_place": False, "ranks": {}, "copies": {}}
    return found.setdefault((tag, record["attempt"]), {"tag": tag, **known, **empty})


def _whole_ranks(folder: Path, attempt: str) -> dict[str, list[str]]:
    """Return the ranks of which `folder` has all files, in their sizes, of one attempt."""
    ranks = {}
    for path in sorted(folder.glob("manifest-*.json")):
        if not is_manifest_name(path.name):
            continue
        with contextlib.suppress(CheckpointError, OSError):
            manifest = read_manifest(path)
            sizes = ((folder / n).stat().st_size == s.size_bytes for n, s in manifest.files.items())
            if manifest.attempt == attempt and all(sizes):
                ranks[str(manifest.rank)] = [*filter(is_read_by_all, manifest.files)]
    return ranks


def put_together(nodes: Sequence[Iterable[Holding]]) -> list[Epoch]:
    """Return what all nodes have together, by checkpoint and attempt."""
    epochs: dict[tuple[str, str], Epoch] = {}
    for node, found in enumerate(nodes):
        for holding in found:
            known = {name: holding[name] for name in ("tag", "attempt", "step", "world_size")}
            fresh = {**known, "time_s": 0.0, "is_latest": False}
            fresh |= {"in_place": [], "holders": {}, "shared": {}}
            epoch = epochs.setdefault((holding["tag"], holding["attempt"]), fresh)
            epoch["time_s"] = max(epoch["time_s"], holding["time_s"])
            epoch["is_latest"] |= holding["is_latest"]
            epoch["in_place"] += [node] if holding["is_in_place"] else []
            for is_copy, ranks in ((False, holding["ranks"]), (True, holding["copies"])):
                for rank, shared in ranks.items():
                    epoch["holders"].setdefault(rank, []).append([node, is_copy])
                    epoch["shared"][rank] = shared
    return list(epochs.values())


def what_is_missing(epoch: Mapping[str, Any]) -> str | None:
    """Say which ranks' files are on no node, or return None."""
    missing = [str(r) for r in range(epoch["world_size"]) if str(r) not in epoch["holders"]]
    if not missing:
        return None
    ranks = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
    return f"no node has the files of rank {ranks}, neither in place nor as a copy"


def prune_copies(folder: Path, place: PurePath) -> None:
    """Remove copies of checkpoints that this level has no longer itself.

    Args:
        folder: The level's.
        place: The sub-folder that they lie in, where their tags have slashes; else "".
    """
    copies = folder / COPIES / place
    if not copies.is_dir():
        return
    for path in copies.iterdir():
        checkpoint = folder / place / path.name
        if not checkpoint.is_dir():
            remove(path, path)
        else:
            _remove_half_done(path, checkpoint)


def _remove_half_done(copies: Path, checkpoint: Path) -> None:
    """Remove what a dead run left of copies that were just being made."""
    for path in copies.glob(".*"):
        record = read_record(checkpoint)
        is_of_now = record is not None and str(record.get("attempt")) in path.name
        if not is_of_now:
            shutil.rmtree(path, ignore_errors=True)
