"""The codecs of others, behind one face: an absolute bound in, bytes and an array out."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowtide.compression import decompress, get_codec

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One codec.

    Attributes:
        name: In tables.
        encode: Array and absolute bound to something encoded.
        decode: That, and the shape, back to an array.
        size: Bytes of what is encoded.
    """

    name: str
    encode: Callable[[Array, float], Any]
    decode: Callable[[Any, tuple[int, ...]], Array]
    size: Callable[[Any], int] = len


def ours(codec: str = "lowtide.sz", *, name: str = "", **parameters: Any) -> Candidate:
    """Return one of our codecs with some parameters; they are in its name if none is given."""

    def encode(values: Array, bound: float) -> bytes:
        return get_codec({"id": codec, "bound": bound, **parameters}).encode(values)

    def decode(blob: bytes, shape: tuple[int, ...]) -> Array:
        return np.asarray(decompress(blob)).reshape(shape)

    name = name or " ".join([codec, *(str(value) for value in parameters.values())])
    return Candidate(name=name, encode=encode, decode=decode)


def sz3(*, lorenzo: bool) -> Candidate:
    """Return SZ3 through its official binding."""
    from pysz import sz, szAlgorithm, szConfig, szErrorBoundMode

    def encode(values: Array, bound: float) -> Any:
        config = szConfig()
        config.errorBoundMode = szErrorBoundMode.ABS
        config.absErrorBound = bound
        if lorenzo:
            config.cmprAlgo = szAlgorithm.LORENZO_REG
        return sz.compress(values.copy(), config)[0]  # its encoder overwrites what it is given

    def decode(blob: Any, shape: tuple[int, ...]) -> Array:
        return np.asarray(sz.decompress(blob, np.float32, shape)[0])

    return Candidate(name="SZ3 lorenzo+reg" if lorenzo else "SZ3", encode=encode, decode=decode)


def zfp() -> Candidate:
    """Return ZFP in its fixed-accuracy mode."""
    import zfpy

    return Candidate(
        name="ZFP",
        encode=lambda values, bound: zfpy.compress_numpy(values, tolerance=bound),
        decode=lambda blob, _shape: np.asarray(zfpy.decompress_numpy(blob)),
    )


def hdf5_filter(name: str, options: Callable[[float], Any]) -> Candidate:
    """Return a filter of hdf5plugin, in an HDF5 file in memory with one chunk."""
    import h5py

    def encode(values: Array, bound: float) -> tuple[bytes, int]:
        file = io.BytesIO()
        with h5py.File(file, "w") as opened:
            data = opened.create_dataset("x", data=values, chunks=values.shape, **options(bound))
            size = int(data.id.get_storage_size())
        return file.getvalue(), size

    def decode(blob: tuple[bytes, int], _shape: tuple[int, ...]) -> Array:
        with h5py.File(io.BytesIO(blob[0]), "r") as opened:
            return np.asarray(opened["x"][...])

    return Candidate(name=name, encode=encode, decode=decode, size=lambda blob: int(blob[1]))


def candidates() -> list[Candidate]:
    """Return ours and every rival that is installed here."""
    found = [ours()]
    if importlib.util.find_spec("pysz"):
        found += [sz3(lorenzo=False), sz3(lorenzo=True)]
    if importlib.util.find_spec("zfpy"):
        found.append(zfp())
    if importlib.util.find_spec("hdf5plugin") and importlib.util.find_spec("h5py"):
        import hdf5plugin

        found.append(hdf5_filter("SZ2 (HDF5)", lambda bound: hdf5plugin.SZ(absolute=bound)))
        found.append(hdf5_filter("SPERR (HDF5)", lambda bound: hdf5plugin.Sperr(absolute=bound)))
    return found
