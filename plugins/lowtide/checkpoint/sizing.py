"""How large the buffers of a rank are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from lowtide.checkpoint.config import CHUNK_BYTES, MIB, CheckpointConfig

_SMALLEST_BYTES = 32 * MIB
_PINNED_BYTES = (16 * MIB, 256 * MIB)  # pinned pages are gone for everybody else
_PINNED_SHARE = 4
_SHARE = 8  # of the free memory of the node, for all of its ranks


class Buffers(NamedTuple):
    """Sizes of the buffer and of its pinned companion, of one rank."""

    host_bytes: int
    pinned_bytes: int


def choose_buffers(
    config: CheckpointConfig, state_bytes: int, decide: Callable[[str, Any], None]
) -> Buffers:
    """Return the sizes for about `state_bytes` of state; `decide` is told those that were auto."""
    host_bytes = config.host_buffer_bytes
    if not isinstance(host_bytes, int):
        host_bytes = choose_buffer_bytes(state_bytes)
        decide("checkpoint.host_buffer_bytes", host_bytes)
    if isinstance(config.pinned_buffer_bytes, int):
        return Buffers(host_bytes, config.pinned_buffer_bytes)
    least, most = _PINNED_BYTES
    pinned_bytes = max(least, min(most, host_bytes // _PINNED_SHARE))
    decide("checkpoint.pinned_buffer_bytes", pinned_bytes)
    return Buffers(host_bytes, pinned_bytes)


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
