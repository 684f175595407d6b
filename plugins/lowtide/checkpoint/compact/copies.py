"""Small copies of checkpoints for the slower levels of storage, and back.

Each file becomes a file ``<name>.compact``: tensors through a codec, block by block; optimizer
moments, where that is asked for, through another one that keeps an error bound; and blocks that an
earlier checkpoint has already as a reference to it. Every block is decoded again before it is
stored, so a codec that breaks its promise costs space, not a checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lowtide.checkpoint.compact import SUFFIX
from lowtide.checkpoint.compact.encode import Encoder, compact_file
from lowtide.checkpoint.compact.file import CompactFile, FindBase, SummedFile, read_table
from lowtide.checkpoint.compact.table import Record
from lowtide.checkpoint.store.folders import make_part_folder, part_folder, publish, remove
from lowtide.checkpoint.store.manifest import Manifest, read_manifest, write_manifest
from lowtide.checkpoint.writer.plan import FileResult
from lowtide.core.codec import get_codec
from lowtide.core.errors import CheckpointError, UnknownNameError
from lowtide.core.restart import read_record, write_record

logger = logging.getLogger("lowtide")


class CompactConfig(BaseModel):
    """How the copies of checkpoints at one level are made small."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    codec: str | dict[str, Any] = "lowtide.zstd"
    """Name or configuration of the codec for everything; it must be lossless."""

    moments: str | dict[str, Any] | None = None
    """Name or configuration of a codec with an error bound for the optimizer's moments: exp_avg,
    and exp_avg_sq if the bound is relative to each value ("pw_rel"). Null: the one for everything.
    Parameters and master weights are always exact."""

    delta: bool = False
    """Store what has not changed since the checkpoint before as a reference to that one."""

    max_chain: int = Field(default=8, ge=1)
    """How many other checkpoints one may need at most; then it is stored in full again."""

    @model_validator(mode="after")
    def _check(self) -> CompactConfig:
        for key, spec in (("codec", self.codec), ("moments", self.moments)):
            if spec is None:
                continue
            try:
                kind = get_codec(spec).bound.kind
            except UnknownNameError as error:
                raise ValueError(f'"{key}": {error}') from error
            if key == "codec" and kind != "lossless":
                raise ValueError(f'"codec" is {spec}, which is lossy; name it in "moments"')
            if kind == "none":
                raise ValueError(f'"moments" is {spec}, which keeps no bound; name one that does')
        return self


def is_compact(checkpoint: Path) -> bool:
    """Tell whether a complete checkpoint holds compact files, which `expand` has to undo."""
    return bool(_compact_names(checkpoint))


def bases_of(checkpoint: Path) -> set[tuple[str, str]]:
    """Return tag and attempt of each checkpoint that `checkpoint` refers to directly.

    Raises:
        CheckpointError: one of its files is damaged.
    """
    tables = (read_table(checkpoint / name) for name in _compact_names(checkpoint))
    return {table.base for table in tables if table.base is not None}


def beside(checkpoint: Path) -> FindBase:
    """Return what finds the bases of `checkpoint` in its own folder of checkpoints."""
    return lambda tag, _attempt: checkpoint.parent / tag


def compact(
    source: Path,
    target: Path,
    *,
    manifest: Manifest,
    config: CompactConfig,
    base: Path | None = None,
    pace: Callable[[int], None] | None = None,
) -> list[FileResult]:
    """Write small copies of one rank's files, synced to disk.

    Args:
        source: The checkpoint's folder.
        target: Where the copies go; the folder is there.
        manifest: The rank's files and their checksums.
        config: How.
        base: Compact checkpoint beside which `target` will be, for ``delta``. One that is damaged,
            or has other files, is not referred to.
        pace: Called after each block with the bytes written for it; may sleep.

    Returns:
        One result per file, with checksums of the compact file.

    Raises:
        CheckpointError: a file in `source` is not what its manifest says, or one cannot be read
            or written.
    """
    results = []
    moments = None if config.moments is None else get_codec(config.moments)
    encoder = Encoder(get_codec(config.codec), moments, pace=pace or (lambda _: None))
    for name, sums in manifest.files.items():
        path = target / f"{name}{SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if config.delta and base is not None:
            encoder.base = _open_base(base, name, config, manifest)
            encoder.base_tag = base.name
        try:
            results.append(
                compact_file(
                    source / name, path, encoder, name=name, sums=sums, attempt=manifest.attempt
                )
            )
        except OSError as error:
            raise _not_done(error, path) from error
        finally:
            if encoder.base is not None:
                encoder.base.close()
    return results


def expand(source: Path, target: Path, *, find_base: FindBase) -> list[FileResult]:
    """Make the checkpoint again that `source` is a compact copy of.

    Bit for bit, but for moments that were stored with an error bound; those have new checksums.

    Args:
        source: A complete compact checkpoint.
        target: The folder to make; must not exist. It gets its name when all is there.
        find_base: From tag and attempt to the folder of a checkpoint that `source` refers to; see
            `beside`.

    Raises:
        CheckpointError: `source` or a checkpoint it needs is missing or damaged, or `target`
            exists or cannot be written.
    """
    record = read_record(source)
    if record is None or not is_compact(source):
        raise CheckpointError(
            f"{source}: is not a complete compact checkpoint; give the folder of one"
        )
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists; remove it or name another folder")
    part = part_folder(target, record["attempt"])
    try:
        make_part_folder(part, is_owner=True)
        results = _expand_all(source, part, target.name, record, find_base)
        publish(part, target)
    except BaseException as error:
        remove(part, target)
        if isinstance(error, OSError):
            raise _not_done(error, target) from error
        raise
    return [replace(r, path=target / r.path.relative_to(part)) for r in results]


def expand_files(
    source: Path, target: Path, *, manifest: Manifest, find_base: FindBase
) -> list[FileResult]:
    """Make one rank's files again; the counterpart of `compact`.

    Args:
        source: The compact checkpoint.
        target: Where the files go.
        manifest: The rank's manifest in `source`.
        find_base: As for `expand`.

    Raises:
        CheckpointError: something is missing or damaged; names the file and, where it is one, the
            checkpoint that is needed besides.
        OSError: a file cannot be written.
    """
    results = []
    for name in manifest.files:
        original = name.removesuffix(SUFFIX)
        with CompactFile(source / name, find_base=find_base) as file:
            if (f"{file.table.name}{SUFFIX}", file.table.attempt) != (name, manifest.attempt):
                raise CheckpointError(
                    f"{source / name}: is {file.table.name} of attempt {file.table.attempt}, not "
                    f"of {manifest.attempt}; go on from another checkpoint"
                )
            (target / original).parent.mkdir(parents=True, exist_ok=True)
            results.append(_expand_file(file, target / original))
    return results


def _compact_names(checkpoint: Path) -> list[str]:
    record = read_record(checkpoint)
    return [] if record is None else [n for n in record["files"] if n.endswith(SUFFIX)]


def _not_done(error: OSError, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{error.filename or path}: cannot be read or written ({error.strerror}); free space or "
        "mend the file system, and try again"
    )


def _open_base(
    base: Path, name: str, config: CompactConfig, manifest: Manifest
) -> CompactFile | None:
    """Open a file of the checkpoint before, if it is one to refer to."""
    path = base / f"{name}{SUFFIX}"
    if not path.exists():
        return None  # that checkpoint had other files
    try:
        file = CompactFile(path, find_base=beside(base))
    except CheckpointError as error:
        logger.warning("%s; checkpoint %s is not used as a base", error, base.name)
        return None
    is_usable = file.table.depth < config.max_chain and file.table.attempt != manifest.attempt
    return file if is_usable else None


# ---- back


def _expand_file(file: CompactFile, path: Path) -> FileResult:
    table = file.table
    with SummedFile(path, chunk_bytes=table.chunk_bytes) as out:
        rest = _blocks_of(file, table.rest)
        held = memoryview(b"")
        for offset, record in (*((r.offset, r) for r in table.records), (table.size_bytes, None)):
            while out.sums.size_bytes < offset:
                held = held or memoryview(next(rest))
                part = held[: offset - out.sums.size_bytes]
                out.write(part)
                held = held[len(part) :]
            for block in () if record is None else _blocks_of(file, record):
                out.write(block)
        result = out.finish()
    if not table.is_lossy and tuple(result.crc32) != table.crc32:
        raise CheckpointError(
            f"{file.path}: does not give the file that it was made of; go on from another "
            "checkpoint"
        )
    return result


def _blocks_of(file: CompactFile, record: Record) -> Iterator[bytes]:
    for number in range(len(record.blocks)):
        yield file.read(record, number)


def _expand_all(
    source: Path, part: Path, tag: str, record: dict[str, Any], find_base: FindBase
) -> list[FileResult]:
    """Make the files of all ranks again, their manifests and the record."""
    results: list[FileResult] = []
    manifests: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    for name in sorted(record["manifests"]):
        manifest = read_manifest(source / name)
        if manifest.attempt != record["attempt"]:
            raise CheckpointError(
                f"{source / name}: is of attempt {manifest.attempt}, the record of "
                f"{record['attempt']}; go on from another checkpoint"
            )
        found = expand_files(source, part, manifest=manifest, find_base=find_base)
        whole = Manifest.of_results(
            part, found, attempt=manifest.attempt, rank=manifest.rank, step=manifest.step
        )
        name, size_bytes, crc = write_manifest(part, whole)
        manifests[name] = {"size_bytes": size_bytes, "crc32": crc}
        sizes |= {name: sums.size_bytes for name, sums in whole.files.items()}
        results += found
    node = (record["node"], record["nodes"]) if "nodes" in record else None
    write_record(
        part, step=record["step"], world_size=record["world_size"], config=record["config"],
        client_keys=record["client_keys"], files=sizes, attempt=record["attempt"], tag=tag,
        manifests=manifests, node=node,
    )  # fmt: skip
    return results
