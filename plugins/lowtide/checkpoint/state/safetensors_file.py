"""Export to safetensors, tensor by tensor: the file format is written here, without a copy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from lowtide.checkpoint.state.view import CheckpointState, open_state
from lowtide.checkpoint.state.zero_layout import MASTER
from lowtide.core.errors import CheckpointError, listed

_INDEX = "model.safetensors.index.json"
_CHUNK_ELEMENTS = 1 << 22
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    names: Sequence[Sequence[str]] | None = None,
) -> list[Path]:
    """Write the model of a checkpoint as safetensors, as Hugging Face's loaders expect it.

    One file ``model.safetensors``, or shards and ``model.safetensors.index.json``. A tied weight
    is stored once; its further names are in the file's metadata, as safetensors itself does it.
    Memory use is a few dozen MiB, whatever the model's size.

    Args:
        checkpoint: The folder of one tag, or a folder with the file ``latest``.
        out: Folder to write to; made if it is not there.
        dtype: What floating values become; None keeps float32 masters, frozen parameters as they
            are stored and buffers as float32.
        max_shard_bytes: Most bytes of tensors in one file; a tensor that has more stands alone.
        names: See `open_state`.

    Returns:
        The files written, the index last.

    Raises:
        CheckpointError: the checkpoint cannot be read, `out` holds another export, or a value
            cannot be stored.
    """
    if max_shard_bytes <= 0 or (dtype is not None and not dtype.is_floating_point):
        raise CheckpointError(
            f"export: max_shard_bytes is {max_shard_bytes} and dtype {dtype}; allowed are a size "
            "of at least 1 and None or a floating dtype"
        )
    state = open_state(checkpoint, names=names)
    shards = _shards(_entries(state, dtype), max_shard_bytes)
    count = len(shards)
    files = ["model.safetensors"]
    if count > 1:
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    _refuse_older(out, {*files, _INDEX} if count > 1 else {*files})
    metadata = {"format": "pt", **{a: n for a, n in state.shared.items() if n in state.parameters}}
    written = []
    for file, entries in zip(files, shards, strict=True):
        with _Durable(out / file) as stream:
            _write(stream, state, entries, metadata)
        written.append(out / file)
    if count > 1:
        weight_map = {e.name: f for f, entries in zip(files, shards, strict=True) for e in entries}
        total = sum(entry.size_bytes for entries in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with _Durable(out / _INDEX) as stream:
            stream.write(json.dumps(index, indent=2, sort_keys=True).encode("utf-8"))
        written.append(out / _INDEX)
    return written


def _entries(state: CheckpointState, dtype: torch.dtype | None) -> list[_Entry]:
    found = []
    for name, value in state.buffers.items():
        kept = torch.float32 if value.is_floating_point() else value.dtype
        found.append((name, value.shape, kept))
    for name, parameter in state.parameters.items():
        is_trained = parameter.group is not None and state.stage == 0
        kept = torch.float32 if is_trained else state.dtype(name)
        found.append((name, parameter.shape, kept))
    entries = []
    for name, shape, kept in found:
        wanted = dtype if dtype is not None and kept.is_floating_point else kept
        if wanted not in _DTYPES:
            raise CheckpointError(
                f'{state.folder}: "{name}" is {wanted}; safetensors files are written with '
                f"{listed(str(known) for known in _DTYPES)}; give another dtype"
            )
        entries.append(_Entry(name, shape, wanted))
    return entries


def _shards(entries: list[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size_bytes = 0
    for entry in entries:
        if shards[-1] and size_bytes + entry.size_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(entry)
        size_bytes += entry.size_bytes
    # Wide dtypes first: every tensor is then aligned to its own element.
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _refuse_older(out: Path, files: set[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    older = {path.name for path in out.glob("model*.safetensors*")} - files
    older = {name for name in older if not name.endswith(".part")}
    if older:
        raise CheckpointError(
            f"{out}: holds another export ({listed(older)}), which loaders would mix with this "
            f"one ({listed(files)}); remove it or give another folder"
        )


def _write(
    stream: IO[bytes], state: CheckpointState, entries: list[_Entry], metadata: dict[str, str]
) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": [*entry.shape],
            "data_offsets": [position, position + entry.size_bytes],
        }
        position += entry.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    stream.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        for run in _chunks(state, entry):
            # bytes through uint8: numpy knows no bfloat16
            stream.write(run.to(entry.dtype).contiguous().view(torch.uint8).numpy().data)


def _chunks(state: CheckpointState, entry: _Entry) -> Iterator[torch.Tensor]:
    buffer = state.buffers.get(entry.name)
    runs = iter([buffer.detach().reshape(-1)] if buffer is not None else [])
    if buffer is None:
        runs = state.runs(entry.name, MASTER, 0, entry.shape.numel())
    for run in runs:
        yield from run.split(_CHUNK_ELEMENTS)


class _Durable:
    """A file that appears under its name only once all of it is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(f"{path.name}.part")

    def __enter__(self) -> IO[bytes]:
        self._stream = open(self._part, "wb")
        return self._stream

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stream:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        if kind is not None:
            self._part.unlink(missing_ok=True)
            return
        os.replace(self._part, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
