"""One rank's list of what it wrote into a checkpoint: files, sizes, a CRC-32 of every chunk.

Torch reads its files without looking at their checksums, so a flipped bit or a hole of zeros is
loaded as wrong numbers. A manifest covers every byte of a file, headers and all. Its own checksum
stands in the completion record, whose checksum stands in itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lowtide.core.errors import CheckpointError
from lowtide.core.native import crc32
from lowtide.core.restart import has_right_checksum, write_durable

if TYPE_CHECKING:
    from lowtide.checkpoint.writer.plan import FileResult

FORMAT = 1
_NAME = re.compile(r"manifest-(\d{5,})\.json")
_WRITE_AGAIN = "the checkpoint is damaged: go on from another one"


@dataclass(frozen=True, kw_only=True)
class FileSums:
    """Size and checksums of one file.

    Attributes:
        size_bytes: Its size.
        chunk_bytes: Distance between two checksums; the last chunk may be shorter.
        crc32: One CRC-32 (zip's and zlib's) per chunk.
    """

    size_bytes: int
    chunk_bytes: int
    crc32: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one rank wrote.

    Attributes:
        attempt: Which try to write this checkpoint it was, 16 hexadecimal digits.
        rank: Who wrote it.
        step: Optimizer steps in the checkpoint.
        files: By name below the checkpoint's folder, with "/" between folders.
    """

    attempt: str
    rank: int
    step: int
    files: Mapping[str, FileSums]

    @classmethod
    def of_results(
        cls, folder: Path, results: Iterable[FileResult], *, attempt: str, rank: int, step: int
    ) -> Manifest:
        """Return the manifest of the files below `folder` that a writer has finished."""
        files = {
            result.path.relative_to(folder).as_posix(): FileSums(
                size_bytes=result.size_bytes,
                chunk_bytes=result.chunk_bytes,
                crc32=tuple(result.crc32),
            )
            for result in results
        }
        return cls(attempt=attempt, rank=rank, step=step, files=files)


def manifest_name(rank: int) -> str:
    """Return the file name of the manifest of `rank`."""
    return f"manifest-{rank:05d}.json"


def is_manifest_name(name: str) -> bool:
    """Return whether a file of this name is a manifest."""
    return _NAME.fullmatch(name) is not None


def write_manifest(folder: Path, manifest: Manifest) -> tuple[str, int, int]:
    """Write `manifest` into the checkpoint `folder`, synced to disk.

    Returns:
        Its file name, its size in bytes and its CRC-32, for the completion record.

    Raises:
        CheckpointError: it cannot be written.
    """
    name = manifest_name(manifest.rank)
    value = {"format": FORMAT, **asdict(manifest)}
    try:
        raw = write_durable(folder / name, value, has_checksum=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder / name}: cannot be written ({error.strerror}); the checkpoint is not "
            "complete without it: free space or mend the file system, and save again"
        ) from error
    return name, len(raw), crc32(raw)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check it.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that this version does not know.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); {_WRITE_AGAIN}"
        ) from error
    return parse_manifest(raw, path)


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Return the manifest in `raw`, the bytes of `path`.

    Raises:
        CheckpointError: it is damaged, or of a format that this version does not know.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
        if not isinstance(value, dict):
            raise TypeError(f"got {type(value).__name__}, allowed is an object")
        if not has_right_checksum(value):
            raise ValueError("its checksum does not fit")
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a whole manifest ({error}); {_WRITE_AGAIN}") from (
            error
        )
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {value.get('format')!r}, allowed is {FORMAT}; a newer Lowtide wrote "
            "it: update this one"
        )
    # From here on the text is what was written, so what does not fit is the writer's fault.
    try:
        return _checked(value, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is no manifest ({type(error).__name__}: {error}); {_WRITE_AGAIN}"
        ) from error


def _checked(value: dict[str, Any], path: Path) -> Manifest:
    files = {str(name): _sums(name, sums) for name, sums in value["files"].items()}
    rank, step, attempt = value["rank"], value["step"], value["attempt"]
    if not (type(rank) is int and type(step) is int and isinstance(attempt, str)):
        raise TypeError("attempt, rank or step is of a wrong type")
    if path.name != manifest_name(rank):
        raise ValueError(f"it is of rank {rank}, whose file is {manifest_name(rank)}")
    return Manifest(attempt=attempt, rank=rank, step=step, files=files)


def _sums(name: str, value: dict[str, Any]) -> FileSums:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise ValueError(f"{name!r} is not a file below the checkpoint")
    size_bytes, chunk_bytes, crc32 = value["size_bytes"], value["chunk_bytes"], value["crc32"]
    if not (type(size_bytes) is int and size_bytes >= 0):
        raise ValueError(f"{name}: size_bytes is {size_bytes!r}")
    if not (type(chunk_bytes) is int and chunk_bytes > 0):
        raise ValueError(f"{name}: chunk_bytes is {chunk_bytes!r}")
    chunks = -(-size_bytes // chunk_bytes)
    if len(crc32) != chunks or not all(type(crc) is int for crc in crc32):
        raise ValueError(f"{name}: {len(crc32)} checksums, {size_bytes} bytes have {chunks}")
    return FileSums(size_bytes=size_bytes, chunk_bytes=chunk_bytes, crc32=tuple(crc32))
