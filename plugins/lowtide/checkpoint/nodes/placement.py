"""Which ranks share a node, and with it the disks that only that node sees."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowtide.checkpoint.board import Board
from lowtide.core.errors import CheckpointError

# torchrun's number of the node, then Slurm's. Other launchers set neither: the host's name counts.
_NUMBERS = ("GROUP_RANK", "SLURM_NODEID")
_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes of a run, as one rank sees them.

    Attributes:
        rank: This rank.
        ranks: The ranks of each node, ascending; the first is the node's leader. Rank 0 leads one.
    """

    rank: int
    ranks: tuple[tuple[int, ...], ...]

    @property
    def number(self) -> int:
        """Number of this rank's node."""
        return next(n for n, ranks in enumerate(self.ranks) if self.rank in ranks)

    @property
    def mine(self) -> tuple[int, ...]:
        """The ranks of this node."""
        return self.ranks[self.number]

    @property
    def index(self) -> int:
        """Position of this rank among those of its node."""
        return self.mine.index(self.rank)

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes what its node has once."""
        return self.index == 0

    @property
    def partner(self) -> int:
        """The node that keeps copies of this one's files: the next in the ring."""
        return (self.number + 1) % len(self.ranks)

    def server(self, node: int) -> int:
        """Return the rank of `node` that this rank talks to: its ranks share the work."""
        return self.ranks[node][self.index % len(self.ranks[node])]


def find_nodes(board: Board, *, name: str | None = None) -> Nodes:
    """Agree who is on which node. Collective.

    Ranks of the same number on different hosts are on different nodes all the same: a launcher's
    variable may have come from the shell that started it.

    Args:
        board: Where the ranks agree.
        name: This node's name or number; by default what the launcher says, or the host's name.

    Raises:
        CheckpointError: a rank did not say where it is.
    """
    own = [own_name(os.environ) if name is None else name, socket.gethostname()]
    if board.rank != 0:
        board.post(f"nodes/{board.rank}", own)

    def collect() -> list[list[int]]:
        found: list[Any] = [own]
        for rank in range(1, board.world_size):
            told = board.wait(f"nodes/{rank}", timeout_s=_TIMEOUT_S)
            if told is None:
                raise CheckpointError(
                    f"rank {rank}: did not say on which node it is within {_TIMEOUT_S:.0f} s; see "
                    f"its log"
                )
            board.forget(f"nodes/{rank}")
            found.append(told)
        return _grouped(found)

    groups = board.share("nodes", collect, timeout_s=2 * _TIMEOUT_S)
    return Nodes(rank=board.rank, ranks=tuple(tuple(group) for group in groups))


def own_name(environment: Mapping[str, str]) -> str:
    """Return what this process's node is called: its number where a launcher gave it one."""
    for variable in _NUMBERS:
        if environment.get(variable, "").isdecimal():
            return environment[variable]
    return socket.gethostname()


def _grouped(places: list[list[str]]) -> list[list[int]]:
    """Return the ranks of each node, by the nodes' numbers, else by their lowest ranks."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, (name, host) in enumerate(places):
        groups.setdefault((name, host), []).append(rank)

    def order(item: tuple[tuple[str, str], list[int]]) -> tuple[int, int]:
        (name, _), ranks = item
        return (int(name) if name.isdecimal() else len(places), ranks[0])

    return [ranks for _, ranks in sorted(groups.items(), key=order)]
