"""The codec ``lowtide.pq``: one codebook for an array, and a code for each of its sub-vectors."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.codec import ArrayData, Bound, Codec, compress_bytes, decompress_bytes
from lowtide.core.errors import CodecError, CorruptStreamError, listed
from lowtide.core.stream import BIT_TYPES, StreamHeader, numpy_dtype
from lowtide.kmeans.codebook import fit_vectors
from lowtide.kmeans.protection import Protection

# A payload: this, the codebook, the codes (zstd), the places and bits of what is not finite (zstd).
# Entries of the codebook, values of a vector, bytes of the codes, elements that are not finite.
_HEAD = struct.Struct("<IIQQ")
_LEVEL = 3


_WORKING: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("float16", "bfloat16", "float32"), np.dtype("<f4")),
    "float64": np.dtype("<f8"),
}


class PqCodec(Codec):
    """Vectors of `sub_dim` consecutive values, each replaced by the nearest of `n_clusters`.

    Lossy without a bound: 256 entries of 8 values are one bit per value, whatever that costs. NaN
    and infinity come back bit for bit.

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
        values = _working(self.codec_id, data)
        is_special = ~np.isfinite(values)
        special = _pack_special(data.values.reshape(-1), np.flatnonzero(is_special))
        count = -(-values.size // self.sub_dim)
        book = np.empty((0, self.sub_dim), values.dtype)
        codes = b""
        if count:
            finite = np.where(is_special, values.dtype.type(0), values)
            # The last vector goes on with the first values.
            vectors = np.resize(finite, (count, self.sub_dim))
            book, labels = self._fit(vectors)
            codes = compress_bytes(labels.astype(_code_type(len(book))).data, _LEVEL)
        counts = (len(book), self.sub_dim, len(codes), int(is_special.sum()))
        return _HEAD.pack(*counts) + book.tobytes() + codes + special

    def _fit(self, vectors: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        estimator = fit_vectors(
            vectors,
            min(self.n_clusters, len(vectors)),
            max_iter=self.max_iter,
            seed=self.seed,
            protection=Protection("correct"),
        )
        used, codes = np.unique(estimator.labels_, return_inverse=True)
        return np.ascontiguousarray(estimator.cluster_centers_[used], vectors.dtype), codes

    def _decode(self, header: StreamHeader, payload: memoryview) -> NDArray[Any]:
        try:
            return _decoded(header, payload)
        except CorruptStreamError as error:
            raise CorruptStreamError(f'codec "{self.codec_id}": {error}') from error


def _decoded(header: StreamHeader, payload: memoryview) -> NDArray[Any]:
    size = math.prod(header.shape)
    working = _WORKING.get(header.dtype)
    if working is None or len(payload) < _HEAD.size:
        raise CorruptStreamError(f"a payload of {len(payload)} bytes for {header.dtype}")
    entries, width, code_bytes, specials = _HEAD.unpack(payload[: _HEAD.size])
    is_possible = 1 <= width <= 4096 and entries <= 65536 and (entries == 0) == (size == 0)
    if not is_possible or specials > size:
        raise CorruptStreamError(
            f"{entries} entries of {width} values and {specials} others for {size} elements"
        )
    body = payload[_HEAD.size :]
    book_bytes = entries * width * working.itemsize
    if book_bytes + code_bytes > len(body):
        raise CorruptStreamError(f"{len(body)} bytes, {book_bytes + code_bytes} were written")
    rest = body[book_bytes + code_bytes :]
    restored = np.empty(0, numpy_dtype(header.dtype))
    if size:
        book = np.frombuffer(body[:book_bytes], working).reshape(entries, width)
        codes = _codes(body[book_bytes : book_bytes + code_bytes], -(-size // width), entries)
        restored = _narrowed(book[codes].reshape(-1)[:size], header.dtype)
    _put_special(restored, rest, specials)
    return restored


def _codes(frame: memoryview, count: int, entries: int) -> NDArray[Any]:
    code_type = _code_type(entries)
    codes = np.frombuffer(decompress_bytes(frame, count * code_type.itemsize), code_type)
    if int(codes.max()) >= entries:
        raise CorruptStreamError(f"a code of {codes.max()}, there are {entries} entries")
    return codes


def _pack_special(elements: NDArray[Any], places: NDArray[np.int64]) -> bytes:
    """Return places and bits of the elements that have no nearest vector: NaN and infinity."""
    if not places.size:
        return b""
    return compress_bytes(places.astype("<i8").tobytes() + elements[places].tobytes(), _LEVEL)


def _put_special(restored: NDArray[Any], frame: memoryview, count: int) -> None:
    if not count:
        if len(frame):
            raise CorruptStreamError(f"{len(frame)} bytes too many")
        return
    raw = decompress_bytes(frame, count * (8 + restored.itemsize))
    places = np.frombuffer(raw, "<i8", count)
    if places[0] < 0 or places[-1] >= restored.size or (np.diff(places) <= 0).any():
        raise CorruptStreamError("places of NaN or infinity are not in order")
    restored[places] = np.frombuffer(raw[count * 8 :], restored.dtype)


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
