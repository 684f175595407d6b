"""Files of ranks from node to node: copies for the next node, and what a node lacks back again.

Every rank serves, in threads of its own, what its node has, and takes copies. Who may ask is who
knows the token, which the ranks share over the board.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lowtide.checkpoint.board import Board
from lowtide.checkpoint.nodes.epochs import COPIES, copy_folder
from lowtide.checkpoint.nodes.placement import Nodes
from lowtide.checkpoint.nodes.wire import GREETING_S, Wire, connect, own_hosts
from lowtide.checkpoint.saving import Level
from lowtide.checkpoint.store.folders import part_folder, publish
from lowtide.checkpoint.store.manifest import Manifest, manifest_name, parse_manifest
from lowtide.core.errors import CheckpointError
from lowtide.core.restart import RECORD_FILE, replace_synced, sync_folder

_MOST_CALLERS = 64
_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_RETRY_S = 0.1


class Peers:
    """This rank's server and its way to the others'. Collective to make.

    Args:
        board: Where addresses and the token are shared.
        nodes: Who is on which node.
        levels: The levels of which each node has its own.
        stall_s: Longest wait for the other side.
    """

    def __init__(
        self, board: Board, nodes: Nodes, levels: Sequence[Level], *, stall_s: float
    ) -> None:
        self.nodes = nodes
        self._board = board
        self._levels = {level.number: level for level in levels}
        # Whoever sends at an allowed rate says nothing for as long as a chunk takes.
        self._stall_s = stall_s + max((level.pace_s for level in levels), default=0.0)
        self._token: str = board.share("peers/token", lambda: secrets.token_hex(16))
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._callers: dict[threading.Thread, Wire] = {}
        self._listener = _listen()
        self.port: int = self._listener.getsockname()[1]
        board.post(f"peers/{board.rank}", {"hosts": own_hosts(), "port": self.port})
        self._thread = threading.Thread(
            target=self._accept, name="lowtide-checkpoint-peers", daemon=True
        )
        self._thread.start()

    def level_of(self, folder: Path) -> Level | None:
        """Return the level of this node at `folder`, or None where all ranks see one folder."""
        return next((each for each in self._levels.values() if each.folder == folder), None)

    def close(self) -> None:
        """End the server and every conversation. Idempotent."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept()
        self._thread.join(1.0)
        self._listener.close()
        with self._lock:
            callers = dict(self._callers)
        for thread, wire in callers.items():
            wire.end()
            thread.join(1.0)

    # -- asking -------------------------------------------------------------------------------

    def send_copy(self, level: Level, *, tag: str, attempt: str) -> None:
        """Bring a copy of this rank's files to the next node; return when it is synced there.

        Raises:
            CheckpointError: they cannot be read, or the next node cannot take them.
            OSError: they cannot be read.
        """
        folder, rank = level.folder / tag, self.nodes.rank
        record, raw, manifest = _read(folder, rank, attempt)
        request = {"do": "take", "level": level.number, "tag": tag, "attempt": attempt}
        pace = _Pace(level.bytes_per_s, self._closed)
        with self._call(self.nodes.partner) as wire:
            try:
                wire.tell({**request, "rank": rank})
                wire.send(record)
                wire.send(raw)
                for name, sums in manifest.files.items():
                    wire.send_file(folder / name, sums, sent=pace)
            except ConnectionError:
                wire.hear()  # it may have said why it hung up
                raise
            wire.hear()

    def fetch(
        self,
        level: Level,
        holder: tuple[int, bool],
        target: Path,
        *,
        tag: str,
        attempt: str,
        rank: int,
        names: Sequence[str] | None,
    ) -> bytearray:
        """Fetch files of `rank`, and its manifest, into the folder `target`.

        Args:
            level: The level.
            holder: A node that has them, and whether as a copy.
            target: Where they are to be.
            tag: Name of the checkpoint.
            attempt: Which try to write it.
            rank: Whose files.
            names: Which of them, or None for all.

        Returns:
            The record that certifies them, as it stands in its file.

        Raises:
            CheckpointError: they are not there any more, or damaged.
            OSError: they cannot be sent or written.
        """
        node, is_copy = holder
        request = {"do": "give", "level": level.number, "tag": tag, "attempt": attempt}
        with self._call(node) as wire:
            wire.tell({**request, "rank": rank, "is_copy": is_copy, "names": names})
            wire.hear()
            record, raw = wire.receive(), wire.receive()
            manifest = _parsed(bytes(raw), target, rank, attempt)
            for name in manifest.files if names is None else names:
                wire.receive_file(target / name, manifest.files[name])
        replace_synced(target / manifest_name(rank), raw)
        return record

    def _call(self, node: int) -> Wire:
        rank = self.nodes.server(node)
        address = self._board.wait(f"peers/{rank}", timeout_s=self._stall_s)
        if address is None:
            raise CheckpointError(f"rank {rank} on node {node}: did not say where it can be called")
        try:
            return connect(
                address["hosts"], address["port"], token=self._token, timeout_s=self._stall_s
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"rank {rank} on node {node}: cannot be called ({error}); allow TCP between the "
                f'nodes, or set "copies" to 0'
            ) from error

    # -- answering ----------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                link, _ = self._listener.accept()
            except OSError:  # closed, or for the moment too many files are open
                self._closed.wait(_RETRY_S)
                continue
            wire = Wire(link, timeout_s=min(GREETING_S, self._stall_s))
            thread = threading.Thread(
                target=self._serve, args=(wire,), name="lowtide-checkpoint-peer", daemon=True
            )
            with self._lock:
                if self._closed.is_set() or len(self._callers) >= _MOST_CALLERS:
                    wire.close()
                    continue
                self._callers[thread] = wire
                thread.start()

    def _serve(self, wire: Wire) -> None:
        # What goes wrong here is told to the caller, who knows what it means. One that has gone, or
        # was never one of us, needs no answer.
        with contextlib.suppress(OSError, CheckpointError), wire:
            if wire.welcome(self._token):
                wire.allow(self._stall_s)
                self._answer(wire)
        with self._lock:
            del self._callers[threading.current_thread()]

    def _answer(self, wire: Wire) -> None:
        try:
            request = wire.hear()
            work: Callable[[Wire, dict[str, Any]], None]
            work = {"take": self._take, "give": self._give}[request["do"]]
            work(wire, request)
        except (OSError, CheckpointError) as error:
            wire.tell({"error": f"node {self.nodes.number}: {error or type(error).__name__}"})
        except (KeyError, TypeError, ValueError) as error:
            wire.tell({"error": f"node {self.nodes.number}: cannot read the request ({error!r})"})

    def _take(self, wire: Wire, request: dict[str, Any]) -> None:
        """Take a copy of another node's rank."""
        folder, tag, attempt, rank = self._asked(request)
        record, raw = wire.receive(), wire.receive()
        final = copy_folder(folder, tag, rank)
        part = part_folder(final, attempt)
        shutil.rmtree(part, ignore_errors=True)
        try:
            manifest = _parsed(bytes(raw), part, rank, attempt)
            part.mkdir(parents=True)
            for name, sums in manifest.files.items():
                wire.receive_file(part / name, sums)
            replace_synced(part / RECORD_FILE, record)
            replace_synced(part / manifest_name(rank), raw)
            publish(part, final)
            for parent in (folder / COPIES, folder):
                sync_folder(parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        wire.tell({"is_durable": True})

    def _give(self, wire: Wire, request: dict[str, Any]) -> None:
        """Give files of a rank that this node has, in place or as a copy."""
        folder, tag, attempt, rank = self._asked(request)
        place = copy_folder(folder, tag, rank) if request["is_copy"] else folder / tag
        record, raw, manifest = _read(place, rank, attempt)
        wanted = manifest.files if request["names"] is None else request["names"]
        files = [(name, manifest.files[name]) for name in wanted]
        wire.tell({"files": len(files)})
        wire.send(record)
        wire.send(raw)
        for name, sums in files:
            wire.send_file(place / name, sums, sent=lambda _: None)

    def _asked(self, request: dict[str, Any]) -> tuple[Path, str, str, int]:
        tag, attempt, rank = str(request["tag"]), str(request["attempt"]), int(request["rank"])
        place = PurePosixPath(tag)
        is_below = bool(place.parts) and ".." not in place.parts and not place.is_absolute()
        if not is_below or _ATTEMPT.fullmatch(attempt) is None or rank < 0:
            raise ValueError(f"tag {tag!r}, attempt {attempt!r}, rank {rank}")
        return self._levels[request["level"]].folder, tag, attempt, rank


class _Pace:
    """Called with bytes that were sent; waits so that they are not sent faster than allowed."""

    def __init__(self, bytes_per_s: float | None, closed: threading.Event) -> None:
        self._bytes_per_s = bytes_per_s
        self._closed = closed
        self._begin_s = time.monotonic()
        self._sent_bytes = 0

    def __call__(self, size_bytes: int) -> None:
        self._sent_bytes += size_bytes
        if self._bytes_per_s is not None:
            due_s = self._begin_s + self._sent_bytes / self._bytes_per_s
            self._closed.wait(max(0.0, due_s - time.monotonic()))


def _read(folder: Path, rank: int, attempt: str) -> tuple[bytes, bytes, Manifest]:
    """Return record and manifest of `rank` in `folder` as they stand there, and the latter read."""
    record, raw = (folder / RECORD_FILE).read_bytes(), (folder / manifest_name(rank)).read_bytes()
    return record, raw, _parsed(raw, folder, rank, attempt)


def _parsed(raw: bytes, folder: Path, rank: int, attempt: str) -> Manifest:
    manifest = parse_manifest(raw, folder / manifest_name(rank))
    if manifest.attempt != attempt:
        raise CheckpointError(
            f"{folder}: has the files of another attempt ({manifest.attempt}, not {attempt})"
        )
    return manifest


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # there, but switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
