"""Runs on several nodes, all in this process, and what their folders must hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowtide.checkpoint import list_checkpoints
from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.nodes.placement import find_nodes
from lowtide.checkpoint.saver import Saver
from lowtide.checkpoint.saving import Saving, Stage
from lowtide.checkpoint.store.finding import Finder, Found
from tests.checkpoint.ranks import file_name, make_boards, make_config, on_all, save, state_of

EVER = 30.0
MODEL = "mp_rank_00_model_states.pt"


class Run:
    """One run on several nodes, all in this process; `shared` is the folder that scripts name."""

    def __init__(self, root: Path, savers: list[Saver]) -> None:
        self.shared = root / "shared"
        self.savers = savers
        self._finders = [Finder(s.board, s.config.verify, s.peers) for s in savers]

    def save(self, step: int, **options: Any) -> list[Saving]:
        savings = save(self.savers, self.shared, step, **options)
        on_all([lambda s=saver: s.wait(Stage.DRAINED, EVER) for saver in self.savers])  # type: ignore[misc]
        return savings

    def find(self, tag: str | None = None) -> list[Found]:
        return on_all(
            [
                lambda s=saver, f=finder: f.find(s.router.places(self.shared), tag, parts=None)  # type: ignore[misc]
                for saver, finder in zip(self.savers, self._finders, strict=True)
            ]
        )


@contextlib.contextmanager
def start(
    root: Path, nodes: int = 2, *, per_node: int = 2, is_swapped: bool = False, **settings: Any
) -> Iterator[Run]:
    """Start `nodes` x `per_node` ranks; only every 100th checkpoint comes to the shared level."""
    own = {"path": str(root / "node{node}"), "scope": "node", "copies": 1}
    own |= {key: settings.pop(key) for key in ("bytes_per_s",) if key in settings}
    tiers = [own, {"path": str(root / "shared"), "every": settings.pop("every", 100)}]
    config = make_config(tiers=tiers, **settings)

    def make(board: Any) -> Saver:
        number = board.rank // per_node
        name = str(nodes - 1 - number if is_swapped else number)
        return Saver(config, board, buffer_bytes=16 * MIB, nodes=find_nodes(board, name=name))

    made = on_all([lambda b=board: make(b) for board in make_boards(nodes * per_node)])  # type: ignore[misc]
    try:
        yield Run(root, made)
    finally:
        on_all([lambda s=saver: s.close(5.0) for saver in made])  # type: ignore[misc]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def assert_holds(checkpoint: Path, step: int, ranks: tuple[int, ...]) -> None:
    for rank in ranks:
        loaded = torch.load(checkpoint / file_name(rank), weights_only=False)
        assert torch.equal(loaded["weights"], state_of(rank, step)["weights"])
        assert (loaded["rank"], loaded["step"]) == (rank, step)


def assert_found(run: Run, root: Path, tag: str, *, per_node: int = 2) -> list[str]:
    """Fail unless every rank is to load its own node's `tag`; return what was skipped."""
    found = run.find()
    for saver, each in zip(run.savers, found, strict=True):
        assert (each.folder, each.name) == (root / f"node{saver.board.rank // per_node}", tag)
        named = str(each.skipped).replace(str(each.folder), str(found[0].folder))
        assert named == str(found[0].skipped).replace(str(each.folder), str(found[0].folder))
    return found[0].skipped


def nobody_has(ranks: str) -> str:
    return f"no node has the files of rank {ranks}, neither in place nor as a copy"


def tags(folder: Path) -> list[str]:
    return sorted(entry.tag for entry in list_checkpoints(folder))
