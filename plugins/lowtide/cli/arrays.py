"""Arrays and streams in files, for the verbs that compress, measure and cluster."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.core.errors import CodecError, ConfigError, listed, near

if TYPE_CHECKING:
    import numpy as np


def read_npy(path: Path) -> np.ndarray[Any, Any]:
    """Return the array in a .npy file, mapped and not read; never unpickles.

    Raises:
        CodecError: there is no such file, or it holds something else.
    """
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CodecError(f"{path}: cannot be read as a .npy file: {error}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise CodecError(f"{path}: holds several arrays; save one of them with numpy.save")
    return found


def read_tensors(path: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield name and tensor of each tensor in a .safetensors file, or of the one in a .npy file.

    Args:
        path: The file. One that is not called .safetensors is read as .npy.
        names: Only these; a .npy file's array is called as the file is, without its ending.

    Raises:
        CodecError: there is no such file or no such tensor, or it holds something else.
    """
    if path.suffix != ".safetensors":
        _check_names(path, names, [path.stem])
        yield path.stem, read_npy(path)
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            known = list(file.keys())
            _check_names(path, names, known)
            for name in names or known:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{path}: cannot be read as a .safetensors file: {error}") from error


def read_matrix(path: Path, tensor: str | None) -> Any:
    """Return the array in a .npy file, mapped, or one of a .safetensors file, as a torch tensor.

    Args:
        path: The file; its ending decides.
        tensor: Name in a .safetensors file; None where it holds only one.

    Raises:
        CodecError: there is no such file or name, or it holds something else.
    """
    found = read_tensors(path, None if tensor is None else [tensor])
    first = next(found, None)
    second = None if tensor is not None else next(found, None)
    if first is None or second is not None:
        names = "no tensor" if second is None else f'several tensors, such as "{second[0]}"'
        raise CodecError(f"{path}: holds {names}; name one with --tensor")
    return first[1]


def _check_names(path: Path, names: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in names or ():
        if name not in known:
            raise CodecError(
                f'{path}: has no tensor "{name}".{near(name, known)} It holds {listed(known)}'
            )


def configuration(text: str) -> dict[str, Any]:
    """Return the configuration of a codec that is given by its name or as JSON.

    Raises:
        ConfigError: it begins like JSON and is none.
    """
    if not text.lstrip().startswith("{"):
        return {"id": text}
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"--codec: {text} is not JSON: {error}") from error


def read_stream(path: Path) -> memoryview:
    """Return the bytes of a stream's file, mapped.

    Raises:
        CodecError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            if not path.stat().st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CodecError(f"{path}: cannot be read: {error.strerror}") from error


def shape_text(shape: tuple[int, ...] | list[int]) -> str:
    """Return a shape for people, such as "240 x 37 x 49"."""
    return " x ".join(map(str, shape)) or "one value"
