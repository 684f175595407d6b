"""Bringing back what this node lacks of a checkpoint, from the nodes that have it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Literal

from lowtide.checkpoint.nodes.epochs import Epoch
from lowtide.checkpoint.nodes.peers import Peers
from lowtide.checkpoint.nodes.placement import Nodes
from lowtide.checkpoint.saving import Level
from lowtide.checkpoint.store.folders import (
    LATEST_FILE,
    make_part_folder,
    part_folder,
    publish,
    write_latest,
)
from lowtide.checkpoint.store.manifest import manifest_name, read_manifest
from lowtide.checkpoint.store.scan import Run, make_runs, scan_all
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import RECORD_FILE, replace_synced

logger = logging.getLogger("lowtide")


class Restorer:
    """Makes a node's folder of one checkpoint whole; its ranks share the work.

    Args:
        peers: The way to the other nodes.
        level: The level.
        epoch: The checkpoint, and who has which part of it.
        mode: How much is read of what is there already.
    """

    def __init__(
        self, peers: Peers, level: Level, epoch: Epoch, mode: Literal["full", "fast", "off"]
    ) -> None:
        self._peers = peers
        self._level = level
        self._epoch = epoch
        self._mode = mode
        self._nodes: Nodes = peers.nodes
        self._final = level.folder / epoch["tag"]
        self._is_there = self._nodes.number in epoch["in_place"]
        part = part_folder(self._final, epoch["attempt"])
        self._folder = self._final if self._is_there else part
        self._record: bytearray | None = None

    @property
    def is_whole_everywhere(self) -> bool:
        """Whether every node has the checkpoint's folder already."""
        return len(self._epoch["in_place"]) == len(self._nodes.ranks)

    def bring_back(self) -> str | None:
        """Check this rank's share of the files and fetch what is missing or damaged.

        Returns:
            What cannot be brought back, or None.
        """
        return self._told(self._bring_all)

    def give_name(self) -> str | None:
        """Give a folder that was put together its name, once all ranks are done. Says what fails.

        Done by the node's leader; the record, which makes it complete, comes last.
        """
        return self._told(self._give_name)

    def discard(self) -> None:
        """Remove what was put together, because another node cannot bring back its part."""
        if not self._is_there and self._nodes.is_leader:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _told(self, work: Callable[[], str | None]) -> str | None:
        try:
            return work()
        except (OSError, CheckpointError) as error:
            return f"rank {self._nodes.rank} on node {self._nodes.number}: {error}"

    def _bring_all(self) -> str | None:
        if not self._is_there:
            make_part_folder(self._folder, is_owner=self._nodes.is_leader)
        for rank, names in self._share():
            problem = self._bring(rank, names)
            if problem is not None:
                return f"rank {self._nodes.rank} on node {self._nodes.number}: {problem}"
        return None

    def _share(self) -> list[tuple[int, Sequence[str] | None]]:
        """Return of whom this rank looks after all files (None), or which."""
        nodes, saved = self._nodes, int(self._epoch["world_size"])
        # Another number of ranks loads parts of everything.
        is_same = saved == sum(map(len, nodes.ranks))
        own = list(nodes.mine) if is_same else list(range(saved))
        wanted: list[tuple[int, Sequence[str] | None]] = [(rank, None) for rank in own]
        for rank, names in self._epoch["shared"].items():
            if names and int(rank) not in own:
                wanted.append((int(rank), names))
        return wanted[nodes.index :: len(nodes.mine)]

    def _bring(self, rank: int, names: Sequence[str] | None) -> str | None:
        damage = self._damage(rank, names)
        return None if damage is None else self._fetch(rank, names, damage)

    def _fetch(self, rank: int, names: Sequence[str] | None, problem: str) -> str | None:
        """Fetch files of `rank` from the first who has them whole; else return all problems."""
        for node, is_copy in self._epoch["holders"][str(rank)]:
            if node == self._nodes.number and not is_copy:
                continue  # these are the damaged ones, if they are in their place at all
            try:
                record = self._peers.fetch(
                    self._level,
                    (node, is_copy),
                    self._folder,
                    tag=self._epoch["tag"],
                    attempt=self._epoch["attempt"],
                    rank=rank,
                    names=names,
                )
            except (CheckpointError, OSError) as error:
                problem = f"{problem}; not to be had from node {node}: {error}"
                continue
            # The first that this rank looks after is one of its node, where it is the leader.
            self._record = self._record or record
            source = "a copy" if is_copy else "the files"
            logger.info("%s: rank %d from %s on node %d", self._final, rank, source, node)
            return None
        return problem

    def _damage(self, rank: int, names: Sequence[str] | None) -> str | None:
        """Say what is wrong with what is there of `rank`, or return None."""
        try:
            manifest = read_manifest(self._folder / manifest_name(rank))
        except CheckpointError as error:
            return str(error)
        if manifest.attempt != self._epoch["attempt"]:
            return f"{self._folder}: has the files of another attempt ({manifest.attempt})"
        files = [(n, s) for n, s in manifest.files.items() if names is None or n in names]
        if self._mode == "off":
            runs = [
                Run(path=self._folder / name, name=name, sums=sums, chunks=())
                for name, sums in files
            ]
        else:
            is_sample = self._mode == "fast"
            runs = make_runs(self._folder, files, is_sample=is_sample, part=(0, 1))
        damage, _ = scan_all(runs, threads=None, on_progress=None)
        return str(damage[0]) if damage else None

    def _give_name(self) -> str | None:
        if self._is_there or not self._nodes.is_leader:
            return None
        if self._record is None:  # all files were left here by an earlier try that ended too soon
            rank, _ = self._share()[0]
            problem = self._fetch(rank, [], "it has no record")
            if problem is not None or self._record is None:
                return f"{self._folder}: {problem}"
        replace_synced(self._folder / RECORD_FILE, self._record)
        publish(self._folder, self._final)
        if self._epoch["is_latest"] and not (self._level.folder / LATEST_FILE).exists():
            write_latest(self._level.folder, self._epoch["tag"])
        return None
