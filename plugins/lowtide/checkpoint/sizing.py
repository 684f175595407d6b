"""How large the buffer of a rank is."""

from __future__ import annotations

import os

from lowtide.checkpoint.config import CHUNK_BYTES, MIB

_SMALLEST_BYTES = 32 * MIB
_SHARE = 8  # of the free memory of the node, for all of its ranks


def choose_buffer_bytes(state_bytes: int) -> int:
    """Return the size for `state_bytes` of state: all of it, at most a share of what is free."""
    wanted = max(min(state_bytes, memory_share_bytes(_SHARE)), _SMALLEST_BYTES)
    return -(-wanted // CHUNK_BYTES) * CHUNK_BYTES


def memory_share_bytes(divisor: int) -> int:
    """Return this rank's part of a share, 1 / `divisor`, of the free memory of its node."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return _available_bytes() // divisor // ranks


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
