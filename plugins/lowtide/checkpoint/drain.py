"""Brings committed checkpoints from a faster level of storage to a slower one."""

from __future__ import annotations

import logging
import mmap
import time
from pathlib import Path

import numpy as np

from lowtide.checkpoint.compact.copies import compact, is_compact
from lowtide.checkpoint.config import CHUNK_BYTES, MIB, CheckpointConfig
from lowtide.checkpoint.nodes.peers import Peers
from lowtide.checkpoint.saving import Level, Saving
from lowtide.checkpoint.store.catalog import list_checkpoints
from lowtide.checkpoint.store.commit import Committer, wait_durable
from lowtide.checkpoint.store.folders import make_part_folder
from lowtide.checkpoint.store.manifest import FileSums, manifest_name, read_manifest
from lowtide.checkpoint.writer import Writer, open_writer
from lowtide.checkpoint.writer.plan import FilePlan, FileResult
from lowtide.core.errors import CheckpointError

logger = logging.getLogger("lowtide")

_BUFFER_BYTES = 16 * MIB


class Drain:
    """Copies this rank's files down, level by level, checking them on the way.

    Args:
        config: The plugin's settings.
        committer: Where ranks agree that a copy is complete.
        peers: The way to the other nodes, where there are levels of which each has its own.
    """

    def __init__(
        self, config: CheckpointConfig, committer: Committer, peers: Peers | None = None
    ) -> None:
        self._config = config
        self._committer = committer
        self._peers = peers
        self._writers: dict[int, Writer] = {}

    def agree(self, saving: Saving, level: Level, *, is_superseded: bool) -> bool:
        """Tell whether the ranks are to bring `saving` to `level`; else note that it is left out.

        Args:
            saving: A checkpoint that is committed on a level above.
            level: Where it is to be, too.
            is_superseded: Rank 0's wish to leave it out, because a newer one is waiting already.

        Raises:
            CheckpointError: the ranks cannot agree.
        """
        is_wanted = self._committer.agree(saving, level, go=not is_superseded)
        if not is_wanted:
            saving.superseded.append(str(level.folder))
        return is_wanted

    def bring(self, saving: Saving, above: Level, level: Level) -> None:
        """Copy `saving` from `above` to `level` and commit it there, as was agreed.

        Args:
            saving: A checkpoint that is committed on `above`.
            above: Where it is.
            level: Where it is to be, too.

        Raises:
            CheckpointError: it cannot be read, is damaged, or cannot be committed.
        """
        results: list[FileResult] = []
        try:
            results = self._copy(saving, above, level)
            vote = self._committer.vote(saving, level, results)
        except (CheckpointError, OSError) as error:
            vote = {"error": str(error)}
        self._committer.decide(saving, level, vote)

    def replicate(self, saving: Saving, level: Level, *, is_superseded: bool) -> bool:
        """Copy this rank's files on `level` to the next node; what fails is only told.

        Returns:
            Whether all ranks' files have their copies now.
        """
        if self._peers is None:
            return False
        saving.is_replicated = False
        if not self._committer.agree(saving, level, go=not is_superseded, what="copy"):
            return False
        error = None
        try:
            self._peers.send_copy(level, tag=saving.tag, attempt=saving.attempt)
        except (CheckpointError, OSError) as problem:
            error = f"{problem or type(problem).__name__}"
        saving.replica_error = self._committer.report_copies(saving, level, error)
        saving.is_replicated = saving.replica_error is None
        if saving.replica_error is not None and self._committer.rank == 0:
            logger.warning(
                "checkpoint %s in %s: is complete, but not copied to the next node: %s",
                saving.tag,
                level.folder,
                saving.replica_error,
            )
        return saving.is_replicated

    def close(self) -> None:
        """End the writers' threads."""
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.close(timeout_s=1.0)

    def _copy(self, saving: Saving, above: Level, level: Level) -> list[FileResult]:
        source, part = saving.final(above), saving.part(level)
        rank = self._committer.rank
        manifest = read_manifest(source / manifest_name(rank))
        if manifest.attempt != saving.attempt:
            raise CheckpointError(
                f"{source}: was overwritten by a newer checkpoint before it could be copied to "
                f"{level.folder}; give each checkpoint a tag of its own"
            )
        make_part_folder(part, is_owner=self._committer.leads(level))
        if level.compact is not None:
            pace = _Pace(level.bytes_per_s)
            base = _newest_compact(saving.final(level))
            return compact(
                source, part, manifest=manifest, config=level.compact, base=base, pace=pace.wait
            )
        plans = []
        for name, sums in manifest.files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            plans.append(_plan_copy(source / name, part / name, sums))
        ticket = self._writer(level).submit(plans)
        stall_s = self._config.stall_timeout_s + level.pace_s
        results = wait_durable(ticket, what=f"{saving.tag} to {level.folder}", stall_s=stall_s)
        for result, (name, sums) in zip(results, manifest.files.items(), strict=True):
            if tuple(result.crc32) != sums.crc32:
                raise CheckpointError(
                    f"{source / name}: has changed on its disk since it was written there, so it "
                    f"is not copied to {level.folder}; check that disk"
                )
        return results

    def _writer(self, level: Level) -> Writer:
        if level.number not in self._writers:
            self._writers[level.number] = open_writer(
                buffer_bytes=_BUFFER_BYTES, chunk_bytes=CHUNK_BYTES, io=self._config.io,
                bytes_per_s=level.bytes_per_s,
            )  # fmt: skip
        return self._writers[level.number]


class _Pace:
    """Holds a loop back to a rate."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._begin_s = time.monotonic()
        self._written_bytes = 0

    def wait(self, written_bytes: int) -> None:
        """Sleep until `written_bytes` more are allowed."""
        self._written_bytes += written_bytes
        if self._bytes_per_s is not None:
            due_s = self._begin_s + self._written_bytes / self._bytes_per_s
            time.sleep(max(0.0, due_s - time.monotonic()))


def _newest_compact(final: Path) -> Path | None:
    """Return what a new checkpoint `final` may refer to, beside it: not the one it replaces."""
    entries = list_checkpoints(final.parent) if final.parent.is_dir() else []
    complete = (e.path for e in entries if e.state == "complete" and e.is_published)
    return next((path for path in complete if path != final and is_compact(path)), None)


def _plan_copy(source: Path, target: Path, sums: FileSums) -> FilePlan:
    """Plan a copy whose live memory is the mapped source."""
    with open(source, "rb") as file:
        size_bytes = file.seek(0, 2)
        if size_bytes != sums.size_bytes:
            raise CheckpointError(
                f"{source}: has {size_bytes} bytes, {sums.size_bytes} were written; check its disk"
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size_bytes else b""
    pages = np.frombuffer(mapped, np.uint8)
    is_full = 1 if size_bytes else 0
    return FilePlan(
        path=target,
        size_bytes=size_bytes,
        offsets=np.zeros(is_full, np.uint64),
        lengths=np.full(is_full, size_bytes, np.uint64),
        addresses=np.full(is_full, pages.ctypes.data, np.uint64),
        entries=np.zeros(is_full, np.int32),
        literals=np.zeros(0, np.uint8),
        patches=np.zeros((0, 2), np.uint64),
        owners=[pages],
    )
