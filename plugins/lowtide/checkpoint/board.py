"""How ranks tell each other about checkpoints, beside the training's own communication.

Messages go through the key-value store that torch.distributed keeps anyway, over a connection of
their own. Nothing here is a collective: a background thread may post and look at any time, and a
rank that dies leaves the others with a question that times out, not with a hang.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from lowtide.core.errors import CheckpointError

_POLL_S = 0.01
_PREFIX = "lowtide/checkpoint"


class Board:
    """A place where every rank can post values under names, and read the others'.

    Args:
        rank: This process's rank.
        world_size: Number of ranks.
        store: A torch.distributed store, or None for a single process.
        keeps: Kept alive as long as the board: the store's own server, on the rank that has it.
    """

    def __init__(
        self, *, rank: int = 0, world_size: int = 1, store: Any = None, keeps: Any = None
    ) -> None:
        self._keeps = keeps
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._local: dict[str, str] = {}
        self._is_closed = False
        # Two runs, or two engines of one run, must not read each other's posts.
        self.token: str = self.share("token", lambda: secrets.token_hex(4))

    def post(self, name: str, value: Any) -> None:
        """Set `name` to `value` (JSON) for all ranks."""
        text = json.dumps(value)
        if self._store is None:
            self._local[name] = text
        else:
            self._guarded(lambda: self._store.set(name, text))

    def look(self, name: str) -> Any:
        """Return the value of `name`, or None when nobody has posted it yet."""
        if self._store is None:
            return json.loads(self._local[name]) if name in self._local else None
        if not self._guarded(lambda: self._store.check([name])):
            return None
        return json.loads(self._guarded(lambda: self._store.get(name)))

    def forget(self, name: str) -> None:
        """Remove `name`, so that a long run does not fill the store."""
        if self._store is None:
            self._local.pop(name, None)
        else:
            self._guarded(lambda: self._store.delete_key(name))

    def wait(
        self, name: str, *, timeout_s: float, until: Callable[[], bool] = lambda: False
    ) -> Any:
        """Return the value of `name` once it is posted; None at the timeout or when `until` says.

        Looks instead of blocking inside the store: a blocked store client serves nobody else.
        """
        end_s = time.monotonic() + timeout_s
        pause_s = _POLL_S / 10
        while (value := self.look(name)) is None:
            if time.monotonic() >= end_s or until():
                return None
            time.sleep(pause_s)
            pause_s = min(_POLL_S, 2 * pause_s)
        return value

    def share(self, name: str, make: Callable[[], Any], *, timeout_s: float = 300.0) -> Any:
        """Return rank 0's ``make()`` on every rank. Each name may be shared once.

        Raises:
            CheckpointError: rank 0 did not answer in time.
        """
        if self.rank == 0:
            value = make()
            self.post(name, [value])
            return value
        found = self.wait(name, timeout_s=timeout_s)
        if found is None:
            raise CheckpointError(
                f'rank {self.rank}: rank 0 did not share "{name}" within {timeout_s:.0f} s; see '
                f"its log"
            )
        return found[0]

    def close(self) -> None:
        """Make every further call raise; threads that wait here end soon.

        A thread inside the store while the interpreter ends would abort the process.
        """
        self._is_closed = True

    def _guarded(self, call: Callable[[], Any]) -> Any:
        if self._is_closed:
            raise CheckpointError(f"rank {self.rank}: the run has ended")
        try:
            return call()
        except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
            raise CheckpointError(
                f"rank {self.rank}: the store of torch.distributed cannot be reached any more "
                f"({' '.join(str(error).split())[:200]}); its host, usually rank 0, has ended"
            ) from error


_boards = 0


def open_board() -> Board:
    """Return the board of this process's default process group. Collective where there is one."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Board()
    global _boards
    _boards += 1  # engines are made in the same order on all ranks
    # A connection of its own: the shared one is held by whoever waits in it.
    shared: Any = dist.distributed_c10d._get_default_store()
    own = shared.clone() if hasattr(shared, "clone") else shared
    prefixed = dist.PrefixStore(f"{_PREFIX}/{_boards}", own)
    # A script may destroy its process groups while the last checkpoint is on its way.
    return Board(
        rank=dist.get_rank(), world_size=dist.get_world_size(), store=prefixed, keeps=shared
    )
