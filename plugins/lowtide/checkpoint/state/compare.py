"""Which tensors of two checkpoints, or of two torch files, are not the same bits."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lowtide.checkpoint.compact.table import refuse_compact
from lowtide.core.errors import CheckpointError

PIECE_ELEMENTS = 4 * 2**20  # compared at once, so that two large files need little memory
_PLAIN = (bool, int, float, str, type(None))

_Leaf: TypeAlias = "torch.Tensor | bool | int | float | str | None"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor or plain value that is not the same in both.

    Attributes:
        file: The file's name below the checkpoint; empty where two files were compared.
        name: The keys that lead to it, joined by "/".
        kind: "only in A", "only in B", "dtype", "shape" or "value".
        dtype: Its type; where the types differ, both, with "->" between.
        shape: Likewise; empty for what is no tensor.
        max_abs_difference: Largest finite difference of two elements, where there is one.
        differing_elements: How many elements differ in their bits, where dtype and shape agree.
    """

    file: str
    name: str
    kind: str
    dtype: str
    shape: str
    max_abs_difference: float | None = None
    differing_elements: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON types."""
        return asdict(self)


def compare(
    first: Path, second: Path, *, on_file: Callable[[str], None] | None = None
) -> list[Difference]:
    """Compare two torch files, or all ``.pt`` files of two checkpoints, bit for bit.

    Unpickles the files, which runs what is in them: only for files that are trusted.

    Args:
        first: A file or a checkpoint's folder.
        second: The same kind.
        on_file: Called with each file's name before it is read.

    Raises:
        CheckpointError: one is missing, of another kind, or cannot be read.
    """
    result: list[Difference] = []
    for name, file_a, file_b in _pairs(first, second):
        if on_file is not None:
            on_file(name or first.name)
        leaves_a = dict(_leaves(_load(file_a))) if file_a else {}
        leaves_b = dict(_leaves(_load(file_b))) if file_b else {}
        for key in [*leaves_a, *(key for key in leaves_b if key not in leaves_a)]:
            if key not in leaves_b:
                result.append(_lonely(name, key, "only in A", leaves_a[key]))
            elif key not in leaves_a:
                result.append(_lonely(name, key, "only in B", leaves_b[key]))
            else:
                found = _compare(name, key, leaves_a[key], leaves_b[key])
                result += [] if found is None else [found]
    return result


def _pairs(first: Path, second: Path) -> Iterator[tuple[str, Path | None, Path | None]]:
    for path in (first, second):
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder; pass two checkpoints or files")
    if first.is_dir() != second.is_dir():
        raise CheckpointError(
            f"{first} and {second}: one is a folder, the other a file; pass two of a kind"
        )
    if first.is_file():
        yield "", first, second
        return
    names_a, names_b = _torch_files(first), _torch_files(second)
    for folder, names in ((first, names_a), (second, names_b)):
        if not names:
            refuse_compact(folder)
    if not names_a and not names_b:
        raise CheckpointError(f"{first} and {second}: neither holds a .pt file")
    for name in sorted(names_a | names_b):
        yield (
            name,
            first / name if name in names_a else None,
            second / name if name in names_b else None,
        )


def _torch_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt") if path.is_file()}


def _load(path: Path) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=False, mmap=is_zip)
    except Exception as error:  # unpickling raises whatever the bytes say
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); "
            "`lowtide checkpoint verify` says whether it is damaged"
        ) from error


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, _Leaf]]:
    """Yield tensors and plain values in containers, by the keys that lead there."""
    if isinstance(value, (torch.Tensor, *_PLAIN)):
        yield "/".join(place), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*place, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _leaves(item, (*place, str(number)))


def _compare(file: str, name: str, a: _Leaf, b: _Leaf) -> Difference | None:
    facts_a, facts_b = _facts(a), _facts(b)
    dtype, shape = (x if x == y else f"{x} -> {y}" for x, y in zip(facts_a, facts_b, strict=True))
    if facts_a[0] != facts_b[0]:
        return Difference(file=file, name=name, kind="dtype", dtype=dtype, shape=shape)
    if facts_a[1] != facts_b[1]:
        return Difference(file=file, name=name, kind="shape", dtype=dtype, shape=shape)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        count, largest = _count(_plain(a), _plain(b))
    else:
        is_same = a == b or (a != a and b != b)  # NaN is not equal to itself
        count, largest = int(not is_same), _distance(a, b)
    if count == 0:
        return None
    return Difference(
        file=file, name=name, kind="value", dtype=dtype, shape=shape,
        max_abs_difference=largest, differing_elements=count,
    )  # fmt: skip


def _facts(value: _Leaf) -> tuple[str, str]:
    if isinstance(value, torch.Tensor):
        return str(value.dtype).removeprefix("torch."), str(list(value.shape))
    return type(value).__name__, ""


def _lonely(file: str, name: str, kind: str, value: _Leaf) -> Difference:
    dtype, shape = _facts(value)
    return Difference(file=file, name=name, kind=kind, dtype=dtype, shape=shape)


def _distance(a: Any, b: Any) -> float | None:
    if not isinstance(a, (int, float)) or isinstance(a, bool):
        return None
    try:
        distance = abs(float(a) - float(b))
    except OverflowError:  # integers of any size
        return None
    return distance if distance < float("inf") else None


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.contiguous().reshape(-1)


def _count(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float | None]:
    """Return how many elements differ in their bits, and the largest finite difference."""
    count, largest = 0, None
    for begin in range(0, a.numel(), PIECE_ELEMENTS):
        piece_a, piece_b = a[begin : begin + PIECE_ELEMENTS], b[begin : begin + PIECE_ELEMENTS]
        # As bytes: NaN is then like itself, and -0.0 unlike 0.0, as in the files.
        bytes_a, bytes_b = piece_a.view(torch.uint8), piece_b.view(torch.uint8)
        if torch.equal(bytes_a, bytes_b):
            continue
        differs = (bytes_a != bytes_b).view(-1, a.element_size()).any(dim=1)
        count += int(differs.sum())
        distance = _as_wide(piece_a[differs]).sub(_as_wide(piece_b[differs])).abs()
        distance = distance[distance.isfinite()]
        if distance.numel():
            largest = max(largest or 0.0, float(distance.max()))
    return count, largest


def _as_wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
