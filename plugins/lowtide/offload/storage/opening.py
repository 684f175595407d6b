"""From settings to a tier: files, rates, layout."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from lowtide.offload.config import StorageConfig, StoragePath
from lowtide.offload.outlook import choose_buffers, cut
from lowtide.offload.storage.files import ScratchFile
from lowtide.offload.storage.lanes import run_watched
from lowtide.offload.storage.layout import Layout, fewest_buffers, lay_out
from lowtide.offload.storage.probe import measure_paths
from lowtide.offload.storage.tier import Tier
from lowtide.offload.subgroup import ALIGNMENT

logger = logging.getLogger("lowtide")

_MOST_TO_SIMULATE = 10_000  # pieces; of more, one buffer is next to nothing


def open_tier(
    config: StorageConfig,
    numels: Sequence[int],
    *,
    subgroup_params: int,
    rank: int,
    meet: Callable[[], object],
) -> Tier | None:
    """Reserve what does not fit in memory; None: all of it fits.

    Args:
        config: Settings.
        numels: Elements of each master.
        subgroup_params: Pieces have about this many at most.
        rank: Neighbours begin with different paths.
        meet: Returns when all ranks have called it: they measure at the same time.

    Raises:
        ConfigError: a folder cannot be used, or memory is too small for the buffers.
        StorageError: a path has too little room, or does not read back what was written.
    """
    meet()
    wanted = None if isinstance(config.buffers, str) else config.buffers

    def laid_out(buffers: int) -> Layout:
        return lay_out(
            numels, memory_bytes=config.host_memory_bytes, piece=subgroup_params,
            buffers=buffers, vector=ALIGNMENT,
        )  # fmt: skip

    layout = laid_out(wanted or fewest_buffers(len(config.paths)))
    files: list[ScratchFile] = []
    tier = None
    try:
        for each in config.folders:
            files.append(_open_file(each, config))
        # Also where all fits here: the other ranks measure what is left to them when all work.
        rates = measure_paths(
            files, [each.given for each in config.folders], stall_s=config.stall_s
        )
        if wanted is None and 0 < len(layout.stored) <= _MOST_TO_SIMULATE:
            pieces = cut(sum(numels), subgroup_params)
            memory_bytes = config.host_memory_bytes
            layout = laid_out(choose_buffers(pieces, rates, memory_bytes=memory_bytes))
        if layout.stored:
            tier = Tier(files, layout, rates, numels, stall_s=config.stall_s, first=rank)
    finally:
        if tier is None:
            _close(files)
    if tier is None:
        if rank == 0:
            logger.info("offload: all optimizer state fits in memory, storage is not used")
        return None
    _log(tier, rank)
    return tier


def _log(tier: Tier, rank: int) -> None:
    for file, rate, nbytes in zip(tier.files, tier.rates, tier.stored_bytes(), strict=True):
        logger.info(
            "offload: rank %d: %.2f GB of optimizer state in %s, %s; reads %.2f, writes %.2f GB/s",
            rank, nbytes / 1e9, file.folder,
            "direct" if file.is_direct else "through the page cache",
            rate.read_bytes_per_s / 1e9, rate.write_bytes_per_s / 1e9,
        )  # fmt: skip


def _close(files: Sequence[ScratchFile]) -> None:
    """Close files; a path that hangs may keep its thread, and not the one that reports it."""
    for file in files:
        closing = threading.Thread(target=file.close, daemon=True)
        closing.start()
        closing.join(timeout=1.0)


def _open_file(path: StoragePath, config: StorageConfig) -> ScratchFile:
    folder = Path(path.path).expanduser()
    file = run_watched(
        str(folder),
        lambda _progress: ScratchFile(folder, direct=config.direct_io),
        stall_s=config.stall_s,
    )
    kind = file_system_of(file.descriptor)
    if kind in ("tmpfs", "ramfs"):
        logger.warning(
            "offload: %s is a %s, which is host memory: state that is stored there takes it all "
            "the same, and host_memory_bytes does not count it", folder, kind,
        )  # fmt: skip
    return file


def file_system_of(descriptor: int) -> str:
    """Return the kind of file system that an open file is on, "" where that is not told."""
    device = os.fstat(descriptor).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, behind = line.partition(" - ")  # how many fields come before differs
        if before.split()[2] == wanted:
            return behind.split()[0]
    return ""
