"""Whether a checkpoint on disk is, byte for byte, what was written."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lowtide.checkpoint.store.manifest import FileSums, is_manifest_name, parse_manifest
from lowtide.checkpoint.store.scan import (
    Damage,
    OnProgress,
    Run,
    ZipRun,
    find_wrong_size,
    make_runs,
    merged,
    opened,
    scan_all,
)
from lowtide.core import restart
from lowtide.core.errors import CheckpointError
from lowtide.core.native import crc32
from lowtide.core.restart import RECORD_FILE

if TYPE_CHECKING:
    from lowtide.checkpoint.files.image import Image

Mode: TypeAlias = Literal["full", "fast"]
_File: TypeAlias = tuple[str, FileSums, int]  # name, checksums, the rank that wrote it


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank reads of a checkpoint that as many ranks wrote: what it wrote, and `wanted`.

    Attributes:
        rank: Which rank.
        wanted: Names of files that it will load. They stay in memory.
        images: That memory, by name; whole once nothing is wrong.
    """

    rank: int
    wanted: Collection[str] = ()
    images: dict[str, Image] = field(default_factory=dict)

    def runs(self, folder: Path, files: Sequence[_File]) -> list[Run]:
        """Return what is to be read."""
        from lowtide.checkpoint.files.image import Image  # and torch with it

        mine = [each for each in files if each[0] in self.wanted or each[2] == self.rank]
        for name, sums, _ in mine:
            if name in self.wanted:
                with contextlib.suppress(OSError):  # without the memory it is checked all the same
                    self.images[name] = Image(sums.size_bytes)
        pairs = [(name, sums) for name, sums, _ in mine]
        return make_runs(folder, pairs, is_sample=False, part=(0, 1), held=self.images)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found.

    Attributes:
        path: The checkpoint.
        mode: "full" or "fast".
        damage: Everything that is wrong, by file.
        read_bytes: Bytes of data files that were read.
        wall_s: Time it took.
        is_checksummed: Whether Lowtide's own checksums, which cover every byte, were there.
            Without them only what torch's zip files know of themselves can be checked.
    """

    path: Path
    mode: Mode
    damage: tuple[Damage, ...]
    read_bytes: int
    wall_s: float
    is_checksummed: bool

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damage

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return {**asdict(self), "path": str(self.path), "is_ok": self.is_ok}


def verify(
    checkpoint: Path | str,
    *,
    mode: Mode = "full",
    part: tuple[int, int] = (0, 1),
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Check a checkpoint: its record, its manifests, and the bytes of its files.

    Files that no manifest names are ignored. A checkpoint that was written without checksums is
    checked by what torch's zip files say about themselves.

    Args:
        checkpoint: Its folder.
        mode: "full" reads every byte; "fast" reads record and manifests, and of each file its
            size and a few chunks.
        part: (index, count) shares the work: the parts with the indices 0 to count - 1 together
            check everything, each its own range of chunks.
        threads: How many read at once. By default as many as processors, at most 8.
        on_progress: Called on this thread with the bytes read so far and in total.

    Raises:
        CheckpointError: there is no such folder, or an argument is wrong. Never for damage.
    """
    return _verify(Path(checkpoint), mode=mode, part=part, threads=threads, on_progress=on_progress)


def verify_share(checkpoint: Path, share: Share, *, world_size: int) -> Report:
    """Check record and manifests of a checkpoint, and read one rank's share of all its bytes.

    The shares of all ranks together are everything. What is wanted lies in `share.images` after
    that: these very bytes have the right checksums, whatever becomes of the files.

    Args:
        checkpoint: Its folder.
        share: What to read.
        world_size: Number of ranks, of this run and of the one that wrote it.

    Raises:
        CheckpointError: there is no such folder.
    """
    return _verify(checkpoint, part=(share.rank, world_size), share=share)


def find_damage(
    checkpoint: Path,
    /,
    *,
    world_size: int | None = None,
    mode: Mode = "full",
    threads: int | None = None,
) -> str | None:
    """Say why a checkpoint cannot be loaded, or return None; for `core.restart.choose`."""
    record = restart.read_record(checkpoint)
    if record is not None and record.get("nodes", 1) > 1:
        return restart.find_damage(checkpoint)  # a part of one, on a disk of one node
    try:
        report = _verify(checkpoint, mode=mode, threads=threads, world_size=world_size)
    except CheckpointError as error:
        return str(error)
    more = len(report.damage) - 1
    if more < 0:
        return None
    return f"{report.damage[0]}" + (f" (and {more} more)" if more else "")


def find_latest_damage(folder: Path) -> Damage | None:
    """Say what is wrong with the file ``latest`` beside the checkpoints in `folder`, if anything.

    Stock DeepSpeed reads it to find the checkpoint to load. That there is none is no damage.
    """
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        is_there = bool(tag) and (folder / tag).is_dir()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return _damage("latest", f"cannot be read ({error})")
    if is_there:
        return None
    return _damage("latest", f"names {tag!r}, which is not there")


def _verify(
    folder: Path,
    *,
    mode: Mode = "full",
    part: tuple[int, int] = (0, 1),
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    world_size: int | None = None,
    share: Share | None = None,
) -> Report:
    begin_s = time.monotonic()
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint; pass the folder of one, e.g. checkpoints/global_step100"
        )
    if mode not in ("full", "fast"):
        raise CheckpointError(f'mode: got {mode!r}, allowed: "full", "fast"')
    index, count = part
    if not 0 <= index < count:
        raise CheckpointError(f"part: got {part}, allowed is (index, count) with index < count")
    record = restart.read_record(folder)
    names = _manifest_names(folder, record)
    damage = _check_record(folder, record, names)
    runs: Sequence[Run | ZipRun]
    summed: set[str] = set()
    if names:
        files, found = _read_manifests(folder, record, names)
        damage += found
        summed = {name for name, _, _ in files}
        if share is not None:
            runs = share.runs(folder, files)
        else:
            pairs = [(name, sums) for name, sums, _ in files]
            runs = make_runs(folder, pairs, is_sample=mode == "fast", part=part)
    else:
        runs = _zip_runs(folder, record, is_sample=mode == "fast")[index::count]
        if record is None and not damage:
            missing = restart.find_missing_parts(folder, world_size=world_size)
            damage += [] if missing is None else [_damage("", missing)]
    if record is not None and index == 0:
        damage += _check_sizes(folder, record, skip=summed)
    found, read_bytes = scan_all(runs, threads=threads, on_progress=on_progress)
    return Report(
        path=folder, mode=mode, damage=merged(damage + found), read_bytes=read_bytes,
        wall_s=time.monotonic() - begin_s, is_checksummed=bool(names),
    )  # fmt: skip


def _damage(file: str, text: str) -> Damage:
    return Damage(file=file, byte_range=None, text=text)


# ---- record, manifests, sizes


def _manifest_names(folder: Path, record: dict[str, Any] | None) -> list[str]:
    # Without a record that says which: those that are there tell at least where the damage is.
    if record is not None:
        return sorted(record.get("manifests", {}))
    return sorted(path.name for path in folder.iterdir() if is_manifest_name(path.name))


def _check_record(
    folder: Path, record: dict[str, Any] | None, manifests: Sequence[str]
) -> list[Damage]:
    if record is not None:
        return []
    if os.path.lexists(folder / RECORD_FILE):
        text = "is not a whole completion record"
    elif manifests:
        text = "is missing: the checkpoint was never finished"
    else:
        return []  # stock DeepSpeed wrote it
    return [_damage(RECORD_FILE, text)]


def _read_manifests(
    folder: Path, record: dict[str, Any] | None, names: Iterable[str]
) -> tuple[list[_File], list[Damage]]:
    files: list[_File] = []
    damage: list[Damage] = []
    for name in names:
        text = None
        try:
            raw = (folder / name).read_bytes()
            manifest = parse_manifest(raw, folder / name)
        except OSError as error:
            text = f"cannot be read ({error.strerror})"
        except CheckpointError as error:
            text = str(error).removeprefix(f"{folder / name}: ")
        else:
            files += [(path, sums, manifest.rank) for path, sums in manifest.files.items()]
            if record is not None:
                text = _find_mismatch(raw, manifest.attempt, manifest.step, record, name)
        if text is not None:
            damage.append(_damage(name, text))
    return sorted(files, key=lambda item: item[0]), damage


def _find_mismatch(
    raw: bytes, attempt: str, step: int, record: dict[str, Any], name: str
) -> str | None:
    if attempt != record.get("attempt"):
        return f"is of attempt {attempt}, the record of {record.get('attempt')}: an earlier try's"
    if step != record["step"]:
        return f"is of step {step}, the record of step {record['step']}"
    written = record["manifests"][name]
    if (len(raw), crc32(raw)) != (written["size_bytes"], written["crc32"]):
        return "is not the one that the record certifies (another size or checksum)"
    return None


def _check_sizes(folder: Path, record: dict[str, Any], *, skip: set[str]) -> list[Damage]:
    damage = []
    for name, written in record["files"].items():
        if name in skip:
            continue
        try:
            with opened(folder / name) as descriptor:
                text = find_wrong_size(descriptor, written["size_bytes"])
        except OSError as error:
            text = f"cannot be read ({error.strerror})"
        if text is not None:
            damage.append(_damage(name, text))
    return damage


def _zip_runs(folder: Path, record: dict[str, Any] | None, *, is_sample: bool) -> list[ZipRun]:
    if record is None:
        names = sorted(path.name for path in folder.glob("*.pt"))
    else:
        names = sorted(name for name, written in record["files"].items() if written["is_zip"])
    runs = []
    for name in names:
        try:
            size_bytes = (folder / name).stat().st_size
        except OSError:
            size_bytes = 0  # the run itself says so
        runs.append(
            ZipRun(path=folder / name, name=name, is_sample=is_sample, size_bytes=size_bytes)
        )
    return runs
