"""Files of a checkpoint over plain TCP: frames with a length, chunks held to their checksums.

A frame is a length (4 bytes, big-endian) and that many bytes. Nothing that arrives is trusted
before it has been compared with the token, nothing is unpickled, and every wait has an end.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowtide.checkpoint.config import MIB
from lowtide.checkpoint.store.manifest import FileSums
from lowtide.core.errors import CheckpointError
from lowtide.core.native import crc32
from lowtide.core.restart import sync_folder

_LENGTH = struct.Struct("!I")
_TEXT_BYTES = 64 * MIB  # longest JSON; a manifest has about 12 bytes per chunk of 4 MiB
_GREETING_BYTES = 256
_SYNC_BYTES = 64 * MIB  # so that the last sync of a large file does not look like a hang
GREETING_S = 10.0  # longest wait for a stranger
_GREETING = b"lowtide\n"


class Wire:
    """One connection. Closed by ``with``.

    Args:
        link: A connected socket.
        timeout_s: Longest wait for the other side.
    """

    def __init__(self, link: socket.socket, *, timeout_s: float) -> None:
        self._link = link
        self._link.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. Only for the thread that uses it."""
        self._link.close()

    def end(self) -> None:
        """End the conversation under a thread that waits in it."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)

    def allow(self, timeout_s: float) -> None:
        """Set the longest wait for the other side."""
        self._link.settimeout(timeout_s)

    def send(self, data: bytes | bytearray) -> None:
        """Send one frame."""
        self._link.sendall(_LENGTH.pack(len(data)))
        self._link.sendall(data)

    def receive(self, most_bytes: int = _TEXT_BYTES) -> bytearray:
        """Return the next frame.

        Raises:
            CheckpointError: it is longer than allowed, or the other side has gone.
        """
        (length,) = _LENGTH.unpack(self._receive(_LENGTH.size))
        if length > most_bytes:
            raise CheckpointError(f"a frame of {length} bytes came, allowed are {most_bytes}")
        return self._receive(length)

    def tell(self, value: Any) -> None:
        """Send `value` as JSON."""
        self.send(json.dumps(value).encode("utf-8"))

    def hear(self) -> dict[str, Any]:
        """Return what the other side told.

        Raises:
            CheckpointError: it has gone, speaks something else, or tells of an error.
        """
        try:
            value = json.loads(self.receive())
        except ValueError as error:
            raise CheckpointError(f"something other than JSON came ({error})") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"a {type(value).__name__} came, allowed is an object")
        if "error" in value:
            raise CheckpointError(str(value["error"]))
        return value

    def greet(self, token: str) -> None:
        """Show `token` to a server.

        Raises:
            CheckpointError: the other side is no server of this run.
        """
        self.send(token.encode("ascii"))
        if self.receive(_GREETING_BYTES) != _GREETING:
            raise CheckpointError("the other side is no rank of this run")

    def welcome(self, token: str) -> bool:
        """Let a client show its token; tell whether it was the right one."""
        if not hmac.compare_digest(bytes(self.receive(_GREETING_BYTES)), token.encode("ascii")):
            return False
        self.send(_GREETING)
        return True

    def send_file(self, path: Path, sums: FileSums, *, sent: Callable[[int], None]) -> None:
        """Send a file's chunks. `sent` is called with the bytes of each."""
        with open(path, "rb") as file:
            for size_bytes in _chunk_sizes(sums):
                chunk = file.read(size_bytes)
                if len(chunk) != size_bytes:
                    raise CheckpointError(f"{path}: is shorter than its manifest says")
                self.send(chunk)
                sent(size_bytes)

    def receive_file(self, path: Path, sums: FileSums) -> None:
        """Write a file from its chunks; it has its name only when all of it is right and synced.

        Raises:
            CheckpointError: a chunk is not what the manifest says.
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.part")
        try:
            with open(scratch, "wb") as file:
                unsynced_bytes = 0
                for size_bytes, crc in zip(_chunk_sizes(sums), sums.crc32, strict=True):
                    chunk = self.receive(size_bytes)
                    if len(chunk) != size_bytes or crc32(chunk) != crc:
                        raise CheckpointError(f"{path.name}: what came is not what was written")
                    file.write(chunk)
                    unsynced_bytes += size_bytes
                    if unsynced_bytes >= _SYNC_BYTES:
                        unsynced_bytes = 0
                        file.flush()
                        os.fsync(file.fileno())
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        sync_folder(path.parent)

    def _receive(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            got = self._link.recv_into(view)
            if got == 0:
                raise CheckpointError("the other side ended the connection")
            view = view[got:]
        return data


def connect(hosts: Sequence[str], port: int, *, token: str, timeout_s: float) -> Wire:
    """Return a connection to the server at the first of `hosts` that is of this run.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for host in hosts:
        wire: Wire | None = None
        try:
            patience_s = min(GREETING_S, timeout_s)
            link = socket.create_connection((host, port), timeout=patience_s)
            wire = Wire(link, timeout_s=patience_s)
            wire.greet(token)
            wire.allow(timeout_s)
            return wire
        except (OSError, CheckpointError) as error:
            problems.append(f"{host} port {port}: {error or type(error).__name__}")
            if wire is not None:
                wire.close()
    raise CheckpointError("; ".join(problems))


def own_hosts() -> list[str]:
    """Return names and addresses at which other nodes may reach this one, the best first."""
    found = []
    # The address of the way to the first rank; nothing is sent. One's own name often leads to
    # the loopback address only, so an address outside, which nobody has, is asked about too.
    for target in (os.environ.get("MASTER_ADDR", ""), "192.0.2.1"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:
            ask.connect((target, 9))
            found.append(str(ask.getsockname()[0]))
    outside = [address for address in found if not address.startswith(("127.", "0."))]
    return list(dict.fromkeys([*outside, socket.gethostname(), "127.0.0.1"]))


def _chunk_sizes(sums: FileSums) -> list[int]:
    whole, rest = divmod(sums.size_bytes, sums.chunk_bytes)
    return [sums.chunk_bytes] * whole + [rest] * (rest > 0)
