"""From settings to a tier: files, rates, layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lowtide.offload.config import StorageConfig
from lowtide.offload.storage.files import ScratchFile
from lowtide.offload.storage.layout import lay_out
from lowtide.offload.storage.probe import measure_paths
from lowtide.offload.storage.tier import Tier
from lowtide.offload.subgroup import ALIGNMENT

logger = logging.getLogger("lowtide")


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
    layout = lay_out(
        numels, memory_bytes=config.host_memory_bytes, piece=subgroup_params,
        buffers=config.buffer_count, vector=ALIGNMENT,
    )  # fmt: skip
    folders = config.folders
    files = [ScratchFile(each.path, direct=config.direct_io) for each in folders]
    # Also where all fits here: the other ranks measure what is left to them when all work.
    rates = measure_paths(files, [each.given for each in folders])
    if not layout.stored:
        for each in files:
            each.close()
        if rank == 0:
            logger.info("offload: all optimizer state fits in memory, storage is not used")
        return None
    tier = Tier(files, layout, rates, numels, stall_s=config.stall_s, first=rank)
    for file, rate, nbytes in zip(files, rates, tier.stored_bytes(), strict=True):
        logger.info(
            "offload: rank %d: %.2f GB of optimizer state in %s, %s; reads %.2f, writes %.2f GB/s",
            rank, nbytes / 1e9, file.folder,
            "direct" if file.is_direct else "through the page cache",
            rate.read_bytes_per_s / 1e9, rate.write_bytes_per_s / 1e9,
        )  # fmt: skip
    return tier
