"""The codec ``lowtide.pq``: one codebook for an array, and a code for each of its sub-vectors."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.codec import ArrayData, Bound, Codec, compress_bytes, decompress_bytes
from lowtide.core.errors import CodecError, CorruptStreamError, DataError, listed
from lowtide.core.stream import BIT_TYPES, StreamHeader, numpy_dtype

# Of a stream: integers and floats are little endian.
_HEAD = struct.Struct("<IIQ")  # entries of the codebook, values of a vector, bytes of the codes
_LEVEL = 3


_WORKING: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("float16", "bfloat16", "float32"), np.dtype("<f4")),
    "float64": np.dtype("<f8"),
}


class PqCodec(Codec):
    """Vectors of `sub_dim` consecutive values, each replaced by the nearest of `n_clusters`.

    Lossy without a bound: 256 entries of 8 values are one bit per value, whatever that costs. NaN
    and infinity have no nearest entry and are refused.

    Args:
        n_clusters: Entries of the codebook; no more than there are vectors.
        sub_dim: Values of a vector.
        max_iter: Lloyd iterations.
        seed: Of the first centroids.
    """

    codec_id = "lowtide.pq"

    def __init__(
        self, n_clusters: int = 256, sub_dim: int = 8, max_iter: int = 25, seed: int = 0
    ) -> None:
        limits = {"n_clusters": (1, 65536), "sub_dim": (1, 4096), "max_iter": (1, 10000)}
        values = {"n_clusters": n_clusters, "sub_dim": sub_dim, "max_iter": max_iter}
        for name, (low, high) in limits.items():
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise CodecError(
                    f'codec "{self.codec_id}": {name} {value!r}, allowed are {low} to {high}'
                )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise CodecError(f'codec "{self.codec_id}": seed {seed!r}, allowed are 0 to 2**31 - 1')
        self.n_clusters = n_clusters
        self.sub_dim = sub_dim
        self.max_iter = max_iter
        self.seed = seed

    @property
    def bound(self) -> Bound:
        """None is promised."""
        return Bound("none")

    def _encode(self, data: ArrayData) -> bytes:
        from lowtide.kmeans.estimator import KMeans

        values = _working(self.codec_id, data)
        count = -(-values.size // self.sub_dim)
        if count == 0:
            return _HEAD.pack(0, self.sub_dim, 0)
        vectors = np.resize(values, (count, self.sub_dim))  # the last one goes on from the front
        estimator = KMeans(
            min(self.n_clusters, count),
            n_init=1,
            max_iter=self.max_iter,
            random_state=self.seed,
            fault_tolerance="correct",
        )
        try:
            estimator.fit(vectors)
        except DataError as error:
            raise CodecError(f'codec "{self.codec_id}": {error}') from error
        book = np.ascontiguousarray(estimator.cluster_centers_, values.dtype)
        labels = estimator.labels_.astype(_code_type(len(book)))
        codes = compress_bytes(np.ascontiguousarray(labels).data, _LEVEL)
        return _HEAD.pack(len(book), self.sub_dim, len(codes)) + book.tobytes() + codes

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        try:
            return _decoded(header, payload)
        except CorruptStreamError as error:
            raise CorruptStreamError(f'codec "{self.codec_id}": {error}') from error


def _decoded(header: StreamHeader, payload: memoryview) -> NDArray[Any]:
    size = math.prod(header.shape)
    if len(payload) < _HEAD.size:
        raise CorruptStreamError(f"payload of {len(payload)} bytes, at least {_HEAD.size}")
    entries, width, code_bytes = _HEAD.unpack(payload[: _HEAD.size])
    working = _WORKING.get(header.dtype)
    if (
        working is None
        or not 1 <= width <= 4096
        or entries > 65536
        or (entries == 0) != (size == 0)
    ):
        raise CorruptStreamError(
            f"{entries} entries of {width} values for {size} elements of {header.dtype}"
        )
    book_bytes = entries * width * working.itemsize
    expected = _HEAD.size + book_bytes + code_bytes
    if len(payload) != expected:
        raise CorruptStreamError(f"payload of {len(payload)} bytes, its parts have {expected}")
    if size == 0:
        return np.empty(0, numpy_dtype(header.dtype))
    book = np.frombuffer(payload[_HEAD.size :], working, entries * width).reshape(entries, width)
    count = -(-size // width)
    code_type = _code_type(entries)
    raw = decompress_bytes(payload[_HEAD.size + book_bytes :], count * code_type.itemsize)
    codes = np.frombuffer(raw, code_type)
    if int(codes.max()) >= entries:
        raise CorruptStreamError(f"a code of {codes.max()}, there are {entries} entries")
    return _narrowed(book[codes].reshape(-1)[:size], header.dtype)


def _working(codec_id: str, data: ArrayData) -> NDArray[Any]:
    """Return the elements flat, in a type that holds them all."""
    if data.dtype not in _WORKING:
        raise CodecError(
            f'codec "{codec_id}": elements of {data.dtype}, allowed are {listed(_WORKING)}'
        )
    flat = data.values.reshape(-1)
    if data.dtype in BIT_TYPES:
        return torch.from_numpy(flat.copy()).view(BIT_TYPES[data.dtype][1]).float().numpy()
    return flat.astype(_WORKING[data.dtype], copy=False)


def _narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype in BIT_TYPES:
        bits: NDArray[Any] = (
            torch.from_numpy(np.ascontiguousarray(values))
            .to(BIT_TYPES[dtype][1])
            .view(getattr(torch, BIT_TYPES[dtype][0]))
            .numpy()
        )
        return bits
    return values.astype(numpy_dtype(dtype))


def _code_type(entries: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if entries <= 256 else "<u2")
