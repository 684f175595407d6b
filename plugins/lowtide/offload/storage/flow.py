"""The stored pieces' way through one update: read ahead, updated, written back, all at once.

    read      pieces to buffers, in order, as long as a buffer is free
    host      takes them in the same order, as they arrive
    write     to their files, which frees the buffers; the last ones stay where they are. A piece
              that is to move is written to another path

The next update goes through them the other way round, so what stayed in buffers comes first there
and is neither written nor read in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.offload.storage.piece import State
from lowtide.offload.storage.tier import Tier
from lowtide.offload.storage.transfers import ignored


class Flow:
    """One update of the stored pieces; one at a time.

    Args:
        tier: Where they are.
        order: Their numbers, each once. Those that are in buffers come first in any case.
        carried: How many of the last ones stay in buffers.

    Raises:
        StorageError: an earlier failure has lost state.
    """

    def __init__(self, tier: Tier, order: Sequence[int], carried: int) -> None:
        self._tier = tier
        with tier.changed:
            tier.wait(lambda: not tier.moving)  # the last update may have been broken off
        held = [n for n in order if n in tier.held]
        self.order = [*held, *(n for n in order if n not in tier.held)]
        self._stays = set(self.order[max(0, len(self.order) - min(carried, self._most())) :])
        self._turn = 0  # of the next one to be updated ...
        self._ahead = 0  # ... and of the next one to be read
        self._taken: set[int] = set()  # being updated
        with tier.changed:
            self._read_ahead()

    def _most(self) -> int:
        return self._tier.layout.buffers

    @property
    def is_over(self) -> bool:
        """Whether all of them have been taken."""
        return self._turn >= len(self.order)

    def take(self, *, wait: bool) -> tuple[int, State] | None:
        """Return the next piece and its state to be updated in place.

        Args:
            wait: False: None where it has not arrived yet.

        Raises:
            StorageError: it cannot be read, or a path hangs.
        """
        tier, number = self._tier, self.order[self._turn]
        with tier.changed:
            if wait:
                tier.wait(lambda: self._has_arrived(number))
            elif tier.failure is not None:
                raise tier.failure
            if not self._has_arrived(number):
                return None
            self._turn += 1
            self._taken.add(number)
            return number, tier.newest(number)

    def _has_arrived(self, number: int) -> bool:
        return number in self._tier.held or self._tier.pieces[number].path is None

    def done(self, number: int) -> None:
        """Say that a piece which was taken has been updated."""
        tier = self._tier
        with tier.changed:
            self._taken.discard(number)
            if number not in tier.held:
                return  # it lives in memory
            tier.dirty.add(number)
        if number not in self._stays:
            tier.write(number, lambda: self._written(number), may_move=True)

    def _written(self, number: int) -> None:
        self._tier.release(number)
        self._read_ahead()

    def _read_ahead(self) -> None:
        tier = self._tier
        while self._ahead < len(self.order):
            number = self.order[self._ahead]
            if not self._has_arrived(number):
                if not tier.free:
                    return
                tier.read(number, _nothing)
            self._ahead += 1

    def stop(self) -> None:
        """Read no more, because the update has been broken off; lanes end what they have."""
        tier = self._tier
        with tier.changed:
            self._ahead = len(self.order)
            tier.dirty |= {n for n in self._taken if n in tier.held}  # updated, perhaps
            tier.noted = ignored

    def finish(self) -> None:
        """Wait until everything is where it belongs.

        Raises:
            StorageError: a path hangs.
        """
        tier = self._tier
        with tier.changed:
            tier.wait(lambda: tier.dirty <= self._stays)
            tier.noted = ignored


def _nothing() -> None:
    pass
