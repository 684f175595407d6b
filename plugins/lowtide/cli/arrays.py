"""Arrays and streams in files, for the verbs that compress and cluster."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowtide.core.errors import CodecError, listed

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


def read_matrix(path: Path, tensor: str | None) -> Any:
    """Return the array in a .npy file, mapped, or one of a .safetensors file, as a torch tensor.

    Args:
        path: The file; its ending decides.
        tensor: Name in a .safetensors file; None where it holds only one.

    Raises:
        CodecError: there is no such file or name, or it holds something else.
    """
    if path.suffix != ".safetensors":
        if tensor is not None:
            raise CodecError(f'{path}: is no .safetensors file, so it has no tensor "{tensor}"')
        return read_npy(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if tensor is None and len(names) == 1:
                tensor = names[0]
            if tensor not in names:
                found = "no name is given" if tensor is None else f'found no tensor "{tensor}"'
                raise CodecError(f"{path}: {found}; name one with --tensor: {listed(names)}")
            return file.get_tensor(tensor)
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{path}: cannot be read as a .safetensors file: {error}") from error


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
