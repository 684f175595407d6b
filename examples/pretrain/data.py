"""Prepared data: token files that every rank maps into memory, written once by rank 0.

<folder>/train.bin, validation.bin   token ids, uint16 or uint32, documents one after another
<folder>/tokenizer.json              the vocabulary (text sources only)
<folder>/token_bytes.npy             bytes of text each token stands for (text sources only)
<folder>/manifest.json               what the above holds; written last, so its presence means
                                     that the folder is complete
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from errors import UsageError
from sources import VALIDATION_SHARE, IndexedSource, Source, TextSource, is_validation
from tokenizer import END_OF_TEXT_ID, token_lengths, train_tokenizer

FORMAT = 1
SPLITS = ("train", "validation")
WAIT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        format: version of this layout.
        source: where the text came from.
        fingerprint: SHA-256 over the digests of all documents and the vocabulary.
        vocabulary: number of token ids.
        dtype: NumPy name of the type of a stored token.
        documents: number of documents in each split.
        tokens: number of tokens in each split.
        text_bytes: UTF-8 bytes in each split, or None where the text is not known.
        xz_bytes: size of the validation text after ``xz -9``, or None.
    """

    format: int
    source: str
    fingerprint: str
    vocabulary: int
    dtype: str
    documents: dict[str, int]
    tokens: dict[str, int]
    text_bytes: dict[str, int] | None
    xz_bytes: int | None

    @property
    def xz_bits_per_byte(self) -> float | None:
        """The yardstick: bits per byte that ``xz -9`` needs for the validation text."""
        if self.xz_bytes is None or self.text_bytes is None:
            return None
        return 8 * self.xz_bytes / self.text_bytes["validation"]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """The prepared data, mapped into memory.

    Attributes:
        manifest: what it is.
        train: token ids to train on, shape (N,).
        validation: token ids kept apart, shape (M,).
        token_bytes: bytes of text by token id, or None where the text is not known.
    """

    manifest: Manifest
    train: np.ndarray
    validation: np.ndarray
    token_bytes: np.ndarray | None


def load(folder: Path) -> PreparedData:
    """Map a prepared folder into memory.

    Raises:
        UsageError: the folder does not hold what its manifest says.
    """
    manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    if manifest.format != FORMAT:
        raise UsageError(
            f"{folder}: prepared data of format {manifest.format}, this code reads {FORMAT}; "
            "remove the folder to prepare it again"
        )
    maps = {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        expected_bytes = manifest.tokens[split] * np.dtype(manifest.dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected_bytes:
            raise UsageError(
                f"{path}: not the {expected_bytes} bytes its manifest names; "
                f"remove {folder} to prepare it again"
            )
        maps[split] = np.memmap(path, dtype=manifest.dtype, mode="r")
    has_text = manifest.text_bytes is not None
    token_bytes = np.load(folder / "token_bytes.npy") if has_text else None
    return PreparedData(manifest=manifest, token_bytes=token_bytes, **maps)


def prepare(folder: Path, source: Source, *, vocabulary: int, limit_bytes: int) -> None:
    """Write the prepared folder, atomically; does nothing when it is already there.

    Args:
        folder: where it goes.
        source: where the documents come from.
        vocabulary: token ids to learn (text sources only).
        limit_bytes: at most this much text is used (text sources only).

    Raises:
        UsageError: there is too little to train on.
    """
    if (folder / "manifest.json").is_file():
        return
    work = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    for left_over in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a killed preparation
        shutil.rmtree(left_over)
    work.mkdir(parents=True)
    try:
        if isinstance(source, TextSource):
            manifest = _prepare_text(work, source, vocabulary, limit_bytes)
        else:
            manifest = _prepare_indexed(work, source)
        (work / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        if folder.exists():  # without a manifest: not complete
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prepare_text(work: Path, source: TextSource, vocabulary: int, limit_bytes: int) -> Manifest:
    documents = source.documents(limit_bytes)
    parts = _split(documents, f"--data {source.root}")
    texts = {split: [text for _, text in parts[split]] for split in SPLITS}
    tokenizer = train_tokenizer(texts["train"], vocabulary)
    tokenizer.save(str(work / "tokenizer.json"))
    np.save(work / "token_bytes.npy", token_lengths(tokenizer))
    size = tokenizer.get_vocab_size()
    dtype = _smallest_dtype(size)
    tokens = {}
    for split in SPLITS:
        with (work / f"{split}.bin").open("wb") as stream:
            for first in range(0, len(texts[split]), 256):  # bounds the memory of the encodings
                for encoding in tokenizer.encode_batch_fast(texts[split][first : first + 256]):
                    stream.write(np.array([*encoding.ids, END_OF_TEXT_ID], dtype).tobytes())
            tokens[split] = stream.tell() // dtype.itemsize
    validation_text = "".join(texts["validation"]).encode()
    return Manifest(
        format=FORMAT,
        source=str(source.root),
        fingerprint=_fingerprint([digest for digest, _ in documents], size),
        vocabulary=size,
        dtype=dtype.name,
        documents={split: len(texts[split]) for split in SPLITS},
        tokens=tokens,
        text_bytes={split: sum(len(t.encode()) for t in texts[split]) for split in SPLITS},
        xz_bytes=len(lzma.compress(validation_text, preset=9)),
    )


def _prepare_indexed(work: Path, source: IndexedSource) -> Manifest:
    documents = [
        (hashlib.sha256(ids.tobytes()).digest(), ids) for ids in source.documents() if ids.size
    ]
    parts = _split(documents, f"--data {source.prefix}")
    highest = max(int(ids.max()) for _, ids in documents)
    if min(int(ids.min()) for _, ids in documents) < 0 or highest >= 2**32:
        raise UsageError(f"--data {source.tokens_path}: token ids must lie in 0 .. 2**32 - 1")
    dtype = _smallest_dtype(highest + 1)
    tokens = {}
    for split in SPLITS:
        with (work / f"{split}.bin").open("wb") as stream:
            for _, ids in parts[split]:
                stream.write(ids.astype(dtype).tobytes())
            tokens[split] = stream.tell() // dtype.itemsize
    return Manifest(
        format=FORMAT,
        source=str(source.prefix),
        fingerprint=_fingerprint([digest for digest, _ in documents], highest + 1),
        vocabulary=highest + 1,
        dtype=dtype.name,
        documents={split: len(parts[split]) for split in SPLITS},
        tokens=tokens,
        text_bytes=None,
        xz_bytes=None,
    )


def _split(documents: list[tuple], where: str) -> dict[str, list[tuple]]:
    if len({digest for digest, _ in documents}) < 2:
        raise UsageError(
            f"{where}: found {len(documents)} different documents of UTF-8 text, at least 2 are "
            "needed (one to train on, one to validate); add files"
        )
    validation = {digest for digest, _ in documents if is_validation(digest)}
    # A small collection may have none on the validation side, or none on the other.
    if not validation:
        validation = {min(digest for digest, _ in documents)}
    if len(validation) == len({digest for digest, _ in documents}):
        validation.discard(max(validation))
    return {
        "train": [item for item in documents if item[0] not in validation],
        "validation": [item for item in documents if item[0] in validation],
    }


def _smallest_dtype(vocabulary: int) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _fingerprint(digests: Iterable[bytes], vocabulary: int) -> str:
    total = hashlib.sha256(f"{FORMAT} {vocabulary} {VALIDATION_SHARE}".encode())
    for digest in sorted(digests):
        total.update(digest)
    return total.hexdigest()


def prepare_on_rank_0(
    folder: Path, source: Source, *, rank: int, vocabulary: int, limit_bytes: int
) -> PreparedData:
    """Let rank 0 prepare the data while the other ranks wait for it, then map it everywhere.

    It runs before any process group exists, so the ranks meet through the file system. A message
    of rank 0's failure is left under the name of this very launch, so an old one is never read.

    Raises:
        UsageError: rank 0 found the source unusable, or did not finish within ``WAIT_S``.
    """
    launch = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ.get('MASTER_PORT', '')}"
    failure = folder.with_name(f"{folder.name}.failed-{launch}")
    if rank == 0:
        try:
            prepare(folder, source, vocabulary=vocabulary, limit_bytes=limit_bytes)
        except BaseException as error:
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(str(error) or type(error).__name__, encoding="utf-8")
            raise
        return load(folder)
    deadline = time.monotonic() + WAIT_S
    while not (folder / "manifest.json").is_file():
        if failure.is_file():
            raise UsageError(failure.read_text(encoding="utf-8"))
        if time.monotonic() > deadline:
            raise UsageError(f"{folder}: rank 0 has not prepared the data within {WAIT_S:.0f} s")
        time.sleep(0.1)
    return load(folder)
