"""Where the text comes from: a folder of text files, or a Megatron-core indexed dataset."""

from __future__ import annotations

import hashlib
import itertools
import struct
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from errors import UsageError

VALIDATION_SHARE = 0.03
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_INDEX_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text files under a folder.

    Attributes:
        root: the folder.
        suffix: only files with this ending, or "" for all of them.
    """

    root: Path
    suffix: str = ""

    def paths(self) -> list[Path]:
        """List candidate files in a fixed order, without hidden and installed ones."""
        found = []
        for path in sorted(self.root.rglob(f"*{self.suffix}")):
            inner = path.relative_to(self.root).parts
            hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in inner)
            if not hidden and path.is_file():
                found.append(path)
        return found

    def documents(self, limit_bytes: int) -> list[tuple[bytes, str]]:
        """Read every file that is UTF-8 text.

        Identical files are kept once. The order follows the content digests, so it depends
        neither on names nor on the file system, and a cut at ``limit_bytes`` is a fair sample.

        Returns:
            (digest, text) pairs.
        """
        texts: dict[bytes, str] = {}
        for path in self.paths():
            try:
                raw = path.read_bytes()
                text = raw.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # not text, or not ours to read
            if text.strip() and "\0" not in text:
                texts.setdefault(hashlib.sha256(raw).digest(), text)
        kept: list[tuple[bytes, str]] = []
        used_bytes = 0
        for digest in sorted(texts, key=_order):
            used_bytes += len(texts[digest].encode())
            if kept and used_bytes > limit_bytes:
                break
            kept.append((digest, texts[digest]))
        return kept


@dataclass(frozen=True, kw_only=True)
class IndexedSource:
    """A Megatron-core indexed dataset: token ids in ``<prefix>.bin``, places in ``<prefix>.idx``.

    The index holds, little endian: the 9-byte magic, u64 version 1, u8 type code, u64 number of
    sequences, u64 number of document marks, then i32 sequence lengths in tokens, i64 sequence
    offsets in bytes and i64 document marks (the sequence each document starts at, and the end).
    """

    prefix: Path

    @property
    def index_path(self) -> Path:
        """The ``.idx`` file."""
        return Path(f"{self.prefix}.idx")

    @property
    def tokens_path(self) -> Path:
        """The ``.bin`` file."""
        return Path(f"{self.prefix}.bin")

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the token ids of each document, as int64 arrays.

        Raises:
            UsageError: the index is damaged or points outside the token file.
        """
        raw = self.index_path.read_bytes()
        if len(raw) < _INDEX_HEADER.size:
            raise self._damaged(f"it has {len(raw)} bytes, the header alone {_INDEX_HEADER.size}")
        magic, version, code, sequences, marks = _INDEX_HEADER.unpack_from(raw)
        if magic != _INDEX_MAGIC or version != 1:
            raise self._damaged("it does not start as a Megatron index of version 1")
        if code not in _INDEX_TYPES:
            raise self._damaged(f"its type code is {code}; allowed: {sorted(_INDEX_TYPES)}")
        expected_bytes = _INDEX_HEADER.size + 12 * sequences + 8 * marks
        # Multimodal datasets add one byte per sequence at the end.
        if len(raw) not in (expected_bytes, expected_bytes + sequences):
            raise self._damaged(f"it has {len(raw)} bytes, its counts ask for {expected_bytes}")
        place = _INDEX_HEADER.size
        lengths = np.frombuffer(raw, "<i4", sequences, place).astype(np.int64)
        offsets = np.frombuffer(raw, "<i8", sequences, place + 4 * sequences)
        bounds = np.frombuffer(raw, "<i8", marks, place + 12 * sequences)
        dtype = np.dtype(_INDEX_TYPES[code])
        tokens = np.memmap(self.tokens_path, dtype=dtype, mode="r")
        self._check(lengths, offsets, bounds, tokens)
        starts = offsets // dtype.itemsize
        for first, last in itertools.pairwise(bounds):
            parts = [tokens[starts[i] : starts[i] + lengths[i]] for i in range(first, last)]
            if parts:
                yield np.concatenate(parts).astype(np.int64)

    def _check(
        self, lengths: np.ndarray, offsets: np.ndarray, bounds: np.ndarray, tokens: np.ndarray
    ) -> None:
        if lengths.size == 0 or bounds.size < 2:
            raise self._damaged("it holds no document")
        if lengths.min() < 0 or offsets.min() < 0 or (offsets % tokens.itemsize).any():
            raise self._damaged("a sequence has a negative or odd place")
        if int((offsets // tokens.itemsize + lengths).max()) > tokens.size:
            raise self._damaged(f"a sequence ends after the {tokens.size} tokens of the .bin file")
        if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > lengths.size:
            raise self._damaged("its document marks are out of order")

    def _damaged(self, found: str) -> UsageError:
        return UsageError(f"--data {self.index_path}: {found}; write the dataset again")


Source = TextSource | IndexedSource


def find_source(data: str | None) -> Source:
    """Turn ``--data`` into a source, checking cheaply that something is there.

    Args:
        data: None for the source code of this Python's standard library; a folder of text; or
            an indexed dataset by its prefix, ``.bin`` or ``.idx`` file.

    Raises:
        UsageError: nothing usable at that place.
    """
    if data is None:
        source = TextSource(root=Path(sysconfig.get_paths()["stdlib"]), suffix=".py")
        if not source.root.is_dir():
            raise UsageError(
                f"the standard library's source ({source.root}) is not on this machine; "
                "name a folder of text files with --data"
            )
        return source
    path = Path(data)
    if path.is_dir():
        source = TextSource(root=path)
        if not source.paths():
            raise UsageError(f"--data {data}: the folder holds no file; put text files into it")
        return source
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    indexed = IndexedSource(prefix=prefix)
    present = [p.is_file() for p in (indexed.tokens_path, indexed.index_path)]
    if all(present):
        return indexed
    if any(present):
        missing = indexed.index_path if present[0] else indexed.tokens_path
        raise UsageError(f"--data {data}: an indexed dataset needs {missing} too; it is missing")
    found = "a file, neither .bin nor .idx" if path.is_file() else "nothing there"
    raise UsageError(
        f"--data {data}: {found}; give a folder of text files or the prefix of a Megatron-core "
        "dataset (PREFIX.bin and PREFIX.idx)"
    )


def _order(digest: bytes) -> bytes:
    # Not the bytes that choose the split, else a cut would take all validation text first.
    return digest[8:]


def is_validation(digest: bytes, share: float = VALIDATION_SHARE) -> bool:
    """Say which split a document belongs to, from its content alone.

    A copy of a document always falls on the same side, whatever it is called, so nothing that is
    validated was ever trained on as a whole file.
    """
    return int.from_bytes(digest[:8], "big") < share * 2**64
