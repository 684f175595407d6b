"""The asynchronous checkpoint writer: live memory -> buffer -> disk, with checksums on the way.

`open_writer` gives the native one where the native code is built, and otherwise its readable
reference in Python; both keep the same promises (`writer_base`) and pass the same tests.
"""

from __future__ import annotations

from typing import Any

from lowtide.checkpoint.writer.base import Progress, Ticket, Writer
from lowtide.checkpoint.writer.native_writer import NativeWriter
from lowtide.checkpoint.writer.python_writer import PythonWriter
from lowtide.core.errors import NativeUnavailableError
from lowtide.core.native import native

__all__ = ["Progress", "Ticket", "Writer", "open_writer"]


def open_writer(
    *,
    buffer_bytes: int,
    chunk_bytes: int = 4 * 2**20,
    io: str = "auto",
    direct: bool = True,
    bytes_per_s: float | None = None,
    queue_depth: int = 8,
) -> Writer:
    """Open a writer; its buffer gets its memory in the background.

    Args:
        buffer_bytes: Size of the buffer, a multiple of `chunk_bytes` and at least twice as much.
        chunk_bytes: Bytes per write and per checksum, a multiple of 4096.
        io: "io_uring", "threads", or "auto": io_uring where the kernel lets us, else threads.
        direct: Bypass the page cache where the file system can.
        bytes_per_s: Write no faster than this, or None.
        queue_depth: Writes at once.

    Raises:
        ValueError: An argument is out of its range.
        CheckpointError: The buffer cannot be allocated.
    """
    arguments: dict[str, Any] = {
        "buffer_bytes": buffer_bytes,
        "chunk_bytes": chunk_bytes,
        "io": io,
        "direct": direct,
        "bytes_per_s": bytes_per_s or 0.0,
        "queue_depth": queue_depth,
    }
    try:
        module = native().checkpoint
    except (NativeUnavailableError, AttributeError):  # or built before this plugin joined
        return PythonWriter(**arguments)
    return NativeWriter(module, **arguments)
