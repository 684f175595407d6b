"""One piece of optimizer state: the unit that is moved and updated as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lowtide.offload.gradients import Keeper

ALIGNMENT = 16  # elements; DeepSpeed's vector width. Cuts elsewhere would change its rounding.


@dataclass(eq=False)
class Subgroup:
    """Contiguous elements of one flat master, on the host.

    Attributes:
        key: Name in `StateAuthority` and in traces, ``"subgroup/3"`` or ``"subgroup/3/1"``.
        group: Number of the optimizer's parameter group.
        flat: Number of the host's flat master that this is a part of.
        begin: First element in it, a multiple of `ALIGNMENT`.
        master: Float32, shape (numel,).
        exp_avg: First moment, as `master`.
        exp_avg_sq: Second moment, as `master`.
        weights: Where the rounded parameters go; shape (numel,), on the host or the device. None
            where the host rounds them by itself.
        gradient_bytes: Bytes per parameter of its gradient, as a rule: 2 or 4.
        stored: Its number in the storage tier; None: its state is in memory. The tensors of a
            stored one are maps of its file.
        may_travel: Whether the device can copy its state at full speed.
        keeper: Lets its gradients accumulate on the device while it is resident, if that can be.
    """

    key: str
    group: int
    flat: int
    begin: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weights: Tensor | None
    gradient_bytes: int = 2
    stored: int | None = None
    may_travel: bool = True
    keeper: Keeper | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.master.numel()

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what an update changes: master, first moment, second moment."""
        return self.master, self.exp_avg, self.exp_avg_sq

    def overwritten(self) -> Iterator[Tensor]:
        """Yield all that an update overwrites, wherever it is."""
        yield from self.state()
        if self.weights is not None:
            yield self.weights

    def part_of(self, flat: Tensor) -> Tensor:
        """Return this subgroup's part of another flat tensor of the same layout."""
        return flat.narrow(0, self.begin, self.numel)


def cuts(numel: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, count) of nearly equal pieces of `numel` elements, at most about `limit` each.

    All begin at multiples of `ALIGNMENT`, so an elementwise update of the pieces rounds as one of
    the whole does.
    """
    pieces = max(1, -(-numel // max(limit, ALIGNMENT)))
    size = -(-numel // pieces)
    size = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    for begin in range(0, numel, size):
        yield begin, min(size, numel - begin)
