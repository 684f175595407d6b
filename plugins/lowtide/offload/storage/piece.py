"""A stored piece, and the staging memory that it passes through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.offload.rates import STATE_BYTES
from lowtide.offload.storage.files import aligned
from lowtide.offload.storage.layout import Extent

State = tuple[Tensor, Tensor, Tensor]  # master, first moment, second moment


@dataclass
class Piece:
    """A stored part of a master.

    Attributes:
        extent: Which part.
        path: Number of the path; None: it had to stay in memory.
        offset: Where in that path's file.
        crc: CRC-32 of what is there; None: somebody else may have written there.
        goal: Path that it is written to the next time it is updated; None: `path`.
        is_torn: Whether its tensors may show another place than that, or several; only while a
            lane has it.
    """

    extent: Extent
    path: int | None
    offset: int = 0
    crc: int | None = None
    goal: int | None = None
    is_torn: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of master and moments."""
        return STATE_BYTES * self.extent.numel


class Buffer:
    """Staging memory for one piece at a time: master and moments one behind the other."""

    def __init__(self, nbytes: int) -> None:
        self.memory = aligned(nbytes)

    def state(self, numel: int) -> State:
        """Return master and moments of a piece of `numel` elements."""
        master, exp_avg, exp_avg_sq = (
            self.memory[4 * i * numel : 4 * (i + 1) * numel].view(torch.float32) for i in range(3)
        )
        return master, exp_avg, exp_avg_sq


def part_of(tensor: Tensor, extent: Extent) -> Tensor:
    """Return an extent of a flat tensor of its master."""
    return tensor.narrow(0, extent.begin, extent.numel)


def fill(target: Tensor, source: Tensor | None, extent: Extent) -> None:
    """Copy an extent of `source` to `target`; None: zeros."""
    if source is None:
        target.zero_()
    else:
        target.copy_(part_of(source.detach().view(-1), extent))
