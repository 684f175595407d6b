"""What a clustering is made of, from whatever the caller has: arrays, tensors, lists, tables.

float32 and float64 in C order are taken as they lie in memory. Everything else is copied once:
other strides, and other types (float16, bfloat16 and small integers to float32, the rest to
float64).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowtide.core.errors import DataError

BLOCK_BYTES = 1 << 20  # of samples looked at at once outside of a backend: stays in the cache
_SMALL = ("float16", "int8", "uint8", "int16", "uint16", "bool")


@dataclass(frozen=True)
class Samples:
    """Samples that a backend can take.

    Attributes:
        values: float32 or float64, (M, D), C order: a numpy array, or a tensor that is not in host
            memory.
        weights: float64 (M,), or None for all ones.
        device: Where the caller's tensor is; None when the caller has no tensor.
    """

    values: Any
    weights: NDArray[np.float64] | None
    device: torch.device | None

    @property
    def tensor(self) -> torch.Tensor:
        """The same memory as a tensor."""
        return as_tensor(self.values)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that is computed in."""
        return np.dtype(str(self.values.dtype).removeprefix("torch."))

    def like_given(self, values: Any) -> Any:
        """Return an array as the caller knows them: a tensor beside theirs, or a numpy array."""
        if self.device is None:
            return to_numpy(values)
        return torch.as_tensor(values, device=self.device)


def as_samples(given: Any, weights: Any = None, *, dtype: np.dtype[Any] | None = None) -> Samples:
    """Return samples with their weights, checked.

    Args:
        given: (M, D): a numpy array (a mapped file too), a torch tensor on any device, or
            something that numpy makes an array of.
        weights: (M,), one number for all, or None.
        dtype: Type to compute in; None is that of the samples.

    Raises:
        DataError: a shape, type or value that cannot be clustered; the text says which.
    """
    device = given.device if isinstance(given, torch.Tensor) else None
    values = _tensor_values(given) if isinstance(given, torch.Tensor) else _array_values(given)
    _check_shape(values.shape)
    if dtype is not None and str(values.dtype).removeprefix("torch.") != dtype.name:
        values = _cast(values, dtype.name)
    _check_finite(values, "X")
    return Samples(values, as_weights(weights, len(values)), device)


def as_weights(given: Any, count: int) -> NDArray[np.float64] | None:
    """Return weights of `count` samples in float64, or None where all are one.

    Raises:
        DataError: not one weight for each sample, or one that is negative or not finite.
    """
    if given is None:
        return None
    weights = np.asarray(to_numpy(given), dtype=np.float64)
    if weights.ndim == 0:
        weights = np.full(count, weights)
    if weights.ndim != 1:
        raise DataError(f"sample_weight: Sample weights must be 1D array or scalar, got "
                        f"{weights.ndim}D array of shape {weights.shape}")  # fmt: skip
    if len(weights) != count:
        raise DataError(
            f"sample_weight.shape == {weights.shape}, expected {(count,)}: one for each sample"
        )
    _check_finite(weights, "sample_weight")
    if weights.min(initial=0.0) < 0:
        raise DataError(f"sample_weight: found {weights.min()}, allowed are 0 and more")
    return np.ascontiguousarray(weights)


def as_tensor(values: Any) -> torch.Tensor:
    """Return a tensor over the same memory; it may be memory that must not be written to."""
    if isinstance(values, torch.Tensor):
        return values
    return torch.from_numpy(values if values.flags.writeable else np.asarray(_Readable(values)))


def to_numpy(values: Any) -> Any:
    """Return a tensor as a numpy array in host memory, anything else as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    host = values.detach().cpu()
    return (host.float() if host.dtype == torch.bfloat16 else host).numpy()


def blocks_of(values: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield runs of rows that fit the cache, with their place."""
    row_bytes = max(1, values.shape[1] * values.element_size())
    rows = max(64, BLOCK_BYTES // row_bytes)
    if values.device.type != "cpu":
        rows *= 64  # a GPU wants larger ones
    for begin in range(0, len(values), rows):
        place = slice(begin, min(begin + rows, len(values)))
        yield place, values[place]


class _Readable:
    """Stands for an array that must not be written to, of which torch would warn."""

    def __init__(self, array: NDArray[Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._array = array  # holds the memory


def _tensor_values(tensor: torch.Tensor) -> Any:
    if tensor.is_complex():
        raise DataError(f"Complex data not supported: X is a tensor of {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise DataError(f"X: Sparse data was passed ({tensor.layout}), but dense data is required")
    tensor = tensor.detach()
    if tensor.dtype not in (torch.float32, torch.float64):
        small = str(tensor.dtype).removeprefix("torch.") in (*_SMALL, "bfloat16")
        tensor = tensor.to(torch.float32 if small else torch.float64)
    tensor = tensor.contiguous()
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _array_values(given: Any) -> NDArray[Any]:
    if hasattr(given, "toarray") and hasattr(given, "nnz"):
        raise DataError(
            "X: Sparse data was passed, but dense data is required. Use '.toarray()' to convert to "
            "a dense numpy array"
        )
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise DataError(f"X: cannot be made an array: {error}") from error
    if array.dtype.kind == "c":
        raise DataError(f"Complex data not supported: X is an array of {array.dtype}")
    if array.dtype.kind not in "fiubO":
        raise DataError(f"X: an array of {array.dtype}; dtype='numeric' is needed, convert to it")
    if array.dtype not in (np.float32, np.float64):
        try:
            array = _cast(array, "float32" if array.dtype.name in _SMALL else "float64")
        except (TypeError, ValueError) as error:
            raise type(error)(f"X: {error}; argument must be numbers") from error
    return np.ascontiguousarray(array) if array.ndim else array


def _cast(values: Any, name: str) -> Any:
    if isinstance(values, torch.Tensor):
        return values.to(getattr(torch, name))
    return values.astype(name, order="C")


def _check_shape(shape: Any) -> None:
    if len(shape) != 2:
        raise DataError(
            f"X: Expected 2D array, got {len(shape)}D array of shape {tuple(shape)} instead. "
            f"Reshape your data either using array.reshape(-1, 1) if your data has a single "
            f"feature or array.reshape(1, -1) if it contains a single sample"
        )
    if shape[1] == 0:
        raise DataError(
            f"X: 0 feature(s) (shape=({shape[0]}, 0)) while a minimum of 1 is required."
        )


def check_not_empty(shape: Any) -> None:
    """Raise where there is no sample at all."""
    if shape[0] == 0:
        raise DataError(f"X: 0 sample(s) (shape={tuple(shape)}) while a minimum of 1 is required.")


def _check_finite(values: Any, name: str) -> None:
    tensor = as_tensor(values)
    tensor = tensor if tensor.ndim == 2 else tensor[:, None]
    for place, block in blocks_of(tensor):
        # numpy's is many times faster in host memory
        where = ~np.isfinite(block.numpy()) if block.device.type == "cpu" else ~block.isfinite()
        if where.any():
            row = place.start + int(np.argwhere(to_numpy(where))[0][0])
            kind = "NaN" if bool(block.isnan().any()) else "infinity"
            raise DataError(
                f"{name}: contains {kind} (first in row {row}); allowed are finite numbers, not "
                f"NaN, inf"
            )


@dataclass(frozen=True)
class Moments:
    """Unweighted mean and variances of samples, mergeable across ranks.

    Attributes:
        count: Samples.
        mean: float64 (D,).
        squares: Sum of squared distances to the mean.
    """

    count: int
    mean: NDArray[np.float64]
    squares: float

    @classmethod
    def of(cls, values: torch.Tensor) -> Moments:
        """Return the moments of (M, D) values, to about the precision of their type."""
        parts = [cls(0, np.zeros(values.shape[1]), 0.0)]
        for _, block in blocks_of(values):
            mean = (
                block.new_full((len(block),), 1 / len(block)) @ block
            )  # many times mean()'s speed
            away = (block - mean).flatten()
            mean64 = mean.double().cpu().numpy()
            parts.append(cls(len(block), mean64, float(away.dot(away))))
        return cls.merged(parts)

    @classmethod
    def merged(cls, parts: list[Moments]) -> Moments:
        """Return the moments of all samples together (Chan, Golub and LeVeque, 1979)."""
        count = sum(part.count for part in parts)
        mean = np.asarray(sum(part.count * part.mean for part in parts)) / max(count, 1)
        squares = sum(
            part.squares + part.count * float(((part.mean - mean) ** 2).sum()) for part in parts
        )
        return cls(count, mean, float(squares))

    @property
    def mean_variance(self) -> float:
        """Mean of the features' variances: the unit of `tol`."""
        return self.squares / max(1, self.count) / len(self.mean)

    @property
    def is_off_centre(self) -> bool:
        """Whether float32 distances gain from taking the mean off first."""
        return math.sqrt(float((self.mean**2).sum())) > 2 * math.sqrt(
            self.squares / max(1, self.count)
        )
