"""Committed checkpoints made by hand: torch files, manifests, completion record."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from lowtide.checkpoint.store.manifest import FileSums, Manifest, write_manifest
from lowtide.core.restart import write_record

ATTEMPT = "0123456789abcdef"
CHUNK_BYTES = 4096


def sums_of(path: Path, chunk_bytes: int = CHUNK_BYTES) -> FileSums:
    """Return size and checksums of a file, by zlib."""
    raw = path.read_bytes()
    crc32 = tuple(zlib.crc32(raw[i : i + chunk_bytes]) for i in range(0, len(raw), chunk_bytes))
    return FileSums(size_bytes=len(raw), chunk_bytes=chunk_bytes, crc32=crc32)


def write_data(folder: Path, *, ranks: int = 2, numbers: int = 3000, seed: int = 0) -> list[Path]:
    """Write the files that DeepSpeed gives `ranks` ranks under ZeRO, and one in a sub-folder."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    states = {"mp_rank_00_model_states.pt": numbers}
    for rank in range(ranks):
        states[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = 2 * numbers
    states[f"layers/layer_{ranks}.pt"] = 10
    for name, count in states.items():
        (folder / name).parent.mkdir(exist_ok=True)
        state = {"x": torch.randn(count, generator=generator), "step": seed}
        torch.save(state, folder / name)
    return [folder / name for name in states]


def certify(
    folder: Path,
    paths: Sequence[Path],
    *,
    step: int,
    attempt: str = ATTEMPT,
    ranks: int = 2,
    tag: str | None = None,
) -> None:
    """Write manifests of `paths`, dealt out to ranks, and the record."""
    manifests, sizes = {}, {}
    for rank in range(ranks):
        files = {p.relative_to(folder).as_posix(): sums_of(p) for p in paths[rank::ranks]}
        manifest = Manifest(attempt=attempt, rank=rank, step=step, files=files)
        name, size_bytes, crc32 = write_manifest(folder, manifest)
        manifests[name] = {"size_bytes": size_bytes, "crc32": crc32}
        sizes |= {name: sums.size_bytes for name, sums in files.items()}
    write_record(
        folder, step=step, world_size=ranks, config={"telemetry": {}}, client_keys=["epoch"],
        files=sizes, attempt=attempt, tag=tag or folder.name, manifests=manifests,
    )  # fmt: skip


def make_checkpoint(
    save_dir: Path,
    step: int,
    *,
    name: str | None = None,
    ranks: int = 2,
    attempt: str = ATTEMPT,
    tag: str | None = None,
) -> Path:
    """Make a committed checkpoint and return its folder; `tag` by default is the last of `name`."""
    folder = save_dir / (name or f"global_step{step}")
    paths = write_data(folder, ranks=ranks, seed=step)
    certify(folder, paths, step=step, attempt=attempt, ranks=ranks, tag=tag)
    return folder


def make_stock(save_dir: Path, step: int) -> Path:
    """Make a checkpoint as stock DeepSpeed does, with ``latest``."""
    folder = save_dir / f"global_step{step}"
    write_data(folder, seed=step)
    (save_dir / "latest").write_text(folder.name)
    return folder


def make_part(
    save_dir: Path, step: int, *, host: str | None = None, pid: int | None = None, time_s: float = 0
) -> Path:
    """Make what a checkpoint leaves that was not finished; by default of this process."""
    folder = save_dir / f".global_step{step}.{ATTEMPT}.part"
    write_data(folder, seed=step)
    owner = {"host": host or os.uname().nodename, "pid": pid or os.getpid(), "time_s": time_s}
    (folder / "owner.json").write_text(json.dumps(owner))
    return folder
