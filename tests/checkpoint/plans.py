"""A slow, obvious writer for `FilePlan`, as the oracle of the layouts."""

from __future__ import annotations

import ctypes
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.checkpoint.files.torch_file import lay_out
from lowtide.checkpoint.writer.plan import LITERAL, FilePlan


def write_plan(plan: FilePlan, *, is_sparse: bool = False) -> None:
    """Write the file of `plan`; with `is_sparse` only its literals, holes for everything else."""
    sums: dict[int, int] = {}
    pieces = list(
        zip(
            plan.offsets.tolist(), plan.lengths.tolist(), plan.addresses.tolist(),
            plan.entries.tolist(), strict=True,
        )
    )  # fmt: skip
    end = 0
    for offset, length, address, entry in pieces:
        assert offset == end, "the pieces leave a gap or overlap"
        end += length
        if entry != LITERAL and not is_sparse:
            sums[entry] = zlib.crc32(ctypes.string_at(address, length), sums.get(entry, 0))
    assert end == plan.size_bytes
    for position, entry in plan.patches.tolist():
        if not is_sparse:
            crc = np.frombuffer(sums[entry].to_bytes(4, "little"), np.uint8)
            plan.literals[position : position + 4] = crc
    with open(plan.path, "wb") as file:
        file.truncate(plan.size_bytes)
        for offset, length, address, entry in pieces:
            if entry == LITERAL or not is_sparse:
                file.seek(offset)
                file.write(ctypes.string_at(address, length))


def save(state: Any, path: Path, *, is_stable: bool = True) -> FilePlan:
    """Lay out `state` and write it."""
    laid_out = lay_out(state, path, is_stable=lambda _tensor: is_stable)
    write_plan(laid_out.plan)
    return laid_out.plan
